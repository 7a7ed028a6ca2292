"""A page source's client of grpcio and protobuf's own messages."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import grpc

from postcopyd.v1 import page_source_pb2 as pb
from postcopyd.v1 import page_source_pb2_grpc
from source_support import IMAGE_ID, Collector, opening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    Stub = page_source_pb2_grpc.PageSourceAsyncStub

CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 8 << 20)]


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield page_source_pb2_grpc.PageSourceStub(channel)  # type: ignore[misc]


async def describe(stub: Stub, image_id: str = IMAGE_ID) -> pb.Image:
    return await stub.Describe(pb.DescribeRequest(image_id=image_id))


async def fetch(stub: Stub, epoch: int, ranges: list[pb.Range], image_id: str = IMAGE_ID) -> Collector:
    """Ask for all of `ranges`, close, and read until the server has closed too."""
    request = pb.PageRequest.FromString(opening(epoch, *ranges))
    request.open.image_id = image_id
    call = stub.Pages(iter([request]))
    collector = Collector(ranges)
    async for reply in call:
        collector.feed(reply)
    assert await call.code() is grpc.StatusCode.OK
    return collector
