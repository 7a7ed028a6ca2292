"""The reference transport: grpcio. Correct everywhere, slower than the native one (docs/performance.md)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import msgspec

from ..errors import Code, SourceError
from ..v1 import page_source_pb2 as pb
from ..v1 import page_source_pb2_grpc as pb_grpc
from . import ImageInfo, PageStream, ReplySink
from .status import source_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

PAGES_METHOD = "/postcopyd.v1.PageSource/Pages"

MAX_MESSAGE_BYTES = 1 << 30
"""What a reply may be long is agreed in Open.max_data_bytes; this only lifts grpcio's own limit of 4 MiB."""


class Timeouts(msgspec.Struct, frozen=True):
    """connect_s: for a connection and each unary call. keepalive_s: a silent peer is asked after this, and must
    answer within it again: twice that finds a dead one."""

    connect_s: float = 5.0
    keepalive_s: float = 2.0


def _identity(message: bytes) -> bytes:
    return message


class GrpcioStream:
    """A Pages call. A task writes what `send` queued, another feeds what comes."""

    def __init__(self, target: str, channel: grpc.aio.Channel, opening: bytes, sink: ReplySink) -> None:
        self._target = target
        self._sink = sink
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._outgoing.put_nowait(opening)
        method = channel.stream_stream(
            PAGES_METHOD, request_serializer=_identity, response_deserializer=_identity
        )
        self._call = method()
        self._closing = False
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Its result is fetched by wait_closed, which may come late or never.
        self._done.add_done_callback(lambda done: done.exception())
        self._tasks = [asyncio.ensure_future(self._write()), asyncio.ensure_future(self._read())]

    def send(self, message: bytes) -> None:
        self._outgoing.put_nowait(message)

    async def wait_closed(self) -> None:
        await asyncio.shield(self._done)

    async def close(self) -> None:
        self._closing = True
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._finish(None)

    def _finish(self, error: SourceError | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The reading task learns the same from the status, and reports it.
            return

    async def _read(self) -> None:
        try:
            while isinstance(message := await self._call.read(), bytes):
                self._sink.feed(message)
                self._sink.fed()
            code: grpc.StatusCode = await self._call.code()
            details: str | None = await self._call.details()
        except grpc.aio.AioRpcError as err:
            code, details = err.code(), err.details()
        if self._closing:
            self._finish(None)
        elif code is grpc.StatusCode.OK:
            self._finish(SourceError(Code.SOURCE_CLOSED, f"page source {self._target} ended the stream"))
        else:
            self._finish(source_error(self._target, code.value[0], details))


class GrpcioTransport:
    """Unary calls and the demand stream share a connection; the push has its own, so demand never queues behind it."""

    name = "grpcio"

    def __init__(
        self,
        target: str,
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - frozen
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target
        self._timeouts = timeouts
        self._credentials = credentials
        self._channels: list[grpc.aio.Channel] = []
        self._streams: list[GrpcioStream] = []

    def _open_channel(self) -> grpc.aio.Channel:
        keepalive_ms = int(self._timeouts.keepalive_s * 1000)
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_timeout_ms", keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
        ]
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self.target, options=options)
        else:
            channel = grpc.aio.secure_channel(self.target, self._credentials, options=options)
        self._channels.append(channel)
        return channel

    def _main_channel(self) -> grpc.aio.Channel:
        return self._channels[0] if self._channels else self._open_channel()

    async def describe(self, image_id: str) -> ImageInfo:
        stub = pb_grpc.PageSourceStub(self._main_channel())
        try:
            image = await stub.Describe(
                pb.DescribeRequest(image_id=image_id), timeout=self._timeouts.connect_s
            )
        except grpc.aio.AioRpcError as err:
            raise source_error(self.target, err.code().value[0], err.details()) from err
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
        stub = pb_grpc.PageSourceStub(self._main_channel())
        try:
            async for reply in stub.Holes(pb.HolesRequest(image_id=image_id, epoch=epoch)):
                yield [(hole.offset, hole.length) for hole in reply.holes]
        except grpc.aio.AioRpcError as err:
            raise source_error(self.target, err.code().value[0], err.details()) from err

    async def open_stream(self, opening: bytes, sink: ReplySink, *, demand: bool) -> PageStream:
        channel = self._main_channel() if demand else self._open_channel()
        stream = GrpcioStream(self.target, channel, opening, sink)
        self._streams.append(stream)
        return stream

    async def complete(self, image_id: str, epoch: int, pages_installed: int, pages_zero: int) -> bool:
        stub = pb_grpc.PageSourceStub(self._main_channel())
        request = pb.CompleteRequest(
            image_id=image_id, epoch=epoch, pages_installed=pages_installed, pages_zero=pages_zero
        )
        try:
            reply = await stub.Complete(request, timeout=self._timeouts.connect_s)
        except grpc.aio.AioRpcError as err:
            raise source_error(self.target, err.code().value[0], err.details()) from err
        return reply.released

    async def close(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            await stream.close()
        channels, self._channels = self._channels, []
        for channel in channels:
            await channel.close(None)
