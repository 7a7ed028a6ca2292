"""The page source's server over postcopyd's own HTTP/2, for any gRPC client.

The page stream's messages go between the network and a NativePages in C. All other methods are handlers in
Python that take a serialised request and yield serialised replies. I/O: transport/h2_connection.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, cast

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from .._native import h2
from ..errors import Code, ConfigError
from ..transport.h2_connection import TLS_SHUTDOWN_S, H2Connection, KeepAlive, Loss
from ..transport.tls import prepare

if TYPE_CHECKING:
    import ssl

PAGES = "/postcopyd.v1.PageSource/Pages"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SERVER_KEEPALIVE = KeepAlive(interval_s=10.0, timeout_s=20.0)
"""Patient: a client that is stopped for a while loses nothing, and a dead one holds little."""

_log = structlog.get_logger(__name__)


class NativePages(Protocol):
    """The C side of one page stream: functions' addresses, and their first argument. See h2_serve_pages."""

    context: int
    request: int
    produce: int
    error: int

    def read_blocking(self) -> None:
        """Do the read that `produce` would have waited for; runs in another thread."""

    def close(self) -> None:
        """No function is called any more."""


class CallError(Exception):
    """What a handler raises to end its call with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.status: int = code.value[0]
        self.text = text


Handler = Callable[[bytes], AsyncIterator[bytes]]
"""Serialised request → serialised replies. Raises CallError, or DecodeError for a malformed request."""


def unary(answer: Callable[[bytes], Awaitable[bytes]]) -> Handler:
    """Make the handler of a method with one reply."""

    async def handler(request: bytes) -> AsyncIterator[bytes]:
        yield await answer(request)

    return handler


class _Pages:
    """A page stream and the read that may be under way for it."""

    def __init__(self, pages: NativePages) -> None:
        self.pages = pages
        self.is_reading = False
        self.is_ended = False

    def close_if_idle(self) -> None:
        if self.is_ended and not self.is_reading:
            self.pages.close()


class _ServerConnection(H2Connection):
    def __init__(self, server: NativeServer) -> None:
        super().__init__(h2.Connection(server.limits, self._on_open), server.keepalive)
        self._server = server
        self._pages: dict[int, _Pages] = {}
        self._paths: dict[int, str] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._drained: dict[int, asyncio.Event] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._server.admit(self):
            cast("asyncio.Transport", transport).abort()
            return
        super().connection_made(transport)

    def _on_open(self, stream_id: int, path: str, timeout_ms: int) -> int:
        """Called by C within `feed`."""
        if path == PAGES:
            pages = self._server.new_pages()
            self._pages[stream_id] = _Pages(pages)
            self.native.serve_pages(stream_id, pages.context, pages.request, pages.produce, pages.error)
        elif path in self._server.handlers:
            self._paths[stream_id] = path
            self.native.serve_handler(stream_id)
        else:
            return int(grpc.StatusCode.UNIMPLEMENTED.value[0])
        if timeout_ms >= 0:
            self._deadlines[stream_id] = self._loop.call_later(timeout_ms / 1000, self._expire, stream_id)
        return 0

    def on_event(self, event: h2.Event) -> None:
        stream_id = event.stream_id
        if event.kind == h2.MESSAGE:
            handler = self._server.handlers[self._paths[stream_id]]
            self._drained[stream_id] = asyncio.Event()
            self._tasks[stream_id] = self._loop.create_task(self._answer(stream_id, handler, event.data))
        elif event.kind == h2.STALLED:
            self._read(stream_id, self._pages[stream_id])
        elif event.kind == h2.DRAINED:
            self._drained[stream_id].set()
        elif event.kind == h2.ENDED:
            self._forget(stream_id)

    def on_lost(self) -> None:
        for stream_id in [*self._pages, *self._paths]:
            self._forget(stream_id)
        self._server.dismiss(self)

    def _forget(self, stream_id: int) -> None:
        self._paths.pop(stream_id, None)
        self._drained.pop(stream_id, None)
        if (deadline := self._deadlines.pop(stream_id, None)) is not None:
            deadline.cancel()
        if (task := self._tasks.pop(stream_id, None)) is not None:
            task.cancel()
        if (pages := self._pages.pop(stream_id, None)) is not None:
            pages.is_ended = True
            pages.close_if_idle()

    def _expire(self, stream_id: int) -> None:
        if (task := self._tasks.pop(stream_id, None)) is not None:
            task.cancel()
        status: int = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        self.native.finish(stream_id, status, "the call's deadline has passed")
        self.flush_soon()

    def _read(self, stream_id: int, pages: _Pages) -> None:
        """Have a cold part of the image read without holding up the loop."""
        pages.is_reading = True
        read = self._loop.run_in_executor(self._server.readers, pages.pages.read_blocking)

        def done(_: asyncio.Future[None]) -> None:
            pages.is_reading = False
            pages.close_if_idle()
            if not pages.is_ended:
                self.native.resume(stream_id)
                self.flush()

        read.add_done_callback(done)

    async def _answer(self, stream_id: int, handler: Handler, request: bytes) -> None:
        """Run a handler; its replies wait while the client does not read."""
        status, text = 0, ""
        try:
            async for reply in handler(request):
                await self._send(stream_id, reply)
        except CallError as error:
            status, text = error.status, error.text
        except DecodeError:
            status, text = grpc.StatusCode.INVALID_ARGUMENT.value[0], "the request is malformed"
        except Exception:  # noqa: BLE001 - a handler's bug ends its call, not the server
            _log.exception("call.failed", path=self._paths.get(stream_id))
            status, text = grpc.StatusCode.INTERNAL.value[0], "internal error"
        self.native.finish(stream_id, status, text)
        self.flush_soon()

    async def _send(self, stream_id: int, reply: bytes) -> None:
        drained = self._drained[stream_id]
        while True:
            drained.clear()
            rc = self.native.send(stream_id, reply)
            self.flush_soon()
            if rc != -2:
                return
            if len(reply) > self._server.limits.max_queued_bytes // 2:
                raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the reply is longer than the limit")
            await drained.wait()


class NativeServer:
    """Serves page streams and handlers on one port.

    Args:
        new_pages: makes the page stream of a new call; raising refuses the call with INTERNAL.
        handlers: by full method name. grpc.health.v1.Health/Check is there unless replaced.
        tls: a server's context; ALPN is set here.
        max_connections: beyond, new connections are closed at once.
    """

    def __init__(
        self,
        new_pages: Callable[[], NativePages],
        handlers: Mapping[str, Handler],
        *,
        tls: ssl.SSLContext | None = None,
        keepalive: KeepAlive | None = SERVER_KEEPALIVE,
        limits: h2.Limits = h2.SERVER_LIMITS,
        max_connections: int = 64,
        max_readers: int = 4,
    ) -> None:
        self.new_pages = new_pages
        self.handlers: dict[str, Handler] = {HEALTH_CHECK: unary(self._check), **handlers}
        self.keepalive = keepalive
        self.limits = limits
        self.readers = ThreadPoolExecutor(max_readers, thread_name_prefix="page-read")
        self.connections: set[H2Connection] = set()
        self._max_connections = max_connections
        self._tls = tls
        if tls is not None:
            prepare(tls)
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which `port` 0 leaves to the kernel.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _ServerConnection(self),
                host,
                port,
                ssl=self._tls,
                ssl_shutdown_timeout=TLS_SHUTDOWN_S if self._tls is not None else None,
            )
        except OSError as error:
            raise ConfigError(Code.ARGUMENT_INVALID, f"cannot listen on {host}:{port}: {error}") from error
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no new calls, give open ones `grace_s`, then close; idempotent."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.native.shutdown()
            connection.flush()
        lost = [asyncio.ensure_future(connection.wait_lost()) for connection in self.connections]
        if lost:
            await asyncio.wait(lost, timeout=grace_s)
        for connection in list(self.connections):
            connection.close()
        if lost:
            _, open_still = await asyncio.wait(lost, timeout=1.0)
            for connection in list(self.connections) if open_still else []:
                connection.abort(Loss.LOCAL)
        self.readers.shutdown(wait=False)

    def admit(self, connection: H2Connection) -> bool:
        if len(self.connections) >= self._max_connections:
            _log.warning("connection.refused", reason="too many connections", limit=self._max_connections)
            return False
        self.connections.add(connection)
        return True

    def dismiss(self, connection: H2Connection) -> None:
        self.connections.discard(connection)

    async def _check(self, request: bytes) -> bytes:
        service = health_pb2.HealthCheckRequest.FromString(request).service
        known = {path.split("/")[1] for path in [PAGES, *self.handlers]}
        if service and service not in known:
            raise CallError(grpc.StatusCode.NOT_FOUND, f"no service {service!r}")
        status = health_pb2.HealthCheckResponse.SERVING
        reply: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        return reply
