"""The page source of the transports' tests, on either server: the double's page streams, and an image called `image`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from h2_double import PageDouble, answer_in_python
from postcopyd.source.native_server import PAGES, CallError, NativeServer, unary
from postcopyd.v1 import page_source_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from h2_double import ReplyDouble
    from tls_support import Certificates

SERVICE = "/postcopyd.v1.PageSource/"
HOLES = 20_000
HOLES_A_MESSAGE = 10


async def describe(data: bytes) -> bytes:
    request = pb.DescribeRequest.FromString(data)
    if request.image_id == "slow":
        await asyncio.Event().wait()
    if request.image_id != "image":
        raise CallError(grpc.StatusCode.NOT_FOUND, f"no image {request.image_id!r}")
    return pb.Image(
        image_id="image", epoch=7, size_bytes=1 << 40, max_ranges=64, has_holes=True
    ).SerializeToString()


async def holes(data: bytes) -> AsyncIterator[bytes]:
    if pb.HolesRequest.FromString(data).epoch != 7:
        raise CallError(grpc.StatusCode.FAILED_PRECONDITION, "another epoch")
    for first in range(0, HOLES, HOLES_A_MESSAGE):
        extents = [pb.Extent(offset=n * 8192, length=4096) for n in range(first, first + HOLES_A_MESSAGE)]
        yield pb.HolesReply(holes=extents).SerializeToString()


async def complete(data: bytes) -> bytes:
    request = pb.CompleteRequest.FromString(data)
    return pb.CompleteReply(released=request.pages_installed + request.pages_zero == 100).SerializeToString()


HANDLERS = {
    SERVICE + "Describe": unary(describe),
    SERVICE + "Holes": holes,
    SERVICE + "Complete": unary(complete),
}


class NativeService:
    """NativeServer with the double; `pages` are the page streams it made."""

    def __init__(self, certificates: Certificates | None = None, **options: Any) -> None:
        self.pages: list[PageDouble] = []
        tls = certificates.context("server") if certificates else None
        self.server = NativeServer(self._new_pages, HANDLERS, tls=tls, **options)

    def _new_pages(self) -> PageDouble:
        self.pages.append(PageDouble())
        return self.pages[-1]

    async def start(self) -> int:
        return await self.server.start("127.0.0.1", 0)

    async def stop(self) -> None:
        await self.server.stop()


class _Generic(grpc.GenericRpcHandler):
    """The same handlers for grpcio: bytes in, bytes out."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method == PAGES:
            return grpc.stream_stream_rpc_method_handler(self._pages)
        handler = HANDLERS.get(details.method)
        if handler is None:
            return None

        async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            try:
                async for reply in handler(request):
                    yield reply
            except CallError as error:
                await _abort(context, error)

        return grpc.unary_stream_rpc_method_handler(answer)

    async def _pages(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        try:
            async for reply in answer_in_python(requests):
                yield reply
        except CallError as error:
            await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: CallError) -> None:
    code = next(code for code in grpc.StatusCode if code.value[0] == error.status)
    await context.abort(code, error.text)


class GrpcioService:
    """grpc.aio's server with the same handlers."""

    def __init__(self, certificates: Certificates | None = None) -> None:
        size = 64 << 20
        self._certificates = certificates
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]
        )
        self._server.add_generic_rpc_handlers([_Generic()])

    async def start(self) -> int:
        if self._certificates is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", self._certificates.server_credentials())
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(None)


async def until(sink: ReplyDouble, messages: int) -> None:
    """Return when the sink has `messages`."""
    changed = asyncio.Event()
    sink.on_fed = changed.set
    while sink.state.messages < messages:
        changed.clear()
        await changed.wait()
