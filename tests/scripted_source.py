"""A page source over gRPC that says what a test wants it to say, well or badly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
import grpc.aio
import xxhash

from postcopyd.v1 import page_source_pb2 as pb

SERVICE = "postcopyd.v1.PageSource"
Send = Callable[[bytes], Awaitable[None]]
Script = Callable[[pb.Range, Send], Awaitable[None]]
"""Answers one range by sending serialised replies. Raises EndStream to end the stream instead."""


class EndStream(Exception):
    """`code` None: the end that a source has no reason for, with status OK."""

    def __init__(self, code: grpc.StatusCode | None = None) -> None:
        super().__init__(code)
        self.code = code


def reply(*runs: pb.Run) -> bytes:
    return pb.PageReply(runs=runs).SerializeToString()


class ScriptedSource:
    """Serves `content` as image `id`; right away rightly, then as `script`, `holes`, `describe` and
    `complete_status` are set.

    Attributes:
        asked: every range that came, in order.
        streams: how many page streams were opened.
        completed: the Complete messages that came.
    """

    def __init__(self, content: bytes, *, id: str = "vm", epoch: int = 7) -> None:
        self.content = content
        self.id = id
        self.epoch = epoch
        self.script: Script = self.right
        self.describe: Callable[[], Awaitable[None]] | None = None
        self.holes: Callable[[], AsyncIterator[pb.HolesReply]] | None = None
        self.asked: list[pb.Range] = []
        self.complete_status: grpc.StatusCode | None = None
        self.streams = 0
        self.completed: list[pb.CompleteRequest] = []
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; again at the same address after `stop`."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.Image.SerializeToString
            ),
            "Holes": grpc.unary_stream_rpc_method_handler(
                self._holes, pb.HolesRequest.FromString, pb.HolesReply.SerializeToString
            ),
            "Pages": grpc.stream_stream_rpc_method_handler(self._pages),
            "Complete": grpc.unary_unary_rpc_method_handler(
                self._complete, pb.CompleteRequest.FromString, pb.CompleteReply.SerializeToString
            ),
        }
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
            ("grpc.http2.max_ping_strikes", 0),
        ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Cut all streams and close the port."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def run(self, asked: pb.Range, **changes: object) -> pb.Run:
        """The right answer to a range in one run, with these fields changed after the checksum was made."""
        data = self.content[asked.offset : asked.offset + asked.length]
        run = pb.Run(
            request_id=asked.request_id,
            offset=asked.offset,
            length=asked.length,
            xxh3_64=xxhash.xxh3_64_intdigest(data, seed=asked.offset),
            data=data,
        )
        for name, value in changes.items():
            setattr(run, name, value)
        return run

    async def right(self, asked: pb.Range, send: Send) -> None:
        """The script of a source that behaves."""
        await send(reply(self.run(asked)))

    @staticmethod
    async def silent(asked: pb.Range, send: Send) -> None:
        """The script of a source that takes requests and never answers."""

    def asked_bytes(self, priority: pb.Priority.ValueType) -> int:
        return sum(asked.length for asked in self.asked if asked.priority == priority)

    async def _describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.Image]
    ) -> pb.Image:
        if self.describe is not None:
            await self.describe()
        if request.image_id != self.id:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such image")
        return pb.Image(
            image_id=self.id,
            epoch=self.epoch,
            size_bytes=len(self.content),
            max_ranges=4096,
            max_data_bytes=1 << 20,
            max_range_bytes=1 << 30,
            has_holes=self.holes is not None,
        )

    async def _holes(
        self, request: pb.HolesRequest, context: grpc.aio.ServicerContext[pb.HolesRequest, pb.HolesReply]
    ) -> AsyncIterator[pb.HolesReply]:
        assert self.holes is not None
        async for holes in self.holes():
            yield holes

    async def _pages(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        self.streams += 1
        try:
            async for message in requests:
                request = pb.PageRequest.FromString(message)
                if request.HasField("open") and request.open.epoch != self.epoch:
                    raise EndStream(grpc.StatusCode.FAILED_PRECONDITION)
                for asked in request.ranges:
                    self.asked.append(asked)
                    await self.script(asked, context.write)
        except EndStream as end:
            if end.code is not None:
                await context.abort(end.code, "as the test wants it")

    async def _complete(
        self,
        request: pb.CompleteRequest,
        context: grpc.aio.ServicerContext[pb.CompleteRequest, pb.CompleteReply],
    ) -> pb.CompleteReply:
        self.completed.append(request)
        if self.complete_status is not None:
            await context.abort(self.complete_status, "as the test wants it")
        return pb.CompleteReply(released=True)
