"""The Firecracker-like client notices what it is there to notice, and speaks what Firecracker speaks.

Its memory is served here by the smallest possible handler, which can be told to make mistakes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvm.local_resolver import LocalResolver
from postcopyd.handoff import HandoffListener
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import Callable

    from postcopyd.handoff import Handoff

CLIENT = Path(__file__).with_name("firecracker_client.py")
PAGES = 256
SIZE = PAGES * 4096

pytestmark = pytest.mark.uffd


@pytest.fixture(autouse=True)
def _uffd() -> None:
    require_uffd()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random pages with some zero pages, a hundred bytes short of the memory's size."""
    content = bytearray(random.Random(7).randbytes(SIZE))
    for page in range(0, PAGES, 5):
        content[page * 4096 : page * 4096 + 4096] = bytes(4096)
    path = tmp_path / "image"
    path.write_bytes(content[:-100])
    return path


def content_of(image: Path) -> bytes:
    return image.read_bytes().ljust(SIZE, b"\0")


class Forgetful(set[int]):
    """Keeps nothing: a resolver with this forgets which pages were removed."""

    def update(self, *others: object) -> None:
        pass


async def run_client(
    image: Path, *options: str, fetch: Callable[[int, int], bytes] | None = None, forget_removed: bool = False
) -> tuple[int, dict[str, object], Handoff]:
    """Run the client against a local resolver; return its exit status, its report, and what it handed over."""
    content = content_of(image)
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    listener = HandoffListener(image.parent / "s")
    listener.open()
    serving = asyncio.create_task(listener.serve(handoffs.put))
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(CLIENT), f"--socket={listener.path}", f"--image={image}", f"--memory={SIZE}",
        "--timeout=60", *options, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert client.stdout is not None
    with await handoffs.get() as handoff:
        region = handoff.regions[0]
        resolver = LocalResolver(
            handoff.uffd.fileno(), region.host_addr, SIZE, fetch or (lambda at, size: content[at : at + size])
        )
        if forget_removed:
            resolver.removed = Forgetful()
        with resolver:
            said = await client.stdout.read()
            status = await client.wait()
    serving.cancel()
    await asyncio.wait([serving])
    listener.close()
    return status, json.loads(said), handoff


@pytest.mark.parametrize("generation", ["1.1", "1.7", "1.12"])
async def test_memory_that_is_served_right_is_found_right(image: Path, generation: str) -> None:
    status, report, handoff = await run_client(image, f"--generation={generation}", "--balloon=32")
    assert (status, report["ok"], report["wrong_pages"]) == (0, True, 0), report
    assert report["pages"] == PAGES
    assert report["ballooned"] == 32
    assert handoff.format_name == f"firecracker-{generation}"


async def test_memory_that_was_only_read_has_the_images_digest(image: Path) -> None:
    _, report, _ = await run_client(image, "--read-only")
    assert report["sha256"] == hashlib.sha256(content_of(image)).hexdigest()
    assert report["written"] == 0


async def test_one_wrong_byte_is_found(image: Path) -> None:
    content = bytearray(content_of(image))
    content[77 * 4096 + 4095] ^= 1
    status, report, _ = await run_client(image, fetch=lambda at, size: bytes(content[at : at + size]))
    assert (status, report["wrong_pages"], report["first_wrong"]) == (1, 1, 77), report


async def test_a_ballooned_page_that_is_fetched_again_is_found(image: Path) -> None:
    status, report, _ = await run_client(image, "--balloon=32", forget_removed=True)
    assert status == 1
    # Every fifth page of the image is zero itself, so not all of the 32 can be told apart.
    assert report["balloon_not_zero"] not in (0, None), report


async def test_several_regions_lie_apart_and_follow_each_other_in_the_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"")
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    listener = HandoffListener(tmp_path / "s")
    listener.open()
    serving = asyncio.create_task(listener.serve(handoffs.put))
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(CLIENT), f"--socket={listener.path}", f"--image={tmp_path / 'image'}",
        f"--memory={7 * 4096}", "--regions=3", "--timeout=60", stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    with await handoffs.get() as handoff:
        assert [(r.image_offset // 4096, r.size_bytes // 4096) for r in handoff.regions] == [
            (0, 3),
            (3, 2),
            (5, 2),
        ]
        assert handoff.vmm_pid == client.pid
        client.kill()
        await client.wait()
    serving.cancel()
    await asyncio.wait([serving])
    listener.close()


async def test_without_a_daemon_it_says_why(image: Path) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(CLIENT), f"--socket={image.parent / 'nobody'}", f"--image={image}", f"--memory={SIZE}",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await client.communicate()
    assert client.returncode == 2
    assert os.strerror(2) in json.loads(said)["errors"][0]
