"""The page source's client over postcopyd's own HTTP/2: see h2_connection.py for the I/O."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from .._native import h2
from ..errors import Code, SourceError
from ..v1 import page_source_pb2 as pb
from . import ImageInfo
from .h2_call import ClientCall, ClientConnection
from .h2_connection import TLS_SHUTDOWN_S, KeepAlive
from .tls import prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from . import ReplySink

SERVICE = "/postcopyd.v1.PageSource/"
KEEPALIVE_INTERVAL_MAX_S = 300.0
"""What gRPC servers allow unless told otherwise."""

_log = structlog.get_logger(__name__)
_Reply = TypeVar("_Reply", bound=Message)


class NativePageStream:
    """A Pages call on a connection of its own."""

    def __init__(self, connection: ClientConnection, call: ClientCall, *, demand: bool) -> None:
        self._connection = connection
        self._call = call
        self._demand = demand

    def send(self, message: bytes) -> None:
        self._call.send(message, at_once=self._demand)

    async def wait_closed(self) -> None:
        await self._call.wait_ended()
        self._connection.close()
        if self._call.error is not None:
            raise self._call.error

    async def close(self) -> None:
        self._call.close()
        self._connection.close()
        await self._connection.wait_lost()


class NativeTransport:
    """PageTransport over HTTP/2 in C.

    Args:
        target: HOST:PORT; an IPv6 address in brackets.
        tls: a client's context; ALPN is set here. The name that is checked is the target's host.
        keepalive: for every connection. Grows when a server complains of too many pings.
        call_timeout_s: for Describe and Complete, and for each message of Holes.
    """

    name = "native"

    def __init__(
        self,
        target: str,
        *,
        tls: ssl.SSLContext | None = None,
        keepalive: KeepAlive | None = None,
        limits: h2.Limits = h2.CLIENT_LIMITS,
        connect_timeout_s: float = 5.0,
        call_timeout_s: float = 5.0,
    ) -> None:
        self.target = target
        self._host, self._port = _split(target)
        self._tls = tls
        if tls is not None:
            prepare(tls)
        self.keepalive = keepalive or KeepAlive()
        self._limits = limits
        self._connect_timeout_s = connect_timeout_s
        self._call_timeout_s = call_timeout_s
        self._connections: set[ClientConnection] = set()
        self._shared: ClientConnection | None = None
        self._connecting = asyncio.Lock()

    async def describe(self, image_id: str) -> ImageInfo:
        """Raises SourceError."""
        image = await self._unary("Describe", pb.DescribeRequest(image_id=image_id), pb.Image)
        return ImageInfo(
            image_id=image.image_id,
            epoch=image.epoch,
            size_bytes=image.size_bytes,
            max_ranges=image.max_ranges,
            max_data_bytes=image.max_data_bytes,
            max_range_bytes=image.max_range_bytes,
            has_holes=image.has_holes,
        )

    async def holes(self, image_id: str, epoch: int) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """Yield batches of (offset, length), ascending. Raises SourceError."""
        call = await self._begin("Holes", pb.HolesRequest(image_id=image_id, epoch=epoch))
        try:
            while (data := await self._next(call)) is not None:
                yield [(hole.offset, hole.length) for hole in self._decode(pb.HolesReply, data).holes]
        finally:
            call.cancel()

    async def complete(self, image_id: str, epoch: int, pages_installed: int, pages_zero: int) -> bool:
        """Return whether the source let go of the image. Raises SourceError."""
        request = pb.CompleteRequest(
            image_id=image_id, epoch=epoch, pages_installed=pages_installed, pages_zero=pages_zero
        )
        return (await self._unary("Complete", request, pb.CompleteReply)).released

    async def open_stream(self, opening: bytes, sink: ReplySink, *, demand: bool) -> NativePageStream:
        """Open a Pages call on a connection of its own and send `opening`. Raises SourceError."""
        connection = await self._connect(sink, urgent=demand, background=not demand)
        call = connection.call(SERVICE + "Pages", self.target, self._scheme)
        stream = NativePageStream(connection, call, demand=demand)
        stream.send(opening)
        return stream

    async def close(self) -> None:
        """Close all connections; idempotent."""
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        for connection in connections:
            await connection.wait_lost()

    @property
    def _scheme(self) -> str:
        return "http" if self._tls is None else "https"

    async def _connect(
        self, sink: ReplySink | None, *, urgent: bool = False, background: bool = False
    ) -> ClientConnection:
        loop = asyncio.get_running_loop()
        shutdown_timeout_s = TLS_SHUTDOWN_S if self._tls is not None else None

        def make() -> ClientConnection:
            return ClientConnection(
                self.target, self._limits, self.keepalive, sink, urgent=urgent, background=background
            )

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    make, self._host, self._port, ssl=self._tls, ssl_shutdown_timeout=shutdown_timeout_s
                )
        except TimeoutError:
            raise SourceError(
                Code.SOURCE_UNREACHABLE, f"{self.target} did not accept in {self._connect_timeout_s:g} s"
            ) from None
        except (OSError, ssl.CertificateError) as error:
            raise SourceError(Code.SOURCE_UNREACHABLE, f"{self.target} cannot be reached: {error}") from error
        self._connections.add(connection)
        connection.when_lost(self._forget)
        return connection

    def _forget(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        if not connection.too_many_pings:
            return
        # Source: gRPC's client-side keepalive (grpc/proposal A8): on "too_many_pings", double the interval.
        interval_s = min(2 * self.keepalive.interval_s, KEEPALIVE_INTERVAL_MAX_S)
        _log.warning("keepalive.slowed", target=self.target, interval_s=interval_s)
        self.keepalive = KeepAlive(interval_s=interval_s, timeout_s=self.keepalive.timeout_s)

    async def _begin(self, method: str, request: Message) -> ClientCall:
        async with self._connecting:
            shared = self._shared
            if shared is None or not shared.is_open or shared.going_away:
                self._shared = shared = await self._connect(None)
        timeout_ms = int(self._call_timeout_s * 1000)
        # Holes may go on for long: only silence is bounded, here.
        deadline_ms = -1 if method == "Holes" else timeout_ms
        call = shared.call(SERVICE + method, self.target, self._scheme, deadline_ms)
        call.send(request.SerializeToString())
        call.half_close()
        return call

    async def _next(self, call: ClientCall) -> bytes | None:
        try:
            async with asyncio.timeout(self._call_timeout_s):
                return await call.next_message()
        except TimeoutError:
            raise SourceError(
                Code.SOURCE_SILENT, f"{self.target} did not answer in {self._call_timeout_s:g} s"
            ) from None

    async def _unary(self, method: str, request: Message, reply_type: type[_Reply]) -> _Reply:
        call = await self._begin(method, request)
        try:
            data = await self._next(call)
            if data is None:
                raise SourceError(Code.SOURCE_BAD_REPLY, f"{self.target} answered {method} without a message")
            # The status counts, not the message: it comes after it.
            if await self._next(call) is not None:
                raise SourceError(Code.SOURCE_BAD_REPLY, f"{self.target} answered {method} more than once")
        finally:
            call.cancel()
        return self._decode(reply_type, data)

    def _decode(self, reply_type: type[_Reply], data: bytes) -> _Reply:
        try:
            return reply_type.FromString(data)
        except DecodeError as error:
            raise SourceError(
                Code.SOURCE_BAD_REPLY, f"{self.target} sent no valid {reply_type.__name__}"
            ) from error


def _split(target: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [HOST]:PORT."""
    host, colon, port = target.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SourceError(Code.SOURCE_UNREACHABLE, f"{target!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
