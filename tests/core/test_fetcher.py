"""What the fetcher asks for, and when: over a source of numbers, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest

from postcopyd import fetcher as module
from postcopyd.errors import Code, SourceError
from postcopyd.fetcher import RUN_BYTES, Fetcher
from postcopyd.pacing import Shares
from postcopyd.status import Limits
from postcopyd.transport import ImageInfo
from virtual_time import run_in_virtual_time

if TYPE_CHECKING:
    from postcopyd.pager import Lane, Pager
    from postcopyd.transport import PageStream, PageTransport, ReplySink

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
WINDOW = 2 * MIB
LATENCY_S = 0.001
IMAGE = ImageInfo("vm", 7, 1 << 40, 4096, MIB, 1 << 30, False)


@dataclass
class Stats:
    present: int
    zero: int


@dataclass
class Numbers:
    """A pager that only counts: `left` bytes are missing, of which the first `zero` carry no data."""

    left: int
    zero: int = 0
    bulk_inflight_bytes: int = 0
    bulk_bytes_received: int = 0
    demand_inflight: int = 0
    wanted: list[bytes] = field(default_factory=list)
    settled: int = 0

    @property
    def missing(self) -> int:
        return self.left // PAGE

    def set_source_limits(self, *, range_bytes: int, ranges: int) -> None:
        pass

    def stats(self) -> Stats:
        return Stats(self.settled, 0)

    def encode_demand(self) -> bytes:
        if not self.wanted:
            return b""
        self.demand_inflight += 1
        return self.wanted.pop()

    def encode_bulk(self, want_bytes: int, run_bytes: int) -> tuple[bytes, int]:
        claimed = min(want_bytes, self.left)
        self.left -= claimed
        self.bulk_inflight_bytes += claimed
        return b"%d" % claimed, claimed

    def answer_bulk(self, claimed: int) -> None:
        self.bulk_inflight_bytes -= claimed
        self.settled += claimed // PAGE
        zero = min(self.zero, claimed)
        self.zero -= zero
        self.bulk_bytes_received += claimed - zero

    def reset_lane(self, lane: Lane) -> None:
        self.left += self.bulk_inflight_bytes
        self.bulk_inflight_bytes = 0
        self.demand_inflight = 0


@dataclass
class Stream:
    """Answers everything after LATENCY_S, if it answers."""

    source: Source
    sink: ReplySink
    is_demand: bool
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def send(self, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.source.sent.append((loop.time(), self.is_demand, 0 if self.is_demand else int(message)))
        if self.source.answers:
            loop.call_later(LATENCY_S, self._answer, message)

    def _answer(self, message: bytes) -> None:
        if self.is_demand:
            self.source.pager.demand_inflight -= 1
        else:
            self.source.pager.answer_bulk(int(message))
        self.sink.fed()

    async def wait_closed(self) -> None:
        await asyncio.shield(self.ended)

    async def close(self) -> None:
        pass


@dataclass
class Source:
    """A page source and its transport. `sent`: (time, is demand, push bytes) of every request."""

    pager: Numbers
    answers: bool = True
    refuses: bool = False
    name: str = "numbers"
    target: str = ""
    sent: list[tuple[float, bool, int]] = field(default_factory=list)
    tried_at: list[tuple[float, str]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    def __call__(self, target: str) -> PageTransport:
        self.target = target
        return cast("PageTransport", self)

    async def describe(self, image_id: str) -> ImageInfo:
        self.tried_at.append((asyncio.get_running_loop().time(), self.target))
        if self.refuses:
            raise SourceError(Code.SOURCE_UNREACHABLE, "refuses")
        return IMAGE

    async def holes(self, image_id: str, epoch: int) -> AsyncIterator[Sequence[tuple[int, int]]]:
        assert not image_id, "this image has none"
        yield ()

    async def open_stream(self, opening: bytes, sink: ReplySink, *, demand: bool) -> PageStream:
        self.streams.append(Stream(self, sink, demand))
        return cast("PageStream", self.streams[-1])

    async def complete(self, image_id: str, epoch: int, pages_installed: int, pages_zero: int) -> bool:
        return True

    async def close(self) -> None:
        pass

    def push_bytes(self) -> int:
        return sum(len_bytes for _, _, len_bytes in self.sent)


class Session:
    """The listener, and the sink of both lanes."""

    native = (0, 0)

    def __init__(self) -> None:
        self.lost: list[Code] = []
        self.fetcher: Fetcher | None = None

    def on_source_up(self, target: str, transport: str) -> None: ...

    def on_source_lost(self, error: SourceError) -> None:
        self.lost.append(error.code)

    def on_source_ready(self) -> None:
        assert self.fetcher is not None
        self.fetcher.pump_demand()
        self.fetcher.pump_push()

    def feed(self, message: bytes) -> None: ...

    def fed(self) -> None:
        assert self.fetcher is not None
        self.fetcher.on_answered()


Story = Callable[[Fetcher, Source, Session], Coroutine[Any, Any, None]]


def play(
    story: Story, pager: Numbers, *, rate: int = 0, sources: Sequence[str] = ("a",), **source: Any
) -> Source:
    """Run a fetcher over a source for as long as `story` lasts."""

    async def main() -> Source:
        made = Source(pager, **source)
        session = Session()
        session.fetcher = Fetcher(
            cast("Pager", pager),
            IMAGE,
            sources,
            made,
            session,
            run_align=PAGE,
            limits=Limits(push_rate=rate),
            share=Shares(WINDOW, WINDOW).join(100),
            silent_after_s=10.0,
        )
        running = asyncio.ensure_future(session.fetcher.run(session))
        try:
            await story(session.fetcher, made, session)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return made

    return run_in_virtual_time(main())


def for_seconds(duration_s: float) -> Story:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(duration_s)

    return story


@pytest.mark.parametrize("rate", [64 * KIB, MIB, 10 * MIB, 100 * MIB])
def test_the_push_keeps_its_rate_at_every_moment_and_uses_it(rate: int) -> None:
    source = play(for_seconds(10), Numbers(left=1 << 40), rate=rate)
    began, total = source.sent[0][0], 0
    for at, _, len_bytes in source.sent:
        total += len_bytes
        assert total <= rate * (at - began) + rate * 0.05 + RUN_BYTES
    assert total >= rate * 9.5


def test_zero_runs_cost_nothing_of_the_rate() -> None:
    """100 MiB of zeros are asked for within the first seconds of a rate of 1 MiB/s, as no data comes for them."""
    source = play(for_seconds(5), Numbers(left=1 << 40, zero=100 * MIB), rate=MIB)
    assert source.pager.zero == 0
    assert source.pager.bulk_bytes_received <= 5 * MIB + RUN_BYTES


def test_what_is_outstanding_never_exceeds_the_window() -> None:
    source = play(for_seconds(5), Numbers(left=1 << 40), answers=False)
    assert source.push_bytes() == WINDOW


def test_the_push_is_asked_for_half_a_window_at_a_time() -> None:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(1)
        bulk = source.streams[1]
        for number in range(1, 3 * WINDOW // RUN_BYTES):
            source.pager.answer_bulk(RUN_BYTES)
            bulk.sink.fed()
            rounds = number * RUN_BYTES // (WINDOW // 2)
            assert source.push_bytes() == WINDOW + rounds * WINDOW // 2
        assert len(source.sent) == 1 + rounds, "a request for each half"

    play(story, Numbers(left=1 << 40), answers=False)


def test_demand_goes_out_at_once_whatever_the_push_may_do() -> None:
    asked_at = []

    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        for _ in range(50):
            await asyncio.sleep(0.1)
            asked_at.append(asyncio.get_running_loop().time())
            source.pager.wanted.append(b"x")
            fetcher.pump_demand()

    source = play(story, Numbers(left=1 << 40), rate=1)
    assert [at for at, is_demand, _ in source.sent if is_demand] == asked_at
    assert source.push_bytes() == RUN_BYTES


def test_a_new_rate_counts_at_once_even_in_a_pause_of_days() -> None:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(1)
        assert source.push_bytes() == RUN_BYTES
        fetcher.set_limits(Limits(push_rate=0))
        await asyncio.sleep(1)

    source = play(story, Numbers(left=100 * MIB), rate=1)
    assert source.pager.settled == 100 * MIB // PAGE


def test_limits_that_are_set_again_and_again_buy_nothing() -> None:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        for _ in range(100):
            await asyncio.sleep(0.01)
            fetcher.set_limits(Limits(push_rate=MIB))

    source = play(story, Numbers(left=1 << 40), rate=MIB, answers=False)
    assert source.push_bytes() <= WINDOW


def test_a_held_push_asks_for_nothing_and_then_goes_on() -> None:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(0.1)
        fetcher.hold_push(True)
        await asyncio.sleep(1)
        before = source.push_bytes()
        await asyncio.sleep(10)
        assert source.push_bytes() == before
        fetcher.hold_push(False)
        await asyncio.sleep(0.1)
        assert source.push_bytes() > before

    play(story, Numbers(left=1 << 40))


def test_a_source_that_refuses_is_tried_less_and_less_often() -> None:
    source = play(for_seconds(60), Numbers(left=MIB), refuses=True)
    times = [at for at, _ in source.tried_at]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] <= module.BACKOFF_FIRST_S * 2
    assert max(pauses) <= module.BACKOFF_MAX_S
    assert min(pauses[8:]) >= module.BACKOFF_MAX_S / 2


def test_all_sources_are_tried_in_turn_before_the_pause_grows() -> None:
    source = play(for_seconds(0.2), Numbers(left=MIB), refuses=True, sources=("a", "b", "c"))
    assert [target for _, target in source.tried_at][:4] == ["a", "b", "c", "a"]
    assert source.tried_at[2][0] <= 2 * module.BACKOFF_FIRST_S


def test_a_source_that_takes_requests_and_brings_nothing_is_given_up_less_and_less_often() -> None:
    lost: list[Code] = []

    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(60)
        lost.extend(session.lost)

    source = play(story, Numbers(left=1 << 40), answers=False)
    # Each takes silent_after_s to be noticed, and a pause besides.
    assert set(lost) == {Code.SOURCE_SILENT}
    assert 4 <= len(source.tried_at) <= 6


def test_a_slow_source_that_keeps_answering_is_not_silent() -> None:
    """Each window takes longer than silent_after_s in all, and no piece of it does."""

    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(1)
        bulk = source.streams[1]
        for _ in range(20):
            await asyncio.sleep(6)
            source.pager.answer_bulk(PAGE)
            bulk.sink.fed()
        assert session.lost == []

    play(story, Numbers(left=WINDOW), answers=False)


def test_a_demand_that_is_not_answered_is_noticed_while_the_push_flows() -> None:
    async def story(fetcher: Fetcher, source: Source, session: Session) -> None:
        await asyncio.sleep(1)
        source.pager.wanted.append(b"x")
        fetcher.pump_demand()
        source.pager.demand_inflight += 1  # one more than will be answered
        await asyncio.sleep(25)
        assert session.lost == [Code.SOURCE_SILENT]

    play(story, Numbers(left=1 << 40), rate=MIB)
