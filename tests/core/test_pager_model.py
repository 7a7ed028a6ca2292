"""The pager between a kernel and a source that do their worst.

Whatever the order of faults, removals, moves, late and wrong answers, short memory and deaths of the process: no page
gets content that it must not hold, no thread sees any, and once kernel and source behave again nobody waits for ever.
The kernel and the source are models (fake_kernel, fake_source), which keep the book.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_kernel import FakeKernel, Page
from fake_source import FakeSource, reply, run_of
from postcopyd._native.core import ffi
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Lane, Pager, Signal, StateMemory
from postcopyd.units import Hva, Offset

SMALL, LARGE = 4096, 16384
REGIONS = (
    MemoryRegion(
        host_addr=Hva(0x7F0000000000), size_bytes=40 * SMALL, image_offset=Offset(1 << 20), page_size=SMALL
    ),
    MemoryRegion(
        host_addr=Hva(0x7E0000000000), size_bytes=6 * LARGE, image_offset=Offset(0), page_size=LARGE
    ),
)
ELSEWHERE = 0x7D0000000000
THREADS = 5

lanes = st.sampled_from(Lane)
small_numbers = st.integers(0, 1 << 16)


def build_image() -> bytes:
    """Every 4 KiB has bytes of its own; each fifth is zero."""
    image = bytearray((1 << 20) + 40 * SMALL)
    for start in range(0, len(image), SMALL):
        if start // SMALL % 5 != 4:
            image[start : start + SMALL] = (start // SMALL + 1).to_bytes(4, "little") * (SMALL // 4)
    image[2 * LARGE : 3 * LARGE] = bytes(LARGE)
    return bytes(image)


IMAGE = build_image()


class PagerModel(RuleBasedStateMachine):
    @initialize(thread_ids=st.booleans())
    def begin(self, thread_ids: bool) -> None:
        self.kernel = FakeKernel(self.fresh_pages(), thread_ids=thread_ids)
        self.every_page = list(self.kernel.mapped.values())
        self.kernel.on_death = self.remember_state
        self.source = FakeSource(
            IMAGE, {range(r.image_offset, r.image_offset + r.size_bytes): r.page_size for r in REGIONS}
        )
        self.state = StateMemory.fresh("model", len(self.every_page))
        self.pager = Pager.create(self.state, REGIONS, 0, edge=self.kernel.edge)
        self.pager.set_source_limits(range_bytes=8 * LARGE, ranges=1024)
        self.signals = Signal(0)
        self.remembered = b""
        self.next_free = ELSEWHERE

    @staticmethod
    def fresh_pages() -> dict[int, Page]:
        pages: dict[int, Page] = {}
        for vma, region in enumerate(REGIONS, 1):
            for at in range(0, region.size_bytes, region.page_size):
                offset = region.image_offset + at
                content = IMAGE[offset : offset + region.page_size]
                pages[region.host_addr + at] = Page(len(pages), region.page_size, content, vma=vma)
        return pages

    def teardown(self) -> None:
        if not hasattr(self, "kernel"):
            return
        try:
            self.bury()
            self.everybody_behaves_again()
        finally:
            self.pager.close()
            self.state.close()

    # ── the VMM ──────────────────────────────────────────────────────────────────────────────────────────────────

    def some_address(self, choice: int) -> int | None:
        addresses = sorted(self.kernel.mapped)
        return addresses[choice % len(addresses)] if addresses else None

    @rule(choice=small_numbers, tid=st.integers(1, THREADS), write=st.booleans())
    def touch(self, choice: int, tid: int, write: bool) -> None:
        hva = self.some_address(choice)
        if hva is not None and tid not in self.kernel.blocked:
            self.kernel.touch(tid, hva, b"\xee" if write else None)

    def some_range(self, choice: int, count: int) -> tuple[int, int] | None:
        """Start and end of up to `count` adjacent pages."""
        start = self.some_address(choice)
        if start is None:
            return None
        end, size = start, self.kernel.mapped[start].size
        while end in self.kernel.mapped and end < start + count * size:
            end += size
        return start, end

    @rule(choice=small_numbers, count=st.integers(1, 12), lazy=st.integers(0, 70))
    def remove(self, choice: int, count: int, lazy: int) -> None:
        if part := self.some_range(choice, count):
            self.kernel.lazy_changes = lazy
            self.kernel.remove(*part)

    @rule(choice=small_numbers, count=st.integers(1, 4))
    def unmap(self, choice: int, count: int) -> None:
        if part := self.some_range(choice, count):
            self.kernel.unmap(*part)

    @rule(choice=small_numbers, count=st.integers(1, 12), tid=st.integers(0, THREADS))
    def remap(self, choice: int, count: int, tid: int) -> None:
        """Thread `tid` is at the new place before the event is read."""
        if part := self.some_range(choice, count):
            self.kernel.remap(part[0], self.next_free, part[1] - part[0])
            if tid and tid not in self.kernel.blocked:
                self.kernel.touch(tid, self.next_free)
            self.next_free += 1 << 30

    @rule(choice=small_numbers, waited_for=st.booleans())
    def populate_behind(self, choice: int, waited_for: bool) -> None:
        """Shared memory gets content past the userfaultfd, and who waits for it is not woken."""
        hva = self.some_address(choice)
        waits = sorted(w.hva for w in self.kernel.blocked.values() if w.hva in self.kernel.mapped)
        if waited_for and waits:
            hva = waits[choice % len(waits)]
        if (
            hva is not None
            and self.kernel.mapped[hva].content is None
            and not self.kernel.mapped[hva].removing
        ):
            page = self.kernel.mapped[hva]
            page.content = page.expected = b"\xdd" * page.size

    @rule(choice=small_numbers, count=st.integers(1, 12))
    def split(self, choice: int, count: int) -> None:
        if part := self.some_range(choice, count):
            self.kernel.split(*part)

    @rule(installs=st.integers(1, 8))
    def memory_is_short(self, installs: int) -> None:
        self.kernel.short_for = installs

    @rule(pages=st.integers(0, 3))
    def cut_installs(self, pages: int) -> None:
        self.kernel.most_pages = pages

    @rule()
    def changes_finish(self) -> None:
        self.kernel.finish_changes()

    # ── the session ──────────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def drain(self) -> None:
        self.signals |= self.pager.drain()

    @rule()
    def retry(self) -> None:
        self.signals = self.signals & ~Signal.STALLED | self.pager.retry()

    @rule()
    def ask_for_demand(self) -> None:
        if body := self.pager.encode_demand():
            self.source.take(Lane.DEMAND, body)

    @rule(want=st.integers(1, 40), run=st.integers(1, 20))
    def ask_for_bulk(self, want: int, run: int) -> None:
        body, claimed = self.pager.encode_bulk(want * SMALL, run * SMALL)
        assert bool(body) == bool(claimed)
        if body:
            taken = self.source.take(Lane.BULK, body)
            assert sum(o.len_bytes for o in taken) == claimed

    @rule(lane=lanes)
    def stream_breaks(self, lane: Lane) -> None:
        self.source.forget(lane)
        self.pager.reset_lane(lane)
        self.signals |= Signal.STALLED  # "call pager_retry when there is another"

    @rule(calls=st.integers(1, 40))
    def will_die(self, calls: int) -> None:
        """The process dies in the middle of a later step, at a call into the kernel."""
        self.kernel.calls_to_live = calls

    def remember_state(self) -> None:
        self.remembered = bytes(ffi.buffer(self.state.memory))

    @invariant()
    def bury(self) -> None:
        """What happened after the death did not: a new process finds the state as it was."""
        if not hasattr(self, "kernel") or not self.kernel.dead:
            return
        ffi.buffer(self.state.memory)[:] = self.remembered
        self.kernel.revive()
        self.pager.close()
        for lane in Lane:
            self.source.forget(lane)
        self.source.answered.clear()
        self.pager = Pager.adopt(self.state, 0, edge=self.kernel.edge)
        self.pager.set_source_limits(range_bytes=8 * LARGE, ranges=1024)

    # ── both, as most of the time ────────────────────────────────────────────────────────────────────────────────

    @rule(
        choices=st.lists(small_numbers, min_size=1, max_size=THREADS),
        write=st.booleans(),
        pages=st.integers(1, 20),
    )
    def threads_are_served(self, choices: list[int], write: bool, pages: int) -> None:
        for tid, choice in enumerate(choices, 1):
            self.touch(choice, tid, write)
        self.signals |= self.pager.drain()
        self.ask_for_demand()
        self.answer(Lane.DEMAND, choices[0], pages, 4)

    @rule(want=st.integers(1, 40), run=st.integers(2, 20), index=small_numbers, pages=st.integers(2, 20))
    def the_push_goes_on(self, want: int, run: int, index: int, pages: int) -> None:
        self.ask_for_bulk(want, run)
        self.answer(Lane.BULK, index, pages, 4)
        self.signals |= self.pager.drain()

    @rule(tid=st.integers(1, THREADS), choice=small_numbers, count=st.integers(1, 12), index=small_numbers)
    def a_removal_meets_its_reply(self, tid: int, choice: int, count: int, index: int) -> None:
        self.touch(choice, tid, False)
        self.signals |= self.pager.drain()
        self.ask_for_demand()
        self.remove(choice, count, 3)
        self.answer(Lane.DEMAND, index, 20, 4)

    # ── the source ───────────────────────────────────────────────────────────────────────────────────────────────

    def has_outstanding(self) -> bool:
        return hasattr(self, "source") and not self.source.is_idle()

    @rule(lane=lanes, index=small_numbers, pages=st.integers(1, 20), times=st.integers(1, 4))
    def answer(self, lane: Lane, index: int, pages: int, times: int) -> None:
        runs = []
        while times and self.source.outstanding[lane]:
            runs.append(self.source.piece(lane, index, pages))
            times -= 1
        assert self.pager.feed(reply(*runs))

    @precondition(has_outstanding)
    @rule(
        lane=lanes,
        index=small_numbers,
        pages=st.integers(1, 20),
        wrong=st.sampled_from(["checksum", "place", "byte", "id", "long", "length", "short data", "empty"]),
    )
    def answer_wrong(self, lane: Lane, index: int, pages: int, wrong: str) -> None:
        if not self.source.outstanding[lane]:
            return
        run = self.source.piece(lane, index, pages)
        if wrong == "checksum":
            run.xxh3_64 ^= 1
            run.data = run.data or bytes(run.length)
        elif wrong == "place":
            run = run_of(run.request_id, run.offset + SMALL, run.data or bytes(run.length))
        elif wrong == "byte":
            run.data = b"\x55" + (run.data or bytes(run.length))[1:]
        elif wrong == "id":
            run.request_id += 1 << 30
        elif wrong == "long":
            run.length += LARGE
        elif wrong == "length":
            run.length -= 1
        elif wrong == "short data":
            run.data = (run.data or b"\x01" * run.length)[:-1]
        else:
            run.length = 0
        if wrong not in ("checksum", "byte"):
            self.source.give_up(
                run.request_id
            )  # the pager drops a range whose runs do not fit; the rest is stale
        before = self.pager.stats().bad_replies
        self.pager.feed(reply(run))
        if not self.kernel.dead:
            assert self.pager.stats().bad_replies == before + 1
        if wrong == "id":
            self.stream_breaks(lane)  # nobody else would ever answer the range that was meant

    @precondition(lambda self: bool(getattr(self, "source", None) and self.source.answered))
    @rule(choice=small_numbers)
    def answer_again(self, choice: int) -> None:
        past = self.source.answered[choice % len(self.source.answered)]
        before = self.pager.stats().bad_replies
        assert self.pager.feed(reply(run_of(past, 0, b"\x66" * LARGE)))
        assert self.pager.stats().bad_replies == before

    @rule(rubbish=st.binary(max_size=40))
    def rubbish(self, rubbish: bytes) -> None:
        self.pager.feed(rubbish)

    # ── promises ─────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def nothing_wrong_was_installed_or_seen(self) -> None:
        if hasattr(self, "kernel"):
            assert not self.kernel.breaches, self.kernel.breaches

    @invariant()
    def counts_add_up(self) -> None:
        if not hasattr(self, "pager") or self.kernel.dead:
            return
        s = self.pager.stats()
        assert s.missing + s.requested + s.present + s.zero == s.pages == len(self.every_page)
        assert max(s.faults, s.demand, s.pushed, s.removed, s.waiting) < 1 << 40
        assert self.pager.bulk_inflight_bytes == sum(o.len_bytes for o in self.source.outstanding[Lane.BULK])
        assert self.pager.demand_inflight == len(self.source.outstanding[Lane.DEMAND])
        if self.pager.is_complete():
            assert s.missing == s.requested == s.waiting == 0
            self.every_page_is_in_place_or_zero_by_right()

    def every_page_is_in_place_or_zero_by_right(self) -> None:
        for page in self.kernel.mapped.values():
            gone_by_right = not any(page.expected) or page.removing or self.kernel.unread
            assert page.content is not None or gone_by_right, f"page {page.number} is owed"

    def everybody_behaves_again(self) -> None:
        """And then all is settled, in a bounded number of steps."""
        self.kernel.short_for = 0
        self.kernel.most_pages = 0
        self.kernel.calls_to_live = -1
        for _ in range(30):
            self.kernel.lazy_changes = 0
            self.drain()
            self.kernel.finish_changes()
            if self.signals & Signal.STALLED:
                # As the demultiplexer does: nothing is tried again that was not announced.
                self.drain()
                self.retry()
            self.honest_round()
            self.signals |= self.pager.take_signals()
            if self.pager.is_complete() and not self.kernel.blocked and not self.kernel.unread:
                break
        assert self.pager.is_complete()
        assert not self.kernel.blocked, "a thread waits for ever"
        self.nothing_wrong_was_installed_or_seen()
        self.counts_add_up()
        self.pager.release()

    def honest_round(self) -> None:
        while body := self.pager.encode_demand():
            self.source.take(Lane.DEMAND, body)
        body, _ = self.pager.encode_bulk(1 << 20, 8 * LARGE)
        if body:
            self.source.take(Lane.BULK, body)
        for lane in Lane:
            while self.source.outstanding[lane]:
                assert self.pager.feed(reply(self.source.piece(lane, 0, 1 << 20)))


TestPagerModel = PagerModel.TestCase
TestPagerModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
