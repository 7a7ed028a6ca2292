"""A client that knows only the published Firecracker format is served to the last byte, balloon included."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from harness import PATIENCE_S, TRANSPORTS, Host, content_of, huge_pages
from postcopyd.status import Limits, State
from postcopyd.units import HUGE_PAGE_SIZE, PAGE_SIZE
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CLIENT = Path(__file__).parent / "firecracker_client.py"
PAGES = 2048  # 8 MiB
CONTENT = content_of(PAGES)


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    require_uffd()
    async with Host() as host:
        yield host


async def run_client(socket_path: str, image: Path, *options: str) -> dict[str, Any]:
    """Run the client; return its report, which says that all was right."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        *("--socket", socket_path, "--image", str(image), "--memory", str(len(CONTENT))),
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    report: dict[str, Any] = json.loads(out or b"{}")
    assert process.returncode == 0, (report, err.decode())
    assert report["ok"], report
    return report


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("generation", ["1.1", "1.7", "1.12"])
async def test_every_generation_is_served(host: Host, generation: str, transport: str) -> None:
    image = host.image("memory", CONTENT)
    _, source = await host.page_server(f"vm={image}")
    daemon = await host.daemon(transport)
    # Without a push the migration lasts as long as the client needs to touch everything, balloon and all.
    prepared = await daemon.client.prepare("vm", [source], limits=Limits(push_rate=1))
    report = await run_client(
        prepared.socket_path, image, "--generation", generation, "--regions", "3", "--balloon", "128"
    )
    assert report["ballooned"] >= 64
    assert (report["balloon_not_zero"], report["lost_writes"], report["wrong_pages"]) == (0, 0, 0)
    done = await daemon.client.get("vm")
    assert done.state in (State.COMPLETE, State.FAILED), (
        done
    )  # FAILED: gone before the last pages were pushed
    assert done.handoff_format == f"firecracker-{generation}"
    assert done.pages_removed >= report["ballooned"]
    assert done.bad_replies == 0


@pytest.mark.parametrize("generation", ["1.7", "1.12"])
async def test_huge_pages_are_served(host: Host, generation: str) -> None:
    with huge_pages(len(CONTENT) // HUGE_PAGE_SIZE):
        image = host.image("memory", CONTENT)
        _, source = await host.page_server(f"vm={image}")
        daemon = await host.daemon()
        prepared = await daemon.client.prepare("vm", [source])
        report = await run_client(
            prepared.socket_path,
            image,
            *("--generation", generation, "--page-size", str(HUGE_PAGE_SIZE), "--balloon", "1"),
        )
        assert report["pages"] == len(CONTENT) // HUGE_PAGE_SIZE
        status = await daemon.client.get("vm")
        assert status.page_size == HUGE_PAGE_SIZE
        assert status.pages_total == report["pages"]


async def test_the_default_socket_belongs_to_the_one_migration_that_is_prepared(host: Host) -> None:
    image = host.image("memory", CONTENT)
    _, source = await host.page_server(f"vm={image}", f"other={image}")
    socket_path = str(host.folder / "default.sock")
    daemon = await host.daemon(default_socket=socket_path)
    await daemon.client.prepare("vm", [source])
    await run_client(socket_path, image)
    assert (await daemon.client.get("vm")).pages_installed > 0


async def test_many_vmms_start_from_one_image_at_the_default_socket(host: Host) -> None:
    image = host.image("memory", CONTENT)
    _, source = await host.page_server(f"snap={image}", options=("--keep",))
    socket_path = str(host.folder / "default.sock")
    daemon = await host.daemon(default_socket=socket_path, default_source=source, default_image="snap")
    await asyncio.gather(
        *(run_client(socket_path, image, "--balloon", "64", "--seed", str(seed)) for seed in range(4))
    )
    clones = await daemon.client.list()
    assert sorted(clone.id for clone in clones) == ["snap-1", "snap-2", "snap-3", "snap-4"]
    assert all(clone.memory_bytes == PAGES * PAGE_SIZE for clone in clones)
    # The image is still there for the fifth.
    await run_client(socket_path, image)


async def test_a_clone_that_is_refused_leaves_the_default_socket_to_the_others(host: Host) -> None:
    """Its memory is larger than the image, twice; then come two that fit."""
    small = host.image("small", CONTENT[: len(CONTENT) // 2])
    image = host.image("memory", CONTENT)
    _, source = await host.page_server(f"snap={small}", options=("--keep",))
    socket_path = str(host.folder / "default.sock")
    daemon = await host.daemon(default_socket=socket_path, default_source=source, default_image="snap")
    for _ in range(2):
        with pytest.raises(AssertionError):
            await run_client(socket_path, image, "--timeout", "1")
    assert await daemon.client.list() == []
    await asyncio.gather(
        *(run_client(socket_path, image, "--memory", str(len(CONTENT) // 2)) for _ in range(2))
    )
