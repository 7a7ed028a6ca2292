"""The I/O of one HTTP/2 connection: an asyncio protocol around postcopyd._native.h2, for client and server.

Reading: the loop writes into the connection's own buffer and one C call handles all of it. A turn of the loop
takes no more than that buffer, so another connection of the same loop is never far behind. What comes in the
background may take a few of them, but before each message whatever somebody waits for goes first (urgency.py).

Writing: one C call fills a block and one write hands it over. The write buffer limits make the transport say
at once whether it kept a part: while it does (`pause_writing`), the block is its own and nothing is produced,
which bounds memory whatever the peer reads.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import cast

import msgspec

from .._native import h2
from ..urgency import Urgency
from .tcp import tune

TLS_SHUTDOWN_S = 0.1
"""For the peer's close_notify: nothing depends on it, as HTTP/2 says by itself where a stream ends."""

YIELDS_MAX = 2
"""How often a piece gives way: once the loop may come back to it before it has handled what it finds ready; more would
let those who wait stop the push."""

BACKGROUND_READS_MAX = 4
"""Buffers that the background takes before whatever else is ready in this loop, and was not waited for, comes."""


class KeepAlive(msgspec.Struct, frozen=True):
    """A PING after `interval_s` without a byte from the peer; `timeout_s` later the peer is given up."""

    interval_s: float = 2.0
    timeout_s: float = 1.5


class Loss(Enum):
    """Why a connection ended."""

    CLOSED = "the peer closed the connection"
    SILENT = "the peer is silent"
    PROTOCOL = "the peer broke the protocol"
    LOCAL = "closed by us"


class H2Connection(asyncio.BufferedProtocol):
    """Moves bytes between a transport and a native connection. Subclasses say what events mean.

    Args:
        native: one end, unused so far.
        keepalive: None leaves a silent peer alone.
        urgent: somebody waits for what comes here.
        background: nobody does.
    """

    def __init__(
        self,
        native: h2.Connection,
        keepalive: KeepAlive | None,
        *,
        urgent: bool = False,
        background: bool = False,
    ) -> None:
        self.native = native
        self._urgent = urgent
        self._background = background
        self._urgency = Urgency.of_running_loop()
        self._watched: int | None = None
        self.loss: Loss | None = None
        self.reason = ""
        self._keepalive = keepalive
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writing_paused = False
        self._reading_held = False
        self._in_turn = False
        self._flush_due = False
        self._slice_due = False
        self._reads = 0
        self._reads_max = BACKGROUND_READS_MAX if background else 1
        self._received_at = 0.0
        self._pinged_at: float | None = None
        self._last_chance = False
        self._lost = self._loop.create_future()

    def on_event(self, event: h2.Event) -> None:
        raise NotImplementedError

    def on_messages(self) -> None:
        """A batch with messages was handled."""

    def on_lost(self) -> None:
        """The connection is gone: `loss` and `reason` say why."""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def wait_lost(self) -> None:
        await asyncio.shield(self._lost)

    def close(self, loss: Loss = Loss.LOCAL, reason: str = "") -> None:
        """Send what can be sent now, and close; idempotent."""
        self._note(loss, reason)
        if self._transport is not None and not self._transport.is_closing():
            len_bytes = 0 if self._writing_paused else self.native.fill()
            if len_bytes > 0:
                self._transport.write(self.native.block[:len_bytes])
            self._transport.close()

    def abort(self, loss: Loss, reason: str = "") -> None:
        self._note(loss, reason)
        if self._transport is not None:
            self._transport.abort()

    def flush_now(self) -> None:
        """For what somebody waits for. Within a batch, the batch's own flush is as early."""
        if not self._in_turn:
            self.flush()

    def flush_soon(self) -> None:
        """Have everything that is queued in this turn of the loop written at once."""
        if not self._flush_due and not self._in_turn:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def hold_reading(self, held: bool) -> None:
        """Take nothing from the peer until released: what it sends stays with it."""
        if held == self._reading_held:
            return
        self._reading_held = held
        if self._transport is None or self._transport.is_closing():
            return
        if held:
            self._transport.pause_reading()
        elif not self._slice_due:
            self._transport.resume_reading()

    def flush(self) -> None:
        """Write the next block, unless the transport still has the last one."""
        self._flush_due = False
        if self._transport is None or self._writing_paused:
            return
        native = self.native
        len_bytes = native.fill()
        if len_bytes > 0:
            self._transport.write(native.block[:len_bytes])
        if native.attention[0]:
            self._attend()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface, but are no subclass.
        self._transport = transport = cast("asyncio.Transport", transport)
        tune(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.abort(Loss.PROTOCOL, "the peer does not offer HTTP/2 (ALPN h2)")
            return
        # Pause as soon as one byte stays behind. Over TLS, uvloop and asyncio pause at `size >= high`,
        # otherwise at `size > high`; 0 over TLS would pause with nothing to wait for.
        transport.set_write_buffer_limits(high=1 if tls is not None else 0, low=0)
        self._received_at = self._loop.time()
        if self._urgent:
            self._watched = self._urgency.watch(transport.get_extra_info("socket").fileno())
        if self._keepalive is not None:
            self._timer = self._loop.call_later(self._keepalive.interval_s, self._check_peer)
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.native.receive

    def buffer_updated(self, nbytes: int) -> None:
        self._received_at = self._loop.time()
        if self._background:
            self._take_giving_way(0, nbytes)
        else:
            self._take(nbytes)
        # libuv would read up to 32 more buffers at once; the others of this loop come first.
        self._reads = self._reads + 1 if nbytes == h2.RECEIVE_BYTES else 0
        if self._reads >= self._reads_max and not self._slice_due and not self._reading_held:
            self._reads = 0
            self._pause_slice()
            self._loop.call_soon(self._next_slice)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Only what is long ever waits, so whatever else came in this turn goes first."""
        self._writing_paused = False
        self.flush_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if self._watched is not None:
            self._urgency.forget(self._watched)
            self._watched = None
        self._note(Loss.CLOSED, str(exc) if exc else "")
        if not self._lost.done():
            self._lost.set_result(None)
        self.on_lost()
        self.native.retire()

    def _note(self, loss: Loss, reason: str) -> None:
        if self.loss is None:
            self.loss = loss
            self.reason = reason or loss.value

    def _attend(self) -> None:
        """Do what a turn has left over. Between turns there is mostly nothing."""
        if self.native.attention[0] & h2.HAS_EVENTS:
            for event in self.native.events():
                self.on_event(event)
        attention = self.native.attention[0]
        if attention & h2.IS_OVER:
            error = self.native.error
            self.close(Loss.PROTOCOL if error else Loss.CLOSED, error)
        elif attention & h2.HAS_MORE and not self._writing_paused and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def _take(self, nbytes: int) -> None:
        self._in_turn = True
        try:
            self._tell(self.native.feed(nbytes, self._received_at))
        finally:
            self._in_turn = False
        self.flush()

    def _take_giving_way(self, begin: int, end: int, yields: int = 0) -> None:
        """Take receive[begin:end] message by message, until somebody waits for something else; the rest comes later."""
        native = self.native
        before = native.messages[0]
        self._in_turn = True
        try:
            taken = native.feed_background(
                self._urgency.fd, begin, end, self._received_at, yields < YIELDS_MAX
            )
            self._tell(native.messages[0] - before)
        finally:
            self._in_turn = False
        if 0 <= taken < end and self._transport is not None:
            # The buffer is taken until then.
            self._pause_slice()
            self._loop.call_soon(self._go_on, taken, end, yields + 1 if taken == begin else 1)
        self.flush()

    def _go_on(self, begin: int, end: int, yields: int) -> None:
        self._slice_due = False
        if self._transport is not None:
            self._take_giving_way(begin, end, yields)
        if not self._slice_due:
            self._next_slice()

    def _tell(self, messages: int) -> None:
        if self.native.attention[0] & h2.HAS_EVENTS:
            for event in self.native.events():
                self.on_event(event)
        if messages > 0:
            self.on_messages()

    def _pause_slice(self) -> None:
        self._slice_due = True
        if self._transport is not None:
            self._transport.pause_reading()

    def _next_slice(self) -> None:
        self._slice_due = False
        if self._transport is not None and not self._reading_held:
            self._transport.resume_reading()

    def _check_peer(self) -> None:
        """Ask a quiet peer for a sign of life, and give it up when none comes.

        Time that we spent elsewhere is not the peer's: after the time-out the loop turns once more and takes
        what is in the socket before the peer is judged.
        """
        assert self._keepalive is not None
        interval_s, timeout_s = self._keepalive.interval_s, self._keepalive.timeout_s
        now = self._loop.time()
        if self._reading_held or (self._pinged_at is not None and self._received_at >= self._pinged_at):
            self._pinged_at = None
        delay_s = interval_s
        if self._pinged_at is None:
            self._last_chance = False
            if not self._reading_held and now - self._received_at >= interval_s:
                self._pinged_at = now
                self.native.ping()
                self.flush()
                delay_s = timeout_s
            elif not self._reading_held:
                delay_s = self._received_at + interval_s - now
        elif not self._last_chance:
            self._last_chance = True
            delay_s = timeout_s / 8
        else:
            self.abort(Loss.SILENT, f"nothing came for {now - self._received_at:.1f} s")
            return
        self._timer = self._loop.call_later(max(delay_s, 0.001), self._check_peer)
