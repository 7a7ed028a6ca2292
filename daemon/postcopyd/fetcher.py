"""Gets pages from the source: demand at once, the rest in the background, again when the source is back.

Demand and push have a connection each, so a demand page never queues behind the push. The push is bounded by a
window of outstanding bytes and, if limited, by a token bucket; demand is bounded only by the number of threads that
can wait.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from .errors import Code, SourceError
from .pacing import Share, TokenBucket, Window
from .pager import REQUEST_BYTES, Lane, Pager
from .units import KIB, MIB
from .v1 import page_source_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .status import Limits
    from .transport import ImageInfo, PageStream, PageTransport, ReplySink, TransportFactory

log = structlog.get_logger(__name__)

RUN_BYTES = 64 * KIB
"""The push asks, and its replies are installed, in pieces of this: whoever waits, waits for one at most."""

TOTAL_WINDOW_BYTES = 16 * MIB
"""Outstanding push bytes of all migrations of a daemon."""

RANGES_UNSAID = 1024
"""Outstanding on a stream of a source that does not say how many it takes."""

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0


class FetcherListener(Protocol):
    """What a session wants to know of its fetcher."""

    def on_source_up(self, target: str, transport: str) -> None: ...

    def on_source_lost(self, error: SourceError) -> None: ...

    def on_source_ready(self) -> None:
        """Streams are open, or holes are known: everything that is owed is to be asked for again."""


class LaneSink:
    """The sink of one lane's stream: passes everything on, and counts, as only one lane may have gone silent."""

    def __init__(self, sink: ReplySink) -> None:
        self.native = sink.native
        self.feed = sink.feed
        self.batches = 0
        self._fed = sink.fed

    def fed(self) -> None:
        self.batches += 1
        self._fed()


@dataclass
class Link:
    """An open connection: where requests go now."""

    transport: PageTransport
    demand: PageStream
    bulk: PageStream
    demand_sink: LaneSink
    bulk_sink: LaneSink
    failed: asyncio.Future[None]
    settled_before: int


class Fetcher:
    """Fetches the pages of `pager` from one of `sources`, tried in order.

    Args:
        image: the image as the first source described it; every later source must serve the same.
        run_align: the largest page size of the guest's memory, bytes.
        silent_after_s: a lane with requests outstanding and nothing heard for so long means that the source is lost.
    """

    def __init__(
        self,
        pager: Pager,
        image: ImageInfo,
        sources: Sequence[str],
        factory: TransportFactory,
        listener: FetcherListener,
        *,
        run_align: int,
        limits: Limits,
        share: Share,
        silent_after_s: float = 10.0,
    ) -> None:
        self._pager = pager
        self._image = image
        self._sources = tuple(sources)
        self._factory = factory
        self._listener = listener
        self._run_align = run_align
        self._run_bytes = max(RUN_BYTES, run_align)
        self._share = share
        self._window = Window(self._run_bytes)
        self._bucket = TokenBucket(limits.push_rate)
        self._silent_after_s = silent_after_s
        self._link: Link | None = None
        self._held = False
        self._holes_known = False
        self._push_timer: asyncio.TimerHandle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._charged = 0
        self._unused = 0
        self._received_before = pager.bulk_bytes_received
        self._loop = asyncio.get_running_loop()

    def set_limits(self, limits: Limits) -> None:
        """Take a new push rate and weight at once."""
        self._share.weight = limits.weight
        self._refund()
        self._bucket = TokenBucket(limits.push_rate)
        # What is on its way counts at the new rate, so that its refund finds what it gives back.
        self._bucket.spend(self._pager.bulk_inflight_bytes)
        # The old rate may have asked for a pause of hours.
        self._push_again()

    def hold_push(self, held: bool) -> None:
        """Stop the push, for memory is short; or let it go on."""
        self._held = held
        self.pump_push()

    async def run(self, sink: ReplySink) -> None:
        """Serve until cancelled, over as many connections as it takes."""
        failures = 0
        index = 0
        try:
            while True:
                target = self._sources[index % len(self._sources)]
                try:
                    await self._serve(target, sink)
                except SourceError as error:
                    failures = 0 if self._lose_link() else failures + 1
                    self._listener.on_source_lost(error)
                    index += 1
                    # A whole round of sources failed before it waits longer.
                    await asyncio.sleep(self._backoff_s(failures // len(self._sources)))
        finally:
            self._cancel_timers()

    @staticmethod
    def _backoff_s(failures: int) -> float:
        longest: float = min(BACKOFF_FIRST_S * 2 ** min(failures, 10), BACKOFF_MAX_S)
        return longest * random.uniform(0.5, 1.0)

    async def complete(self, pages_installed: int, pages_zero: int) -> bool:
        """Tell the source in use that every page is here; True if it let go. Raises SourceError."""
        if self._link is None:
            raise SourceError(Code.SOURCE_UNREACHABLE, "no page source is connected")
        return await self._link.transport.complete(
            self._image.image_id, self._image.epoch, pages_installed, pages_zero
        )

    async def _serve(self, target: str, sink: ReplySink) -> None:
        transport = self._factory(target)
        try:
            described = await transport.describe(self._image.image_id)
            self._check_identity(target, described)
            self._pager.set_source_limits(
                range_bytes=described.max_range_bytes or MIB, ranges=described.max_ranges or RANGES_UNSAID
            )
            opening = self._opening()
            demand_sink, bulk_sink = LaneSink(sink), LaneSink(sink)
            link = Link(
                transport,
                demand=await transport.open_stream(opening, demand_sink, demand=True),
                bulk=await transport.open_stream(opening, bulk_sink, demand=False),
                demand_sink=demand_sink,
                bulk_sink=bulk_sink,
                failed=self._loop.create_future(),
                settled_before=self._settled(),
            )
            # Streams may end in the same moment, and then nobody asks for it.
            link.failed.add_done_callback(lambda failed: failed.cancelled() or failed.exception())
            self._link = link
            self._listener.on_source_up(target, transport.name)
            self._listener.on_source_ready()
            await self._until_closed(link)
        finally:
            await transport.close()

    async def _until_closed(self, link: Link) -> None:
        """Raise the SourceError of whatever ends first."""
        holes = asyncio.ensure_future(self._learn_holes(link.transport))
        demand = asyncio.ensure_future(link.demand.wait_closed())
        bulk = asyncio.ensure_future(link.bulk.wait_closed())
        pending: set[asyncio.Future[None]] = {holes, demand, bulk, link.failed}
        try:
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
                if done != {holes}:
                    raise SourceError(
                        Code.SOURCE_CLOSED, f"page source {link.transport.target} ended a stream"
                    )
        finally:
            for task in (holes, demand, bulk):
                task.cancel()
            await asyncio.gather(holes, demand, bulk, return_exceptions=True)

    async def _learn_holes(self, transport: PageTransport) -> None:
        """Mark the holes as zero while the push goes on, which may take long to get there."""
        if not self._image.has_holes or self._holes_known:
            return
        try:
            await self._mark_holes(transport)
        except SourceError as error:
            # Zero pages are then found as they are asked for; if the source is lost its streams say so.
            log.warning("source.holes_unknown", source=transport.target, error=str(error))
            return
        self._holes_known = True
        self._listener.on_source_ready()

    async def _mark_holes(self, transport: PageTransport) -> None:
        """They ascend, so that their number has a bound. Raises SourceError."""
        batches = transport.holes(self._image.image_id, self._image.epoch)
        end = 0
        while True:
            try:
                async with asyncio.timeout(self._silent_after_s):
                    batch = await anext(batches, None)
            except TimeoutError:
                raise SourceError(
                    Code.SOURCE_SILENT,
                    f"page source {transport.target} said nothing of its holes for {self._silent_after_s:g} s",
                ) from None
            if batch is None:
                return
            if not batch:
                raise self._bad_holes(transport)
            for offset, len_bytes in batch:
                if offset < end or len_bytes == 0:
                    raise self._bad_holes(transport)
                self._pager.mark_zero(offset, len_bytes)
                end = offset + len_bytes

    @staticmethod
    def _bad_holes(transport: PageTransport) -> SourceError:
        return SourceError(
            Code.SOURCE_BAD_REPLY,
            f"page source {transport.target} sends holes that are empty or do not ascend",
        )

    def _check_identity(self, target: str, image: ImageInfo) -> None:
        if image.epoch != self._image.epoch or image.size_bytes != self._image.size_bytes:
            raise SourceError(
                Code.SOURCE_OTHER_EPOCH,
                f"page source {target} serves epoch {image.epoch:#x} of image {image.image_id!r} "
                f"({image.size_bytes} bytes), this migration needs {self._image.epoch:#x} "
                f"({self._image.size_bytes} bytes); serve the original image again",
            )

    def _opening(self) -> bytes:
        return pb.PageRequest(
            open=pb.Open(
                image_id=self._image.image_id,
                epoch=self._image.epoch,
                run_align=self._run_align,
                max_data_bytes=self._run_bytes,
            )
        ).SerializeToString()

    def _lose_link(self) -> bool:
        """Forget the connection and what it owed; False if it brought nothing, so that a bad source is not hammered."""
        was_useful = self._link is not None and self._settled() > self._link.settled_before
        self._link = None
        self._cancel_timers()
        self._pager.reset_lane(Lane.DEMAND)
        self._pager.reset_lane(Lane.BULK)
        return was_useful

    def _settled(self) -> int:
        stats = self._pager.stats()
        return stats.present + stats.zero

    def _cancel_timers(self) -> None:
        for timer in (self._push_timer, self._silence_timer):
            if timer is not None:
                timer.cancel()
        self._push_timer = self._silence_timer = None

    def distrust(self) -> None:
        """The replies make no sense: drop the connection."""
        if self._link is not None and not self._link.failed.done():
            self._link.failed.set_exception(
                SourceError(
                    Code.SOURCE_BAD_REPLY,
                    f"page source {self._link.transport.target} sends replies that make no sense; reconnecting",
                )
            )

    def on_answered(self) -> None:
        """A batch of replies is through, wanted pages that it left room for are asked: the push may have room, too."""
        self.pump_push()

    def pump_demand(self) -> None:
        """Send the requests that threads wait for."""
        if self._link is None:
            return
        body = self._pager.encode_demand()
        while body:
            self._link.demand.send(body)
            self._watch_silence()
            # What did not fit one message is rare; a second look each time would not be.
            body = self._pager.encode_demand() if len(body) > REQUEST_BYTES // 2 else b""

    def pump_push(self) -> None:
        """Fill the push's window as far as limits allow."""
        link = self._link
        if link is None or self._held:
            return
        if self._bucket.rate and self._refund():
            self._stop_pausing()
        if self._push_timer is not None:
            return
        window = self._window_bytes()
        # Unlimited: half a window at a time, as a request costs both sides the same however much it asks for.
        if not self._bucket.rate and 2 * self._pager.bulk_inflight_bytes > window:
            return
        while (room := window - self._pager.bulk_inflight_bytes) > 0 and self._pager.missing:
            if not self._bucket.may_spend(self._loop.time()):
                self._push_timer = self._loop.call_later(self._bucket.delay_s(), self._push_again)
                return
            # Limited: a piece at a time, so that the rate is kept within a piece.
            want = self._run_bytes if self._bucket.rate else room
            body, claimed = self._pager.encode_bulk(want, min(want, self._run_bytes))
            if not body:
                return
            self._bucket.spend(claimed)
            self._charged += claimed
            link.bulk.send(body)
            self._watch_silence()

    def _window_bytes(self) -> int:
        pager = self._pager
        self._window.note_answers(self._charged - pager.bulk_inflight_bytes, self._received_bytes())
        return self._window.bytes(self._share.window_bytes, demanding=pager.demand_inflight > 0)

    def _received_bytes(self) -> int:
        """Content that this fetcher's push brought."""
        return self._pager.bulk_bytes_received - self._received_before

    def _push_again(self) -> None:
        self._stop_pausing()
        self.pump_push()

    def _stop_pausing(self) -> None:
        if self._push_timer is not None:
            self._push_timer.cancel()
            self._push_timer = None

    def _refund(self) -> bool:
        """Give back what was charged and brought no bytes: zero runs, and requests that were lost. Whether any was."""
        unused = self._charged - self._pager.bulk_inflight_bytes - self._received_bytes()
        returned = unused - self._unused
        self._bucket.give_back(returned)
        self._unused = unused
        return returned > 0

    def _watch_silence(self) -> None:
        if self._silence_timer is None:
            self._silence_timer = self._loop.call_later(
                self._silent_after_s, self._check_silence, self._heard_by_lane()
            )

    def _heard_by_lane(self) -> dict[Lane, int]:
        """For each lane with requests outstanding, how often it was heard."""
        if self._link is None:
            return {}
        outstanding = {}
        if self._pager.demand_inflight:
            outstanding[Lane.DEMAND] = self._link.demand_sink.batches
        if self._pager.bulk_inflight_bytes:
            outstanding[Lane.BULK] = self._link.bulk_sink.batches
        return outstanding

    def _check_silence(self, before: dict[Lane, int]) -> None:
        self._silence_timer = None
        now = self._heard_by_lane()
        if self._link is None or not now:
            return
        silent = [lane for lane, heard in now.items() if before.get(lane) == heard]
        if not silent:
            self._watch_silence()
        elif not self._link.failed.done():
            message = (
                f"page source {self._link.transport.target} left {silent[0].name.lower()} requests unanswered "
                f"for {self._silent_after_s:g} s"
            )
            self._link.failed.set_exception(SourceError(Code.SOURCE_SILENT, message))
