"""How messages reach a page source: the interface both transports implement.

A transport moves whole messages of `postcopyd.v1.PageSource/Pages`; it neither parses nor makes them. Both directions
are bytes of serialised PageRequest and PageReply, so that the C codec (daemon/native/wire.c) reads and writes
them without a Python object a page.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec


class ImageInfo(msgspec.Struct, frozen=True):
    """A source's answer to Describe. Sizes in bytes."""

    image_id: str
    epoch: int
    size_bytes: int
    max_ranges: int
    max_data_bytes: int
    max_range_bytes: int
    has_holes: bool


class ReplySink(Protocol):
    """Takes the messages of one stream.

    A transport calls either `feed` a message, or, if it works in C, the C function at `native[0]` with `native[1]` as
    its first argument: `int (*)(void *context, const uint8_t *message, size_t len)`, 0 or a negative number to end
    the stream; and `fed` once after each batch.
    """

    native: tuple[int, int]

    def feed(self, message: bytes) -> None: ...

    def fed(self) -> None: ...


class PageStream(Protocol):
    """One open Pages call."""

    def send(self, message: bytes) -> None:
        """Queue a serialised PageRequest. Never blocks: the number of outstanding ranges bounds the queue."""

    async def wait_closed(self) -> None:
        """Return when `close` was called.

        Raises:
            SourceError: the stream ended otherwise; SOURCE_CLOSED, SOURCE_UNKNOWN_IMAGE, SOURCE_OTHER_EPOCH,
                SOURCE_REFUSED, SOURCE_UNREACHABLE or SOURCE_SILENT.
        """

    async def close(self) -> None:
        """End the stream; idempotent."""


class PageTransport(Protocol):
    """A connection to one source address. Not connected until the first call."""

    name: str
    target: str

    async def describe(self, image_id: str) -> ImageInfo:
        """Raises SourceError."""

    def holes(self, image_id: str, epoch: int) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """Yield batches of (offset, length), ascending. Raises SourceError."""

    async def open_stream(self, opening: bytes, sink: ReplySink, *, demand: bool) -> PageStream:
        """Open a Pages call on a connection of its own and send `opening`. Raises SourceError."""

    async def complete(self, image_id: str, epoch: int, pages_installed: int, pages_zero: int) -> bool:
        """Tell the source that every page is here; return whether it let go. Raises SourceError."""

    async def close(self) -> None:
        """Close all connections; idempotent."""


TransportFactory = Callable[[str], PageTransport]
"""Makes the transport of a HOST:PORT."""
