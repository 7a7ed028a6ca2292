"""What the demultiplexer does about the pager's signals."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, cast

from postcopyd.demux import Demultiplexer
from postcopyd.pager import Signal
from virtual_time import run_in_virtual_time

if TYPE_CHECKING:
    from postcopyd.demux import SignalHandler
    from postcopyd.pager import Pager


class Held:
    """A pager whose userfaultfd cannot be read for as long as a vCPU installs a page."""

    settled = 0

    def __init__(self) -> None:
        self.installing = True
        self.looks = 0

    def drain(self) -> int:
        self.looks += 1
        return int(Signal.HELD | Signal.STALLED) if self.installing else 0

    def on_doorbell(self, doorbell: int) -> int:
        os.eventfd_read(doorbell)
        return self.drain()

    def retry(self) -> int:
        return 0


class Handler:
    def on_progress(self) -> None:
        pass


def test_a_descriptor_that_may_not_be_read_is_not_looked_at_again_and_again() -> None:
    uffd, doorbell = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))

    async def main() -> None:
        pager = Held()
        demux = Demultiplexer(cast("Pager", pager), uffd, cast("SignalHandler", Handler()), doorbell)
        os.eventfd_write(uffd, 1)
        demux.start()
        await asyncio.sleep(10)
        # Readable all the time: by every turn of the loop it would be millions.
        assert 10 < pager.looks < 200
        pager.installing = False
        os.eventfd_write(doorbell, 1)
        before = pager.looks
        await asyncio.sleep(0.0005)
        assert pager.looks > before, "the doorbell does not wait for the timer"
        demux.stop()

    try:
        run_in_virtual_time(main())
    finally:
        os.close(uffd)
        os.close(doorbell)
