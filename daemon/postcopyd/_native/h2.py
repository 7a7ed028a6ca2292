"""Typed binding of daemon/native/h2.h: one end of a gRPC connection over HTTP/2, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import msgspec
import structlog

import postcopyd._native._h2 as _h2

CData: TypeAlias = Any
"""A C value or pointer; cffi checks its fields at run time."""

_log = structlog.get_logger(__name__)

KIB = 1 << 10
MIB = 1 << 20


class _Lib(Protocol):
    H2_MESSAGE: int
    H2_ENDED: int
    H2_STALLED: int
    H2_DRAINED: int
    H2_GOAWAY: int
    H2_BY_STATUS: int
    H2_BY_RESET: int
    H2_BY_PROTOCOL: int
    H2_BY_SINK: int
    H2_BY_OWNER: int
    H2_HAS_EVENTS: int
    H2_HAS_MORE: int
    H2_IS_OVER: int
    h2_py_open: CData

    def h2_new(self, config: CData) -> CData: ...
    def h2_free(self, conn: CData) -> None: ...
    def h2_feed(self, conn: CData, data: CData, len_bytes: int, now_s: float) -> int: ...
    def h2_feed_background(
        self,
        conn: CData,
        data: CData,
        pressing: CData,
        context: int,
        begin: int,
        end: int,
        now_s: float,
        look_first: bool,
    ) -> int: ...
    def h2_fill(self, conn: CData, out: CData, cap: int) -> int: ...
    def h2_attention(self, conn: CData) -> CData: ...
    def h2_block_bytes(self, conn: CData) -> int: ...
    def h2_next_event(self, conn: CData, event: CData) -> int: ...
    def h2_error(self, conn: CData) -> CData: ...
    def h2_statistics(self, conn: CData) -> CData: ...
    def h2_ping(self, conn: CData) -> int: ...
    def h2_shutdown(self, conn: CData) -> int: ...
    def h2_call(
        self,
        conn: CData,
        path: bytes,
        authority: bytes,
        scheme: bytes,
        timeout_ms: int,
        sink: int,
        context: int,
    ) -> int: ...
    def h2_send(self, conn: CData, stream_id: int, message: bytes, len_bytes: int) -> int: ...
    def h2_half_close(self, conn: CData, stream_id: int) -> int: ...
    def h2_consumed(self, conn: CData, stream_id: int, len_bytes: int) -> int: ...
    def h2_reset(self, conn: CData, stream_id: int, http2_error: int) -> int: ...
    def h2_serve_pages(
        self, conn: CData, stream_id: int, context: int, request: int, produce: int, error: int
    ) -> int: ...
    def h2_serve_handler(self, conn: CData, stream_id: int) -> int: ...
    def h2_resume(self, conn: CData, stream_id: int) -> int: ...
    def h2_finish(self, conn: CData, stream_id: int, status: int, message: bytes) -> int: ...


_lib = cast("_Lib", _h2.lib)
_ffi: Any = _h2.ffi

MESSAGE = _lib.H2_MESSAGE
ENDED = _lib.H2_ENDED
STALLED = _lib.H2_STALLED
DRAINED = _lib.H2_DRAINED
GOAWAY = _lib.H2_GOAWAY
BY_STATUS = _lib.H2_BY_STATUS
BY_RESET = _lib.H2_BY_RESET
BY_PROTOCOL = _lib.H2_BY_PROTOCOL
BY_SINK = _lib.H2_BY_SINK

HAS_EVENTS = _lib.H2_HAS_EVENTS
HAS_MORE = _lib.H2_HAS_MORE
IS_OVER = _lib.H2_IS_OVER

HTTP2_CANCEL = 8
HTTP2_ENHANCE_YOUR_CALM = 11
GRPC_INTERNAL = 13

RECEIVE_BYTES = 256 * KIB
"""Taken from the socket at once, and so the most that is handled in a turn of the event loop."""

PIECE_BYTES = 64 * KIB
"""The most that is handled in the background before somebody who waits may go first, but for the rest of a message."""

SLICE_BYTES = 128 * KIB
"""Produced at once; the first after a rest are shorter. A wanted page waits behind one slice of the push."""

TLS_SLICE_BYTES = 256 * KIB
"""Each slice is one more turn of the event loop's TLS, which costs more than it."""


class Limits(msgspec.Struct, frozen=True):
    """What a peer may make us do and keep; see struct h2_limits. Bytes, counts, and frames a second."""

    max_message_bytes: int
    max_produced_bytes: int
    max_queued_bytes: int
    max_streams: int
    window_bytes: int
    max_frame_bytes: int
    max_header_bytes: int = 16 * KIB
    slice_bytes: int = SLICE_BYTES
    piece_bytes: int = PIECE_BYTES
    control_burst: int = 1000
    control_rate: int = 200
    reset_burst: int = 200
    reset_rate: int = 50


CLIENT_LIMITS = Limits(
    max_message_bytes=4 * MIB,
    max_produced_bytes=0,
    max_queued_bytes=4 * MIB,
    max_streams=1,
    window_bytes=16 * MIB,
    max_frame_bytes=4 * MIB,
)
"""A frame holds the largest message, so the server's messages need not be cut and copied."""

SERVER_LIMITS = Limits(
    max_message_bytes=256 * KIB,
    max_produced_bytes=2 * MIB + 64 * KIB,
    max_queued_bytes=4 * MIB,
    max_streams=32,
    window_bytes=1 * MIB,
    max_frame_bytes=16 * KIB,
)
"""max_produced_bytes: one huge page and what a message has beyond its data."""


class Event(msgspec.Struct, frozen=True):
    """See enum h2_event_kind. `status` is a gRPC status, of GOAWAY an HTTP/2 error code."""

    kind: int
    stream_id: int
    status: int
    origin: int
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


class Statistics(msgspec.Struct, frozen=True):
    """See struct h2_stats."""

    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    frames_in_place: int
    queued_bytes: int
    queued_peak: int
    streams: int


OnOpen = Callable[[int, str, int], int]
"""(stream_id, path, timeout_ms or -1) → 0 after serve_pages or serve_handler, or a gRPC status."""


def _log_open_failed(exception: type[BaseException], error: BaseException, _: object) -> None:
    """What cffi calls when h2_py_open raises; the call is refused with INTERNAL."""
    _log.error("call.open_failed", exc_info=(exception, error, error.__traceback__))


@_ffi.def_extern(error=GRPC_INTERNAL, onerror=_log_open_failed)  # type: ignore[untyped-decorator]
def h2_py_open(user: CData, stream_id: int, path: CData, timeout_ms: int) -> int:
    on_open: OnOpen = _ffi.from_handle(user)
    return on_open(stream_id, _ffi.string(path).decode("ascii", "replace"), timeout_ms)


class Connection:
    """One end of a connection. Not thread-safe; methods may not be called from `on_open` except serve_*.

    Args:
        on_open: makes it a server's end.
    Attributes:
        receive: where received bytes are to be put for `feed`.
        feed: (len_bytes, now_s) takes the first bytes of `receive`; returns how many messages they completed, or -1
            if the connection broke. now_s: any monotonic clock.
        feed_background: (epoll, begin, end, now_s, look_first) takes that part of `receive`, for which nobody waits, and
            returns how far it came before the epoll instance with this descriptor was readable; -1 if the connection
            broke. look_first: it may come nowhere.
        messages: how many came so far, at index 0.
        fill: puts what is to be sent next into `block` and returns its length; 0 or -1 if there is nothing. It
            overwrites the last: the transport must be done with it.
        attention: what is to be done after `feed`, `fill` and `events`, as bits HAS_EVENTS, HAS_MORE, IS_OVER at
            index 0; mostly 0.

    These are called in every turn of the event loop, hence without a method of Python's in between.
    """

    feed: Callable[[int, float], int]
    feed_background: Callable[[int, int, int, float, bool], int]
    fill: Callable[[], int]
    attention: Sequence[int]
    messages: Sequence[int]

    def __init__(self, limits: Limits, on_open: OnOpen | None = None) -> None:
        config = _ffi.new("struct h2_config *")
        config.is_server = on_open is not None
        config.limits = msgspec.structs.asdict(limits)
        self._on_open: CData | None = None
        if on_open is not None:
            self._on_open = _ffi.new_handle(on_open)
            config.open = _lib.h2_py_open
            config.user = self._on_open
        conn = _lib.h2_new(config)
        if conn == _ffi.NULL:
            raise ValueError(f"these limits make no sense: {limits}")
        self._conn = _ffi.gc(conn, _lib.h2_free)
        self.attention = _lib.h2_attention(conn)
        self._stats = _lib.h2_statistics(conn)
        self.messages = _ffi.addressof(self._stats, "messages_in")
        self._event = _ffi.new("struct h2_event *")
        self._in = _ffi.new("uint8_t[]", RECEIVE_BYTES)
        self._out_bytes = _lib.h2_block_bytes(conn)
        # Not zeroed: pages are touched only as far as they are used.
        self._out = _ffi.new_allocator(should_clear_after_alloc=False)("uint8_t[]", self._out_bytes)
        self.block = memoryview(_ffi.buffer(self._out))
        self.receive = memoryview(_ffi.buffer(self._in))
        self.feed = partial(_lib.h2_feed, self._conn, self._in)
        self.feed_background = partial(
            _lib.h2_feed_background, self._conn, self._in, _ffi.addressof(_h2.lib, "urgency_is_pressing")
        )
        self.fill = partial(_lib.h2_fill, self._conn, self._out, self._out_bytes)

    def retire(self) -> None:
        """Nothing is fed any more: let go of the owner, whom `on_open` refers to, and so of the buffers with it."""
        self._on_open = None

    def events(self) -> Iterator[Event]:
        event = self._event
        while _lib.h2_next_event(self._conn, event):
            data = _ffi.buffer(event.data, event.len)[:] if event.len else b""
            yield Event(event.kind, event.stream_id, event.status, event.origin, data)

    @property
    def error(self) -> str:
        text: bytes = _ffi.string(_lib.h2_error(self._conn))
        return text.decode(errors="replace")

    @property
    def statistics(self) -> Statistics:
        return Statistics(*(getattr(self._stats, name) for name in Statistics.__struct_fields__))

    def ping(self) -> None:
        _lib.h2_ping(self._conn)

    def shutdown(self) -> None:
        """Send GOAWAY: no new streams, those that are open go on."""
        _lib.h2_shutdown(self._conn)

    def call(
        self, path: str, authority: str, scheme: str, timeout_ms: int = -1, sink: tuple[int, int] = (0, 0)
    ) -> int:
        """Begin a call; return its stream id, or -1.

        sink: see ReplySink.native. Without it, messages are events.
        """
        return _lib.h2_call(
            self._conn, path.encode(), authority.encode(), scheme.encode(), timeout_ms, sink[0], sink[1]
        )

    def send(self, stream_id: int, message: bytes) -> int:
        """Queue a message. 0; -1: the stream is over; -2: its queue is full."""
        return _lib.h2_send(self._conn, stream_id, message, len(message))

    def half_close(self, stream_id: int) -> None:
        _lib.h2_half_close(self._conn, stream_id)

    def consumed(self, stream_id: int, len_bytes: int) -> None:
        _lib.h2_consumed(self._conn, stream_id, len_bytes)

    def reset(self, stream_id: int, http2_error: int = HTTP2_CANCEL) -> None:
        _lib.h2_reset(self._conn, stream_id, http2_error)

    def serve_pages(self, stream_id: int, context: int, request: int, produce: int, error: int) -> bool:
        return _lib.h2_serve_pages(self._conn, stream_id, context, request, produce, error) == 0

    def serve_handler(self, stream_id: int) -> bool:
        return _lib.h2_serve_handler(self._conn, stream_id) == 0

    def resume(self, stream_id: int) -> None:
        _lib.h2_resume(self._conn, stream_id)

    def finish(self, stream_id: int, status: int, text: str) -> None:
        _lib.h2_finish(self._conn, stream_id, status, text.encode())
