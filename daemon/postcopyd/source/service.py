"""What a page server answers, whatever carries it: the calls of postcopyd.v1.PageSource without a transport.

Unary messages are protobuf objects; a page stream is bytes in and bytes out, parsed and written in C.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import structlog

from postcopyd._native.image import HOLES_BATCH, WOULD_BLOCK, NativePageStream, OutputBuffer
from postcopyd.errors import Code, SourceError
from postcopyd.v1 import page_source_pb2 as pb

from .catalog import Catalog, read_holes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .options import ServerOptions

log = structlog.get_logger(__name__)

_STATUS = {
    Code.SOURCE_UNKNOWN_IMAGE: grpc.StatusCode.NOT_FOUND,
    Code.SOURCE_OTHER_EPOCH: grpc.StatusCode.FAILED_PRECONDITION,
    Code.SOURCE_BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.IMAGE_SHRANK: grpc.StatusCode.DATA_LOSS,
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}
_CODE = {status: code for code, status in _STATUS.items() if code is not Code.SOURCE_BUSY}


class StreamEnded(SourceError):
    """A page stream ends with `status`, which the client is told with the message."""

    def __init__(self, number: int, message: str) -> None:
        self.status = _BY_NUMBER[number]
        super().__init__(_CODE.get(self.status, Code.SOURCE_REFUSED), message)


def status_of(error: SourceError) -> grpc.StatusCode:
    """Return the gRPC status that tells a client of `error`."""
    if isinstance(error, StreamEnded):
        return error.status
    return _STATUS.get(error.code, grpc.StatusCode.INTERNAL)


class PageStream:
    """The serving end of one Pages call, with its cold reads done by the service's threads.

    Not to be used after `close`. Belongs to the event loop.
    """

    def __init__(self, service: PageSourceService, native: NativePageStream) -> None:
        self._service = service
        self.native = native
        self.wake = asyncio.Event()
        """Set when `produce` may have something to do."""

    @property
    def outstanding(self) -> int:
        return self.native.outstanding

    def request(self, message: bytes) -> bool:
        """Take a serialised PageRequest; False: the stream has ended, and `produce` says why."""
        taken = self.native.request(message) == 0
        self.wake.set()
        return taken

    def produce(self) -> bytes | None:
        """Return the next serialised PageReply, or None: wait for `wake`.

        Raises:
            StreamEnded: the client's or the image's fault.
        """
        answer = self.native.produce(self._service.output)
        if isinstance(answer, bytes):
            return answer
        if answer == WOULD_BLOCK:
            self._service.read_in_thread(self)
        elif answer < 0:
            raise StreamEnded(-answer, self.native.error)
        return None

    def close(self) -> None:
        """Give the stream's place to another; idempotent. A read under way keeps the memory until it ends."""
        self._service.forget(self)


class PageSourceService:
    """Answers for one catalogue. Belongs to one event loop.

    Args:
        catalog: not owned.
        options: bounds; the same for every transport.
    """

    def __init__(self, catalog: Catalog, options: ServerOptions) -> None:
        self.catalog = catalog
        self.options = options
        self.streams: set[PageStream] = set()
        # Streams write here one after another; each message is copied out before the next one is begun.
        self.output = OutputBuffer(options.max_message_bytes)
        self._threads = ThreadPoolExecutor(options.read_threads, thread_name_prefix="image-read")

    def describe(self, request: pb.DescribeRequest) -> pb.Image:
        """Raises SourceError: SOURCE_UNKNOWN_IMAGE."""
        image = self.catalog.get(request.image_id)
        file = image.file
        return pb.Image(
            image_id=image.id,
            epoch=file.epoch,
            size_bytes=file.size_bytes,
            regions=[pb.Region(offset=0, size_bytes=file.size_bytes, page_size=file.page_size)],
            max_ranges=self.options.max_ranges,
            max_data_bytes=self.options.max_data_bytes,
            max_range_bytes=self.options.max_range_bytes,
            has_holes=file.has_holes,
        )

    async def holes(self, request: pb.HolesRequest) -> AsyncIterator[pb.HolesReply]:
        """Yield the holes of an image, HOLES_BATCH at most in a message. Raises SourceError."""
        image = self.catalog.get_epoch(request.image_id, request.epoch)
        loop = asyncio.get_running_loop()
        cursor = 0
        while cursor < image.file.size_bytes:
            cursor, holes = await loop.run_in_executor(self._threads, read_holes, image, cursor)
            assert len(holes) <= HOLES_BATCH
            if holes:
                yield pb.HolesReply(holes=[pb.Extent(offset=at, length=length) for at, length in holes])

    def complete(self, request: pb.CompleteRequest) -> pb.CompleteReply:
        """Raises SourceError: SOURCE_UNKNOWN_IMAGE or SOURCE_OTHER_EPOCH."""
        released = self.catalog.complete(request.image_id, request.epoch)
        log.info(
            "image.complete",
            image=request.image_id,
            released=released,
            pages_installed=request.pages_installed,
            pages_zero=request.pages_zero,
        )
        return pb.CompleteReply(released=released)

    def open_stream(self) -> PageStream:
        """Return a stream that waits for its first request; the caller closes it.

        Raises:
            SourceError: SOURCE_BUSY.
        """
        if len(self.streams) >= self.options.max_streams:
            raise SourceError(
                Code.SOURCE_BUSY, f"this source serves {self.options.max_streams} streams already"
            )
        stream = PageStream(self, self.catalog.open_stream(self.options.stream_limits))
        self.streams.add(stream)
        return stream

    def forget(self, stream: PageStream) -> None:
        self.streams.discard(stream)

    def read_in_thread(self, stream: PageStream) -> None:
        """Do the read that `stream` wants in another thread and wake it. Streams want one at a time."""
        done = asyncio.get_running_loop().run_in_executor(self._threads, stream.native.read_blocking)
        done.add_done_callback(lambda _: stream.wake.set())

    def close(self) -> None:
        """End the threads after the reads under way; idempotent."""
        self._threads.shutdown(wait=True, cancel_futures=True)
