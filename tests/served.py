"""A session's loop in miniature: a real userfaultfd, the pager, and a source that answers at once."""

from __future__ import annotations

import random
import select
import time
from typing import TYPE_CHECKING, Any

from fake_source import FakeSource, reply
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Lane, Pager, Signal, StateMemory
from postcopyd.units import Hva, Offset

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffd_target import Target

PATIENCE_S = 30.0
"""For whatever must happen; nothing is measured by it."""


def image_of(len_bytes: int, seed: int = 1) -> bytes:
    """Every 4 KiB has content of its own, each seventh of them zero."""
    random_bytes = random.Random(seed)
    return b"".join(
        bytes(4096) if page % 7 == 6 else random_bytes.randbytes(4096) for page in range(len_bytes // 4096)
    )


class Served:
    """`target`'s memory, served from `image`. Close it."""

    def __init__(self, target: Target, image: bytes, regions: list[MemoryRegion] | None = None) -> None:
        self.target = target
        self.image = image
        self.regions = regions or [
            MemoryRegion(
                host_addr=Hva(target.base),
                size_bytes=target.size,
                image_offset=Offset(0),
                page_size=target.page_size,
            )
        ]
        self.source = FakeSource(
            image, {range(r.image_offset, r.image_offset + r.size_bytes): r.page_size for r in self.regions}
        )
        self.state = StateMemory.fresh("kernel", sum(r.size_bytes // r.page_size for r in self.regions))
        self.pager = Pager.create(self.state, self.regions, target.uffd)
        self.signals = Signal(0)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.pager.close()
        self.state.close()

    def die_and_adopt(self) -> None:
        """The process ends between two calls; another takes over what it left."""
        self.pager.close()
        for lane in Lane:
            self.source.forget(lane)
        self.pager = Pager.adopt(self.state, self.target.uffd)

    def step(self, *, push: bool = False, answer: bool = True) -> None:
        """Read, ask, answer, try again what stalled."""
        was_stalled = self.signals & Signal.STALLED
        self.signals = Signal(self.pager.drain())
        if was_stalled:
            self.signals |= self.pager.retry()
        while body := self.pager.encode_demand():
            self.source.take(Lane.DEMAND, body)
        if push:
            body, _ = self.pager.encode_bulk(4 << 20, 256 << 10)
            if body:
                self.source.take(Lane.BULK, body)
        for lane in Lane:
            while answer and self.source.outstanding[lane]:
                assert self.pager.feed(reply(self.source.piece(lane, 0, 64)))
        self.signals |= self.pager.take_signals()
        self.target.collect()

    def until(self, condition: Callable[[], bool], *, push: bool = False) -> None:
        """Serve until `condition`; fails after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            self.step(push=push)
            if Signal.FAILED in self.signals:
                raise self.pager.failure()
            assert time.monotonic() < deadline, f"never came about; {self.pager.stats()}"
            if not push and not self.signals & (Signal.SEND | Signal.MORE | Signal.STALLED):
                select.select([self.target.uffd, self.target.control.fileno()], [], [], 0.05)

    def finish(self, *numbers: int, push: bool = False) -> list[Any]:
        """Serve until these commands are done; their results."""
        self.until(lambda: self.target.is_done(*numbers), push=push)
        return [self.target.result(number) for number in numbers]

    def complete(self) -> None:
        """Push everything."""
        self.until(self.pager.is_complete, push=True)
