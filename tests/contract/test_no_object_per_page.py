"""Python's work grows with batches, not with pages: what it keeps and what it calls while memory arrives.

The daemon's parts run in this process; the page server and the guest, a C program of the bench, in theirs.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from harness import Host, LocalDaemon, local_daemon
from images import DATA, MIB, PAGE, write_image
from postcopyd.demo.processes import Child
from postcopyd.status import Limits, State
from programs import build
from rig import Guest
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import FrameType

    from postcopyd.status import MigrationStatus

IMAGES = {"warm": 16 * MIB, "small": 80 * MIB, "large": 480 * MIB}
"""The first run makes what is made once; the others differ by 102 400 pages."""

THREADS, TOUCHES = 4, 500

pytestmark = pytest.mark.uffd


@pytest.fixture(autouse=True)
def _uffd() -> None:
    require_uffd()


@asynccontextmanager
async def guest_of(host: Host, len_bytes: int) -> AsyncIterator[Guest]:
    log = host.folder / "guest.log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            str(build("faulter")), str(len_bytes // PAGE), "1", "1", stdin=-1, stdout=-1, stderr=stderr
        )
    child = Child("guest", process, log)
    try:
        await child.line()
        yield Guest(child, DATA)
    finally:
        await child.end()


class Blocks:
    """The interpreter's memory blocks, more than at the beginning: the most seen while memory arrived, and now."""

    LOOKS = 16

    def __init__(self) -> None:
        self._before = self._count()
        self._looks = 0
        self.most = 0

    def look(self, status: MigrationStatus) -> bool:
        """Look a few times on the way; true when it is over."""
        if status.pages_installed * self.LOOKS >= self._looks * max(status.pages_total, 1):
            self._looks += 1
            self.most = max(self.most, self.now())
        return status.state is State.COMPLETE

    def now(self) -> int:
        return self._count() - self._before

    @staticmethod
    def _count() -> int:
        gc.collect()
        return sys.getallocatedblocks()


@asynccontextmanager
async def sourced_daemon() -> AsyncIterator[tuple[Host, LocalDaemon, str]]:
    """A daemon in this process, and the address of a page server that has all of IMAGES."""
    async with Host() as host, local_daemon(transport="native") as daemon:
        named = []
        for name, len_bytes in IMAGES.items():
            write_image(host.folder / name, len_bytes, DATA)
            named.append(f"{name}={host.folder / name}")
        _, address = await host.page_server(*named, options=("--transport", "native"))
        yield host, daemon, address


async def test_the_objects_of_a_migration_do_not_grow_with_its_pages() -> None:
    grown: dict[str, tuple[int, int]] = {}
    async with sourced_daemon() as (host, daemon, address):
        for name, len_bytes in IMAGES.items():
            async with guest_of(host, len_bytes) as guest:
                prepared = await daemon.prepare(name, address)
                blocks = Blocks()
                await guest.ask(f"handoff {prepared.socket_path}")
                touching = asyncio.ensure_future(guest.touch(THREADS, TOUCHES))
                status = await daemon.until(name, blocks.look)
                await touching
                assert status.pages_installed == len_bytes // PAGE
                grown[name] = blocks.most, blocks.now()
                await guest.ask("check")
    pages = (IMAGES["large"] - IMAGES["small"]) // PAGE
    for small, large in zip(grown["small"], grown["large"], strict=True):
        assert large - small < pages / 100, f"{pages} more pages, blocks of memory: {grown}"


class Calls:
    """Calls of the package's own functions in this thread, and how many batches of bytes came from the network."""

    def __init__(self) -> None:
        self.made = 0
        self.batches = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and "/postcopyd/" in frame.f_code.co_filename:
            self.made += 1
            self.batches += frame.f_code.co_name == "buffer_updated"


async def test_what_a_push_calls_depends_on_batches_and_not_on_pages() -> None:
    calls = Calls()
    async with sourced_daemon() as (host, daemon, address), guest_of(host, IMAGES["large"]) as guest:
        prepared = await daemon.prepare("large", address, limits=Limits(push_rate=1))
        await guest.ask(f"handoff {prepared.socket_path}")
        before = await daemon.until("large", lambda status: status.state is State.RUNNING)
        with calls.counted():
            await daemon.manager.set_limits("large", Limits())
            serving = daemon.manager._entries["large"].serving
            assert serving is not None
            await asyncio.wait({serving})
        status = daemon.manager.get("large")
    assert status.state is State.COMPLETE
    assert status.pages_pushed - before.pages_pushed > 100_000
    # A batch has up to 64 pages; a call for each of them would be seen beside the ones for the batch.
    assert calls.made < 60 * calls.batches, (
        f"{calls.made} calls, {calls.batches} batches, {status.pages_pushed} pages"
    )
