"""Listens with postcopyd's own HTTP/2: page streams go between the network and the image without Python."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import msgspec

from postcopyd._native.h2 import SERVER_LIMITS, SLICE_BYTES, TLS_SLICE_BYTES
from postcopyd._native.image import native_functions
from postcopyd.arguments import parse_endpoint
from postcopyd.errors import Code, ConfigError, SourceError
from postcopyd.v1 import page_source_pb2 as pb

from .native_server import CallError, Handler, NativeServer
from .service import status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from postcopyd._native.image import NativePageStream

    from .options import TlsFiles
    from .service import PageSourceService

PREFIX = f"/{pb.DESCRIPTOR.services_by_name['PageSource'].full_name}/"
# A destination has a connection for demand and one for bulk; some room is for unary calls and health.
CONNECTIONS_PER_STREAM = 2


class NativeListener:
    """Serves one `PageSourceService`."""

    def __init__(self, service: PageSourceService) -> None:
        self._service = service
        options = service.options
        self._server = NativeServer(
            self._new_pages,
            handlers(service),
            tls=_context(options.tls) if options.tls else None,
            limits=msgspec.structs.replace(
                SERVER_LIMITS,
                max_produced_bytes=options.max_message_bytes,
                slice_bytes=TLS_SLICE_BYTES if options.tls is not None else SLICE_BYTES,
            ),
            max_connections=CONNECTIONS_PER_STREAM * options.max_streams,
            max_readers=options.read_threads,
        )

    async def start(self, listen: str) -> int:
        """Serve on HOST:PORT and return the port that was bound.

        Raises:
            ConfigError: the address cannot be bound.
        """
        host, port = parse_endpoint(listen, port_zero=True)
        return await self._server.start(host, port)

    async def stop(self, grace_s: float) -> None:
        """Let calls end within `grace_s`, then close; idempotent."""
        await self._server.stop(grace_s)

    def _new_pages(self) -> _Pages:
        try:
            stream = self._service.open_stream()
        except SourceError as error:
            # The call itself cannot be refused any more; its first request is.
            refused = self._service.catalog.open_stream(self._service.options.stream_limits)
            refused.refuse(status_of(error).value[0], error.message)
            return _Pages(refused, lambda: None)
        return _Pages(stream.native, stream.close)


class _Pages:
    """A page stream as the native server wants it: C functions and their first argument."""

    def __init__(self, native: NativePageStream, close: Callable[[], None]) -> None:
        self._native = native
        self.context = native.context_address
        self.request, self.produce, self.error = native_functions()
        self.read_blocking = native.read_blocking
        self.close = close


def handlers(service: PageSourceService) -> dict[str, Handler]:
    """Return all methods but Pages, by full name, from serialised request to serialised replies."""

    async def describe(data: bytes) -> AsyncIterator[bytes]:
        yield service.describe(pb.DescribeRequest.FromString(data)).SerializeToString()

    async def holes(data: bytes) -> AsyncIterator[bytes]:
        async for reply in service.holes(pb.HolesRequest.FromString(data)):
            yield reply.SerializeToString()

    async def complete(data: bytes) -> AsyncIterator[bytes]:
        yield service.complete(pb.CompleteRequest.FromString(data)).SerializeToString()

    return {
        PREFIX + "Describe": _refusing(describe),
        PREFIX + "Holes": _refusing(holes),
        PREFIX + "Complete": _refusing(complete),
    }


def _refusing(answer: Callable[[bytes], AsyncIterator[bytes]]) -> Handler:
    """Make SourceError the call's status."""

    async def handler(data: bytes) -> AsyncIterator[bytes]:
        try:
            async for reply in answer(data):
                yield reply
        except SourceError as error:
            raise CallError(status_of(error), error.message) from error

    return handler


def _context(tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.cert, tls.key)
        if tls.ca:
            context.load_verify_locations(tls.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            Code.CONFIG_UNREADABLE, f"the TLS files {tls.cert}, {tls.key}, {tls.ca} cannot be used: {error}"
        ) from error
    return context
