"""Images and the protobuf reference for tests of the page server."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import xxhash

from postcopyd._native.image import (
    WOULD_BLOCK,
    CatalogTable,
    ImageFile,
    NativePageStream,
    OutputBuffer,
    StreamLimits,
)
from postcopyd.v1 import page_source_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PAGE = 4096
LIMITS = StreamLimits(max_ranges=4096, max_data_bytes=1 << 20, max_range_bytes=1 << 40)
IMAGE_ID = "vm"

DEMAND, PREFETCH, BULK = pb.PRIORITY_DEMAND, pb.PRIORITY_PREFETCH, pb.PRIORITY_BULK


def mixed_content(pages: int, seed: int = 1) -> bytes:
    """Runs of random pages, of zero pages, and of pages that differ from zero in one byte only."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    while len(parts) < pages:
        kind = rng.choice("zzdds")
        for _ in range(rng.randint(1, 6)):
            page = bytearray(PAGE)
            if kind == "d":
                page[:] = rng.randbytes(PAGE)
            elif kind == "s":
                page[rng.randrange(PAGE)] = 1
            parts.append(bytes(page))
    return b"".join(parts[:pages])


def range_of(request_id: int, offset: int, length: int, priority: pb.Priority.ValueType = BULK) -> pb.Range:
    return pb.Range(request_id=request_id, offset=offset, length=length, priority=priority)


def opening(epoch: int, *ranges: pb.Range, run_align: int = PAGE, max_data: int = 1 << 20) -> bytes:
    return pb.PageRequest(
        open=pb.Open(image_id=IMAGE_ID, epoch=epoch, run_align=run_align, max_data_bytes=max_data),
        ranges=ranges,
    ).SerializeToString()


def asking(*ranges: pb.Range) -> bytes:
    return pb.PageRequest(ranges=ranges).SerializeToString()


class Bench:
    """One image and streams on it, without a network."""

    def __init__(self, path: str | os.PathLike[str], limits: StreamLimits = LIMITS) -> None:
        self.file = ImageFile(os.fspath(path))
        self.table = CatalogTable()
        assert self.table.add(IMAGE_ID, self.file)
        self.limits = limits
        self.output = OutputBuffer((4 << 20) + (64 << 10))

    def stream(self) -> NativePageStream:
        return NativePageStream(self.table, self.limits)

    def opened(self, *ranges: pb.Range, run_align: int = PAGE, max_data: int = 1 << 20) -> NativePageStream:
        stream = self.stream()
        message = opening(self.file.epoch, *ranges, run_align=run_align, max_data=max_data)
        assert stream.request(message) == 0, stream.error
        return stream

    def reply(self, stream: NativePageStream) -> pb.PageReply:
        """The next message; reads that would block are done here."""
        answer = stream.produce(self.output)
        while answer == WOULD_BLOCK:
            stream.read_blocking()
            answer = stream.produce(self.output)
        assert isinstance(answer, bytes), (answer, stream.error)
        return pb.PageReply.FromString(answer)

    def replies(self, stream: NativePageStream) -> Iterator[pb.PageReply]:
        while stream.outstanding:
            yield self.reply(stream)


class Collector:
    """Puts runs together, and checks what the protocol promises of every run."""

    def __init__(self, ranges: Sequence[pb.Range], run_align: int = PAGE) -> None:
        self._run_align = run_align
        self._next = {r.request_id: r.offset for r in ranges}
        self._end = {r.request_id: r.offset + r.length for r in ranges}
        self.memory: dict[int, bytearray] = {r.request_id: bytearray() for r in ranges}
        self.order: list[int] = []
        self.data_bytes = 0

    def feed(self, reply: pb.PageReply) -> None:
        for run in reply.runs:
            assert run.offset == self._next[run.request_id], "runs ascend without gaps"
            assert run.length > 0
            assert run.length % self._run_align == 0
            assert run.offset + run.length <= self._end[run.request_id]
            if run.data:
                assert len(run.data) == run.length
                assert run.xxh3_64 == xxhash.xxh3_64_intdigest(run.data, seed=run.offset)
            self.data_bytes += len(run.data)
            self.memory[run.request_id] += run.data or bytes(run.length)
            self._next[run.request_id] += run.length
            self.order.append(run.request_id)

    def feed_all(self, replies: Iterable[pb.PageReply]) -> Collector:
        for reply in replies:
            self.feed(reply)
        return self

    @property
    def is_complete(self) -> bool:
        return self._next == self._end
