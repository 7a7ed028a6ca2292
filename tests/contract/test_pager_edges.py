"""What the pager relies on of a kernel: one body, run on the real one and on the tests' stand-in.

So that what is proven with the stand-in (tests/core/test_pager_model.py) holds for the kernel too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from fake_kernel import FakeKernel, Page
from fake_source import FakeSource, reply
from postcopyd._native.core import ffi
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Lane, Pager, Signal, StateMemory
from postcopyd.units import Hva, Offset
from support import require_uffd
from uffd_target import EVENT_REMOVE, MADV_DONTNEED, THREAD_ID, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
PAGES = 32
IMAGE = b"".join(bytes([1 + page]) * PAGE for page in range(PAGES - 4)) + bytes(4 * PAGE)
PATIENCE_S = 30.0


class Vmm(Protocol):
    """Threads and memory on the other side of an edge. A reader is a number until it is done."""

    base: int
    uffd: int
    edge: Any

    def read(self, page: int) -> int: ...

    def contents(self, reader: int) -> bytes | None:
        """What the reader saw, None as long as it stands still."""

    def give_back(self, page: int, count: int) -> Callable[[], bool]:
        """Begin MADV_DONTNEED; the result tells whether it is through."""

    def look(self) -> None:
        """Let time pass on its side."""

    def close(self) -> None: ...


class RealVmm:
    """A process behind a real userfaultfd."""

    edge = None

    def __init__(self) -> None:
        require_uffd()
        self.target = Target("anon", PAGES * PAGE, features=EVENT_REMOVE | THREAD_ID)
        self.base, self.uffd = self.target.base, self.target.uffd

    def read(self, page: int) -> int:
        return self.target.start("read", self.base + page * PAGE, PAGE)

    def contents(self, reader: int) -> bytes | None:
        self.target.collect()
        return bytes.fromhex(self.target.result(reader)) if self.target.is_done(reader) else None

    def give_back(self, page: int, count: int) -> Callable[[], bool]:
        number = self.target.start("madvise", self.base + page * PAGE, count * PAGE, MADV_DONTNEED)
        return lambda: self.target.is_done(number)

    def look(self) -> None:
        self.target.collect()

    def close(self) -> None:
        self.target.__exit__(None, None, None)


class FakeVmm:
    """The stand-in."""

    base = 0x7F0000000000
    uffd = 0

    def __init__(self) -> None:
        pages = {self.base + i * PAGE: Page(i, PAGE, IMAGE[i * PAGE : (i + 1) * PAGE]) for i in range(PAGES)}
        self.kernel = FakeKernel(pages)
        self.edge = self.kernel.edge
        self._at: dict[int, int] = {}

    def read(self, page: int) -> int:
        tid = len(self._at) + 1
        self._at[tid] = self.base + page * PAGE
        self.kernel.touch(tid, self._at[tid])
        return tid

    def contents(self, reader: int) -> bytes | None:
        return None if reader in self.kernel.blocked else self.kernel.mapped[self._at[reader]].content

    def give_back(self, page: int, count: int) -> Callable[[], bool]:
        self.kernel.remove(self.base + page * PAGE, self.base + (page + count) * PAGE)
        return lambda: not self.kernel.unread and not self.kernel.unfinished

    def look(self) -> None:
        self.kernel.finish_changes()

    def close(self) -> None:
        assert not self.kernel.breaches


class Setup:
    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.source = FakeSource(IMAGE, {range(len(IMAGE)): PAGE})
        self.state = StateMemory.fresh("edges", PAGES)
        region = MemoryRegion(host_addr=Hva(vmm.base), size_bytes=PAGES * PAGE, image_offset=Offset(0))
        self.pager = Pager.create(self.state, [region], vmm.uffd, edge=vmm.edge)

    def close(self) -> None:
        self.pager.close()
        self.state.close()
        self.vmm.close()

    def until(self, condition: Callable[[], bool]) -> None:
        """Drain, and try again what stalls, until `condition`."""
        deadline = time.monotonic() + PATIENCE_S
        stalled = Signal(0)
        while not condition():
            assert time.monotonic() < deadline, "never came about"
            self.vmm.look()
            stalled = (self.pager.drain() | (self.pager.retry() if stalled else stalled)) & Signal.STALLED

    def ask(self) -> None:
        if body := self.pager.encode_demand():
            self.source.take(Lane.DEMAND, body)

    def push(self, pages: int) -> None:
        body, _ = self.pager.encode_bulk(pages * PAGE, pages * PAGE)
        self.source.take(Lane.BULK, body)

    def answer(self, lane: Lane) -> None:
        while self.source.outstanding[lane]:
            assert self.pager.feed(reply(self.source.piece(lane, 0, PAGES)))

    def waiting(self) -> int:
        return self.pager.stats().waiting


@pytest.fixture(params=[RealVmm, FakeVmm], ids=["kernel", "stand-in"])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    made = Setup(request.param())
    yield made
    made.close()


def test_an_install_wakes_every_thread_at_its_page(setup: Setup) -> None:
    readers = [setup.vmm.read(3) for _ in range(4)]
    setup.until(lambda: setup.waiting() == 4)
    assert [setup.vmm.contents(reader) for reader in readers] == [None] * 4
    setup.ask()
    assert [len(setup.source.outstanding[lane]) for lane in Lane] == [1, 0]
    setup.answer(Lane.DEMAND)
    setup.until(lambda: all(setup.vmm.contents(reader) is not None for reader in readers))
    assert {setup.vmm.contents(reader) for reader in readers} == {IMAGE[3 * PAGE : 4 * PAGE]}
    assert setup.waiting() == 0


def test_a_page_that_two_requests_bring_is_installed_once(setup: Setup) -> None:
    reader = setup.vmm.read(5)
    setup.push(8)
    setup.until(lambda: setup.waiting() == 1)
    setup.ask()
    setup.answer(Lane.BULK)
    setup.until(lambda: setup.vmm.contents(reader) is not None)
    before = setup.pager.stats()
    setup.answer(Lane.DEMAND)
    after = setup.pager.stats()
    assert after.duplicates == before.duplicates + 1
    assert after.present == before.present == 8


def test_what_is_there_already_counts_and_stays(setup: Setup) -> None:
    """EEXIST: a process died between installing and noting it."""
    setup.push(PAGES)
    memory = ffi.buffer(setup.state.memory)
    before = bytes(memory)
    setup.answer(Lane.BULK)
    assert setup.pager.stats().missing == setup.pager.stats().requested == 0
    setup.pager.close()
    memory[:] = before
    setup.pager = Pager.adopt(setup.state, setup.vmm.uffd, edge=setup.vmm.edge)
    setup.source.forget(Lane.BULK)
    setup.pager.drain()
    setup.push(PAGES)
    setup.answer(Lane.BULK)
    assert setup.pager.is_complete()
    reader = setup.vmm.read(2)
    setup.until(lambda: setup.vmm.contents(reader) is not None)
    assert setup.vmm.contents(reader) == IMAGE[2 * PAGE : 3 * PAGE]


def test_a_page_that_the_source_calls_zero_is_filled_when_it_is_touched(setup: Setup) -> None:
    setup.pager.mark_zero((PAGES - 4) * PAGE, 4 * PAGE)
    assert setup.pager.stats().zero == 4
    reader = setup.vmm.read(PAGES - 1)
    setup.until(lambda: setup.vmm.contents(reader) is not None)
    assert setup.vmm.contents(reader) == bytes(PAGE)
    assert setup.pager.encode_demand() == b""


def test_nothing_is_installed_over_a_removal(setup: Setup) -> None:
    reader = setup.vmm.read(7)
    setup.until(lambda: setup.waiting() == 1)
    setup.ask()
    through = setup.vmm.give_back(6, 4)
    # The answer meets the removal, read or not.
    setup.answer(Lane.DEMAND)
    setup.until(lambda: through() and setup.waiting() == 0)
    setup.until(lambda: setup.vmm.contents(reader) is not None)
    again = setup.vmm.read(7)
    setup.until(lambda: setup.vmm.contents(again) is not None)
    assert setup.vmm.contents(again) == bytes(PAGE)
    setup.push(PAGES)
    setup.answer(Lane.BULK)
    assert setup.pager.is_complete()
    late = [setup.vmm.read(page) for page in (6, 8, 9, 10)]
    setup.until(lambda: all(setup.vmm.contents(reader) is not None for reader in late))
    assert [setup.vmm.contents(reader) for reader in late] == [bytes(PAGE)] * 3 + [
        IMAGE[10 * PAGE : 11 * PAGE]
    ]


def test_an_adopting_process_wakes_whom_the_dead_one_left(setup: Setup) -> None:
    reader = setup.vmm.read(1)
    setup.until(lambda: setup.waiting() == 1)
    setup.pager.close()
    setup.pager = Pager.adopt(setup.state, setup.vmm.uffd, edge=setup.vmm.edge)
    assert setup.waiting() == 0
    setup.until(lambda: setup.waiting() == 1)
    setup.ask()
    setup.answer(Lane.DEMAND)
    setup.until(lambda: setup.vmm.contents(reader) is not None)
    assert setup.vmm.contents(reader) == IMAGE[PAGE : 2 * PAGE]
