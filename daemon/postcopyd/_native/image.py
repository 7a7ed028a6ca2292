"""Typed binding of daemon/native: images, their catalogue, and the serving end of a page stream."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import msgspec

import postcopyd._native._image as _image

if TYPE_CHECKING:
    from cffi import FFI

    CData: TypeAlias = FFI.CData


class _Served(Protocol):
    data: int
    zero: int
    messages: int


class _Lib(Protocol):
    PS_WOULD_BLOCK: int
    PS_RUN_ALIGN_MAX: int
    PS_REQUEST_MAX: int
    PS_MESSAGE_OVERHEAD: int
    IMAGE_SHRANK: int
    IMAGE_RELEASED: int
    IMAGE_NOT_A_FILE: int
    IMAGE_EMPTY: int
    IMAGE_UNALIGNED: int

    def image_open(self, path: bytes, epoch: int, error: CData) -> CData: ...
    def image_release(self, image: CData) -> None: ...
    def image_free(self, image: CData) -> None: ...
    def image_size(self, image: CData) -> int: ...
    def image_epoch(self, image: CData) -> int: ...
    def image_page_size(self, image: CData) -> int: ...
    def image_in_memory(self, image: CData) -> bool: ...
    def image_has_holes(self, image: CData) -> bool: ...
    def image_is_released(self, image: CData) -> bool: ...
    def image_holes(self, image: CData, cursor: CData, pairs: CData, max_pairs: int) -> int: ...
    def image_served(self, image: CData) -> _Served: ...

    def image_catalog_new(self) -> CData: ...
    def image_catalog_free(self, catalog: CData) -> None: ...
    def image_catalog_add(self, catalog: CData, id: bytes, id_len: int, image: CData) -> bool: ...

    def ps_new(self, catalog: CData, limits: tuple[int, int, int]) -> CData: ...
    def ps_free(self, stream: CData) -> None: ...
    def ps_refuse(self, stream: CData, status: int, message: bytes) -> None: ...
    def ps_request(self, stream: CData, message: CData, len_bytes: int) -> int: ...
    def ps_produce(self, stream: CData, out: CData, cap: int) -> int: ...
    def ps_read_blocking(self, stream: CData) -> None: ...
    def ps_error(self, stream: CData) -> CData: ...
    def ps_message_max(self, stream: CData) -> int: ...
    def ps_outstanding(self, stream: CData) -> int: ...
    def ps_answered(self, stream: CData) -> int: ...


_lib = cast("_Lib", _image.lib)
_ffi = cast("FFI", _image.ffi)

WOULD_BLOCK = _lib.PS_WOULD_BLOCK
RUN_ALIGN_MAX = _lib.PS_RUN_ALIGN_MAX
REQUEST_MAX = _lib.PS_REQUEST_MAX
MESSAGE_OVERHEAD = _lib.PS_MESSAGE_OVERHEAD
"""What a reply message may have beyond its data, bytes."""

HOLES_BATCH = 4096

_REASONS = {
    _lib.IMAGE_SHRANK: "it became shorter",
    _lib.IMAGE_RELEASED: "it was released",
    _lib.IMAGE_NOT_A_FILE: "it is not a regular file",
    _lib.IMAGE_EMPTY: "it is empty",
    _lib.IMAGE_UNALIGNED: "its size is not a multiple of 4096",
}
SHRANK = _lib.IMAGE_SHRANK
RELEASED = _lib.IMAGE_RELEASED


class ImageFileError(Exception):
    """An image could not be opened or read. `reason` completes a sentence; `number` is a negative errno."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.reason = _REASONS.get(number) or os.strerror(-number)
        super().__init__(self.reason)


class Served(msgspec.Struct, frozen=True):
    """What was answered from an image since it was opened: bytes with data, bytes of zeros, messages."""

    data_bytes: int
    zero_bytes: int
    messages: int


class ImageFile:
    """An open image file. Safe to use from any thread.

    Args:
        path: a regular file of whole 4 KiB pages, also /proc/PID/fd/N of a memfd.
        epoch: 0 derives it from the file's identity and version.
    Raises:
        ImageFileError: the file cannot be opened, or is no image.
    """

    def __init__(self, path: str, epoch: int = 0) -> None:
        error = _ffi.new("int *")
        handle = _lib.image_open(os.fsencode(path), epoch, error)
        if handle == _ffi.NULL:
            raise ImageFileError(error[0])
        self.handle = _ffi.gc(handle, _lib.image_free)
        self.owner: CatalogTable | None = None

    @property
    def size_bytes(self) -> int:
        return _lib.image_size(self.handle)

    @property
    def epoch(self) -> int:
        return _lib.image_epoch(self.handle)

    @property
    def page_size(self) -> int:
        return _lib.image_page_size(self.handle)

    @property
    def in_memory(self) -> bool:
        return _lib.image_in_memory(self.handle)

    @property
    def has_holes(self) -> bool:
        return _lib.image_has_holes(self.handle)

    @property
    def is_released(self) -> bool:
        return _lib.image_is_released(self.handle)

    @property
    def served(self) -> Served:
        served = _lib.image_served(self.handle)
        return Served(served.data, served.zero, served.messages)

    def holes(self, cursor: int) -> tuple[int, list[tuple[int, int]]]:
        """Return the next cursor, at last the size, and at most HOLES_BATCH holes as (offset, length).

        Walks the file's extents, so it may take milliseconds: not for the event loop.

        Raises:
            ImageFileError: the image was released or became shorter.
        """
        at = _ffi.new("uint64_t *", cursor)
        pairs = _ffi.new("uint64_t[]", 2 * HOLES_BATCH)
        count = _lib.image_holes(self.handle, at, pairs, HOLES_BATCH)
        if count < 0:
            raise ImageFileError(count)
        numbers = _ffi.unpack(pairs, 2 * count) if count else []
        return at[0], list(zip(numbers[::2], numbers[1::2], strict=True))

    def release(self) -> None:
        """Close the file as soon as no read is under way. Idempotent."""
        _lib.image_release(self.handle)


class CatalogTable:
    """The images by id, as page streams look them up."""

    def __init__(self) -> None:
        handle = _lib.image_catalog_new()
        if handle == _ffi.NULL:
            raise MemoryError
        self.handle = _ffi.gc(handle, _lib.image_catalog_free)

    def add(self, image_id: str, file: ImageFile) -> bool:
        """Return False if the id is taken or of an impossible length; else the table owns the C object."""
        name = image_id.encode()
        if not _lib.image_catalog_add(self.handle, name, len(name), file.handle):
            return False
        # The table frees the image, so the file must not do it as well, and must keep the table.
        _ffi.gc(file.handle, None)
        file.owner = self
        return True


class StreamLimits(msgspec.Struct, frozen=True):
    """What one page stream may ask for: outstanding ranges; data bytes in a message; bytes in a range."""

    max_ranges: int
    max_data_bytes: int
    max_range_bytes: int


class OutputBuffer:
    """Memory that messages are written to, shared by all streams of one thread."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.memory = _ffi.new("uint8_t[]", cap)


class NativePageStream:
    """The serving end of one Pages call; daemon/native/page_stream.h has order, slices and thread safety."""

    def __init__(self, catalog: CatalogTable, limits: StreamLimits) -> None:
        sizes = (limits.max_ranges, limits.max_data_bytes, limits.max_range_bytes)
        handle = _lib.ps_new(catalog.handle, sizes)
        if handle == _ffi.NULL:
            raise MemoryError
        # The stream looks images up in the table until it is freed.
        self._catalog = catalog
        self._handle = _ffi.gc(handle, _lib.ps_free)

    @property
    def context_address(self) -> int:
        """First argument of the functions in `native_functions`; valid while this object lives."""
        return int(_ffi.cast("uintptr_t", self._handle))

    def refuse(self, status: int, message: str) -> None:
        """End the stream before it began, with a gRPC status code and a message."""
        _lib.ps_refuse(self._handle, status, message.encode())

    def request(self, message: bytes) -> int:
        """Take a serialised PageRequest; 0, or the gRPC status code that ends the stream."""
        return _lib.ps_request(self._handle, _ffi.from_buffer("uint8_t[]", message), len(message))

    def produce(self, out: OutputBuffer) -> bytes | int:
        """Return the next serialised PageReply, or 0: nothing to do, WOULD_BLOCK, or a negated status."""
        written = _lib.ps_produce(self._handle, out.memory, out.cap)
        if written <= 0:
            return written
        return bytes(_ffi.buffer(out.memory, written))

    def read_blocking(self) -> None:
        """Do the read that `produce` wants; waits for the disk, without the GIL: for another thread."""
        _lib.ps_read_blocking(self._handle)

    @property
    def error(self) -> str:
        """Why the stream ended; empty if it did not."""
        text = _ffi.string(_lib.ps_error(self._handle))
        assert isinstance(text, bytes)
        return text.decode("utf-8", "replace")

    @property
    def message_max_bytes(self) -> int:
        return _lib.ps_message_max(self._handle)

    @property
    def outstanding(self) -> int:
        """Ranges not yet fully answered."""
        return _lib.ps_outstanding(self._handle)

    @property
    def answered_bytes(self) -> int:
        return _lib.ps_answered(self._handle)


def native_functions() -> tuple[int, int, int]:
    """Return the addresses of ps_request, ps_produce and ps_error, for a transport written in C."""
    request, produce, error = (
        int(_ffi.cast("uintptr_t", _ffi.addressof(_image.lib, name)))
        for name in ("ps_request", "ps_produce", "ps_error")
    )
    return request, produce, error
