"""Calls of a client on a native connection: messages, status, and what they mean to us."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from .._native import h2
from ..errors import Code, SourceError
from .h2_connection import H2Connection, KeepAlive, Loss
from .status import source_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from . import ReplySink

UNTAKEN_MAX = 256
"""Messages of a call that wait for their reader before nothing more is received."""

_LOSSES = {
    Loss.CLOSED: Code.SOURCE_CLOSED,
    Loss.LOCAL: Code.SOURCE_CLOSED,
    Loss.SILENT: Code.SOURCE_SILENT,
    Loss.PROTOCOL: Code.SOURCE_BAD_REPLY,
}


class ClientCall:
    """One call: its messages, unless they go to a sink, and how it ended."""

    def __init__(self, connection: ClientConnection, stream_id: int) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self._messages: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self.error: SourceError | None = None
        self.is_closed = False
        """Ended by us; nothing is to be told."""
        self.is_done = False
        """With status OK. For a page stream that is an error too: it has no end of its own."""

    @property
    def untaken(self) -> int:
        return len(self._messages)

    def take(self, message: bytes) -> None:
        self._messages.append(message)
        self._changed.set()
        self._connection.balance()

    def end(self, error: SourceError, *, done: bool = False) -> None:
        if self.error is None and not self.is_closed:
            self.error = error
            self.is_done = done
        self._changed.set()

    def send(self, message: bytes, *, at_once: bool = False) -> None:
        match self._connection.native.send(self._stream_id, message):
            case 0 if at_once:
                self._connection.flush_now()
            case 0:
                self._connection.flush_soon()
            case -1:
                # The end is known or on its way here; whoever waits for it is told there.
                pass
            case _:
                self.cancel()
                self.end(
                    SourceError(Code.SOURCE_SILENT, f"{self._connection.target} has stopped taking requests")
                )

    def half_close(self) -> None:
        self._connection.native.half_close(self._stream_id)
        self._connection.flush_soon()

    def cancel(self) -> None:
        """End the call if it has not ended: nothing more comes."""
        if self._connection.calls.pop(self._stream_id, None) is None:
            return
        self._connection.balance()
        self._connection.native.reset(self._stream_id)
        self._connection.flush_soon()

    def close(self) -> None:
        """End the call as its owner wants it: no error."""
        self.is_closed = True
        self.cancel()
        self._changed.set()

    async def wait_ended(self) -> None:
        while self.error is None and not self.is_closed:
            self._changed.clear()
            await self._changed.wait()

    async def next_message(self) -> bytes | None:
        """Return the next message, or None after the last. Raises SourceError."""
        while not self._messages:
            if self.is_done:
                return None
            if self.error is not None:
                raise self.error
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popleft()
        self._connection.native.consumed(self._stream_id, len(message))
        self._connection.balance()
        self._connection.flush_soon()
        return message


class ClientConnection(H2Connection):
    def __init__(
        self,
        target: str,
        limits: h2.Limits,
        keepalive: KeepAlive,
        sink: ReplySink | None,
        *,
        urgent: bool = False,
        background: bool = False,
    ) -> None:
        super().__init__(h2.Connection(limits), keepalive, urgent=urgent, background=background)
        self.target = target
        self.calls: dict[int, ClientCall] = {}
        self.too_many_pings = False
        self.going_away = False
        self._sink = sink

    def when_lost(self, callback: Callable[[ClientConnection], None]) -> None:
        self._lost.add_done_callback(lambda _: callback(self))

    def call(self, path: str, authority: str, scheme: str, timeout_ms: int = -1) -> ClientCall:
        """Begin a call; its messages go to the connection's sink if it has one. Raises SourceError."""
        sink = self._sink.native if self._sink is not None else (0, 0)
        stream_id = self.native.call(path, authority, scheme, timeout_ms, sink)
        if stream_id < 0 or not self.is_open:
            raise SourceError(Code.SOURCE_CLOSED, f"{self.target} takes no more calls: {self.reason}")
        self.calls[stream_id] = call = ClientCall(self, stream_id)
        return call

    def balance(self) -> None:
        """Let the source wait while a reader lags far behind."""
        most = max((call.untaken for call in self.calls.values()), default=0)
        if most >= UNTAKEN_MAX:
            self.hold_reading(True)
        elif most < UNTAKEN_MAX // 2:
            self.hold_reading(False)

    def on_messages(self) -> None:
        if self._sink is not None:
            self._sink.fed()

    def on_event(self, event: h2.Event) -> None:
        if event.kind == h2.GOAWAY:
            self.going_away = True
            self.too_many_pings = event.status == h2.HTTP2_ENHANCE_YOUR_CALM and b"ping" in event.data
            return
        call = self.calls.get(event.stream_id)
        if call is None:
            return
        if event.kind == h2.MESSAGE:
            call.take(event.data)
        elif event.kind == h2.ENDED:
            del self.calls[event.stream_id]
            self.balance()
            done = event.origin == h2.BY_STATUS and event.status == 0
            call.end(_error_of(self.target, event), done=done)

    def on_lost(self) -> None:
        assert self.loss is not None
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.end(SourceError(_LOSSES[self.loss], f"the connection to {self.target} ended: {self.reason}"))


def _error_of(target: str, event: h2.Event) -> SourceError:
    if event.origin in (h2.BY_PROTOCOL, h2.BY_SINK):
        return SourceError(Code.SOURCE_BAD_REPLY, f"page source {target}: {event.text}")
    if event.status == 0:
        return SourceError(Code.SOURCE_CLOSED, f"page source {target} ended the stream")
    return source_error(target, event.status, event.text)
