"""The page service over grpcio. Page streams are bytes here: no protobuf object is made for a page."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

import grpc
import structlog

from postcopyd.errors import SourceError
from postcopyd.v1 import page_source_pb2 as pb

from .service import PageSourceService, PageStream, status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import TypeAlias

    UnaryContext: TypeAlias = grpc.aio.ServicerContext[object, object]
    PagesContext: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

log = structlog.get_logger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["PageSource"].full_name


class PagesCall:
    """One Pages call: requests are taken as they come; a reply is made only when the one before is written.

    So a client that never reads costs one message, and a demand that comes meanwhile is in the next one.
    """

    def __init__(
        self,
        stream: PageStream,
        requests: AsyncIterator[bytes],
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._stream = stream
        self._requests = requests
        self._write = write
        self._reading = True

    async def run(self) -> None:
        """Return when the client has closed its side and everything is answered.

        Raises:
            StreamEnded: the client's or the image's fault.
        """
        reader = asyncio.create_task(self._read())
        try:
            while (message := await self._next_message()) is not None:
                await self._write(message)
            await reader
        finally:
            reader.cancel()

    async def _read(self) -> None:
        try:
            async for message in self._requests:
                if not self._stream.request(message):
                    break
        finally:
            self._reading = False
            self._stream.wake.set()

    async def _next_message(self) -> bytes | None:
        while True:
            self._stream.wake.clear()
            message = self._stream.produce()
            if message is not None:
                return message
            if not self._reading and not self._stream.outstanding:
                return None
            await self._stream.wake.wait()


class PageSourceServicer:
    """Handlers for grpc.aio of one `PageSourceService`."""

    def __init__(self, service: PageSourceService) -> None:
        self._service = service

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return all methods of PageSource: unary ones with protobuf messages, Pages with bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, pb.DescribeRequest.FromString, pb.Image.SerializeToString
                ),
                "Holes": grpc.unary_stream_rpc_method_handler(
                    self.holes, pb.HolesRequest.FromString, pb.HolesReply.SerializeToString
                ),
                "Pages": grpc.stream_stream_rpc_method_handler(self.pages),
                "Complete": grpc.unary_unary_rpc_method_handler(
                    self.complete, pb.CompleteRequest.FromString, pb.CompleteReply.SerializeToString
                ),
            },
        )

    async def describe(self, request: pb.DescribeRequest, context: UnaryContext) -> pb.Image:
        try:
            return self._service.describe(request)
        except SourceError as error:
            await abort(context, error)

    async def holes(self, request: pb.HolesRequest, context: UnaryContext) -> AsyncIterator[pb.HolesReply]:
        try:
            async for reply in self._service.holes(request):
                yield reply
        except SourceError as error:
            await abort(context, error)

    async def complete(self, request: pb.CompleteRequest, context: UnaryContext) -> pb.CompleteReply:
        try:
            return self._service.complete(request)
        except SourceError as error:
            await abort(context, error)

    async def pages(self, requests: AsyncIterator[bytes], context: PagesContext) -> None:
        try:
            stream = self._service.open_stream()
            try:
                await PagesCall(stream, requests, context.write).run()
            finally:
                stream.close()
        except SourceError as error:
            log.warning("stream.ended", peer=context.peer(), code=str(error.code), reason=error.message)
            await abort(context, error)


async def abort(context: UnaryContext | PagesContext, error: SourceError) -> NoReturn:
    """End the call with the status and the sentence of `error`."""
    await context.abort(status_of(error), error.message)
