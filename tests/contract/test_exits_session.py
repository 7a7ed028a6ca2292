"""What a session makes of faults that come as exits, beside those that come as messages."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from exit_vmm import RESOLVED, STATE_AT, WAKE, ExitGuest, RingMemory
from harness import TRANSPORTS, LocalDaemon, content_of, local_daemon
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE
from postcopyd.v1 import page_source_pb2 as pb
from scripted_source import ScriptedSource, Send

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from postcopyd.status import MigrationStatus

PAGES = 4096
CONTENT = content_of(PAGES)
VCPUS = 3
# A byte a second: one piece is pushed, from the beginning of memory.
HELD = Limits(push_rate=1)
FAR = 3000


def page_of(page: int) -> bytes:
    return CONTENT[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


class HeldSource(ScriptedSource):
    """Answers what is asked of it only for pages that were let go."""

    def __init__(self) -> None:
        super().__init__(CONTENT)
        self.script = self._held
        self._let_go: dict[int, asyncio.Event] = {}

    def hold(self, *pages: int) -> None:
        for page in pages:
            self._let_go[page] = asyncio.Event()

    def let_go(self, page: int) -> None:
        self._let_go[page].set()

    async def _held(self, asked: pb.Range, send: Send) -> None:
        for page, event in self._let_go.items():
            if asked.offset <= page * PAGE_SIZE < asked.offset + asked.length:
                await event.wait()
        await self.right(asked, send)

    def asked_for(self, page: int) -> int:
        """How often the page was asked for because somebody waits."""
        return sum(
            asked.offset <= page * PAGE_SIZE < asked.offset + asked.length
            for asked in self.asked
            if asked.priority == pb.PRIORITY_DEMAND
        )


@dataclass
class Setting:
    source: HeldSource
    daemon: LocalDaemon
    guest: ExitGuest

    async def until(self, wanted: Callable[[MigrationStatus], bool]) -> MigrationStatus:
        return await self.daemon.until("vm", wanted)


@asynccontextmanager
async def migration(transport: str = "native", *held: int) -> AsyncIterator[Setting]:
    """A session with a ring, whose push waits and whose source holds back these pages."""
    async with HeldSource() as source, local_daemon(transport=transport) as daemon:
        source.hold(*held)
        prepared = await daemon.prepare("vm", source.address, limits=HELD)
        async with ExitGuest(len(CONTENT), RingMemory(VCPUS, PAGES)) as guest:
            assert await guest.hand_off_with_ring(prepared.socket_path) == b"\x01"
            await daemon.until_state("vm", State.RUNNING)
            yield Setting(source, daemon, guest)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_exit_and_a_message_for_one_page_are_one_request_and_two_wakes(transport: str) -> None:
    async with migration(transport, FAR) as on:
        on.guest.ring.post(1, [on.guest.gpa_of(FAR)])
        reading = on.guest.reading(FAR * PAGE_SIZE)
        both = await on.until(lambda status: status.waiting == 2)
        assert (both.exits, both.faults) == (1, 1)
        assert on.guest.ring.answered(1) == 0
        on.source.let_go(FAR)
        assert await on.guest.answers(1) == [RESOLVED]
        assert await reading == page_of(FAR)
        assert on.source.asked_for(FAR) == 1
        done = await on.until(lambda status: status.waiting == 0)
        assert done.pages_demand >= 1


async def test_two_vcpus_that_want_one_page_are_one_request_and_two_wakes() -> None:
    async with migration("native", FAR) as on:
        for vcpu in (0, 2):
            on.guest.ring.post(vcpu, [on.guest.gpa_of(FAR)])
        await on.until(lambda status: status.waiting == 2)
        on.source.let_go(FAR)
        assert [await on.guest.answers(vcpu) for vcpu in (0, 2)] == [[RESOLVED], [RESOLVED]]
        assert on.source.asked_for(FAR) == 1


async def test_a_vcpu_that_waits_for_several_pages_is_woken_with_the_last() -> None:
    wanted = [FAR, FAR + 100, FAR + 200]
    async with migration("native", FAR + 100) as on:
        ring = on.guest.ring
        before = ring.get(ring.lane(0, WAKE))
        ring.post(0, [on.guest.gpa_of(page) for page in wanted])
        # The source answers in order, so what comes behind the held page waits with it.
        await on.until(lambda status: status.exits == 3 and status.waiting == 2)
        assert ring.answered(0) == 1
        assert ring.get(ring.lane(0, WAKE)) == before
        on.source.let_go(FAR + 100)
        assert await on.guest.answers(0) == [RESOLVED] * 3
        assert ring.get(ring.lane(0, WAKE)) == before + 1
        assert [await on.guest.reading(page * PAGE_SIZE) for page in wanted] == [page_of(p) for p in wanted]


async def test_a_page_that_is_there_is_answered_without_asking_anybody() -> None:
    async with migration() as on:
        assert await on.guest.reading(FAR * PAGE_SIZE) == page_of(FAR)
        on.guest.ring.post(0, [on.guest.gpa_of(FAR)])
        assert await on.guest.answers(0) == [RESOLVED]
        assert on.source.asked_for(FAR) == 1
        assert await on.guest.reading(FAR * PAGE_SIZE) == page_of(FAR)


async def test_residency_is_set_with_the_answer_and_cleared_by_a_balloon() -> None:
    async with migration() as on:
        ring = on.guest.ring
        assert not ring.is_resident(FAR)
        ring.post(0, [on.guest.gpa_of(FAR)])
        assert await on.guest.answers(0) == [RESOLVED]
        assert ring.is_resident(FAR)
        assert not ring.is_resident(FAR + 1)
        await on.guest.discard(FAR * PAGE_SIZE, PAGE_SIZE)
        assert not ring.is_resident(FAR)
        ring.post(0, [on.guest.gpa_of(FAR)])
        assert await on.guest.answers(0) == [RESOLVED]
        assert ring.is_resident(FAR)
        assert await on.guest.reading(FAR * PAGE_SIZE) == bytes(PAGE_SIZE)
        assert on.source.asked_for(FAR) == 1


async def test_block_time_tells_vcpus_from_other_threads() -> None:
    async with migration("native", FAR, FAR + 1) as on:
        on.guest.ring.post(2, [on.guest.gpa_of(FAR), on.guest.gpa_of(FAR + 1)])
        reading = on.guest.reading(FAR * PAGE_SIZE)
        await on.until(lambda status: status.waiting == 3)
        on.source.let_go(FAR)
        on.source.let_go(FAR + 1)
        await on.guest.answers(2)
        await reading
        status = await on.until(lambda status: status.waiting == 0)
    vcpus = [thread for thread in status.blocktime if thread.is_vcpu]
    others = [thread for thread in status.blocktime if not thread.is_vcpu]
    assert [(thread.tid, thread.faults) for thread in vcpus] == [(2, 2)]
    assert [thread.faults for thread in others] == [1]
    assert others[0].tid > VCPUS
    assert min(thread.blocktime_us for thread in status.blocktime) > 0
    assert status.fault_latency_us.count == 3


async def test_the_pinned_set_is_fetched_before_anybody_waits_for_it() -> None:
    async with HeldSource() as source, local_daemon() as daemon:
        prepared = await daemon.prepare("vm", source.address, limits=HELD)
        async with ExitGuest(len(CONTENT), RingMemory(VCPUS, PAGES)) as guest:
            pinned = [{"gpa": guest.gpa_of(FAR), "size": 2 * PAGE_SIZE}]
            await guest.hand_off_with_ring(prepared.socket_path, pinned=pinned)
            await daemon.until("vm", lambda status: status.pages_demand >= 2)
            assert [source.asked_for(FAR + i) for i in range(3)] == [1, 1, 0]
            assert guest.ring.is_resident(FAR + 1)


async def test_completion_says_so_in_the_ring_and_wakes_every_vcpu() -> None:
    async with migration() as on:
        ring = on.guest.ring
        before = [ring.get(ring.lane(vcpu, WAKE)) for vcpu in range(VCPUS)]
        await on.daemon.manager.set_limits("vm", Limits())
        await on.until(lambda status: status.state is State.COMPLETE)
        assert ring.get(STATE_AT) == 1
        assert [ring.get(ring.lane(vcpu, WAKE)) for vcpu in range(VCPUS)] == [word + 1 for word in before]
        assert all(ring.is_resident(page) for page in range(PAGES))
