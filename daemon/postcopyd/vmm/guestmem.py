"""The VMM's guest memory: where it comes from, and giving parts of it back."""

from __future__ import annotations

import os
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from .._native import vmm as native
from ..errors import Code, ConfigError, KernelError
from ..units import HUGE_PAGE_SIZE, PAGE_SIZE, Hva

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType


class MemoryKind(StrEnum):
    ANONYMOUS = "anonymous"
    SHARED = "shared"
    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    FILE = "file"


_MAP_CODES = {
    MemoryKind.ANONYMOUS: native.MapCode.PRIVATE,
    MemoryKind.SHARED: native.MapCode.SHARED,
    MemoryKind.MEMFD: native.MapCode.FILE,
    MemoryKind.HUGETLB: native.MapCode.HUGETLB,
    MemoryKind.FILE: native.MapCode.FILE,
}


class GuestMemory:
    """One mapping, fresh and untouched: it reads zero, and a userfaultfd sees every page missing.

    Attributes:
        address: of the first byte, aligned to `page_size`.
        page_size: 4096, or 2 MiB for HUGETLB.
    """

    def __init__(self, kind: MemoryKind, len_bytes: int, path: Path | None = None) -> None:
        """Map `len_bytes`, whole pages. FILE creates `path`, which must not exist, and leaves it.

        Raises:
            ConfigError: the size, or the file.
            KernelError: no memory, or not enough free huge pages.
        """
        self.kind = kind
        self.len_bytes = len_bytes
        self.page_size = HUGE_PAGE_SIZE if kind is MemoryKind.HUGETLB else PAGE_SIZE
        if len_bytes <= 0 or len_bytes % self.page_size:
            raise ConfigError(
                Code.ARGUMENT_INVALID,
                f"{kind} memory is whole pages of {self.page_size} bytes, not {len_bytes} bytes",
            )
        if (kind is MemoryKind.FILE) != (path is not None):
            raise ConfigError(
                Code.ARGUMENT_INVALID, f"memory of kind {kind} and a path {path} do not go together"
            )
        fd = _open_backing(kind, len_bytes, path)
        try:
            self.address: Hva = native.map_memory(_MAP_CODES[kind], len_bytes, fd)
        finally:
            if fd >= 0:
                os.close(fd)
        self._mapped = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap; idempotent. No machine may use the memory any more."""
        if self._mapped:
            self._mapped = False
            native.unmap(self.address, self.len_bytes)

    def _require(self, offset: int, len_bytes: int, alignment: int) -> None:
        if not self._mapped:
            raise ConfigError(Code.ARGUMENT_INVALID, "guest memory was closed")
        inside = offset >= 0 and 0 < len_bytes <= self.len_bytes - offset
        if not inside or offset % alignment or len_bytes % alignment:
            raise ConfigError(
                Code.ARGUMENT_INVALID,
                f"{len_bytes} bytes at {offset} do not lie in {self.len_bytes} bytes of memory, or not on"
                f" whole units of {alignment}",
            )

    def read(self, offset: int, len_bytes: int) -> bytes:
        """Blocks while a page of the range is absent. Raises ConfigError."""
        self._require(offset, len_bytes, 1)
        return native.read(self.address, offset, len_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Blocks while a page of the range is absent. Raises ConfigError."""
        self._require(offset, len(data), 1)
        native.write(self.address, offset, data)

    def discard(self, offset: int, len_bytes: int) -> None:
        """Give whole pages back to the kernel; they read zero afterwards.

        Blocks until the REMOVE event is read, where memory has a userfaultfd that asked for it.

        Raises:
            ConfigError: not whole pages of this memory.
            KernelError: any refusal.
        """
        self._require(offset, len_bytes, self.page_size)
        native.discard(_MAP_CODES[self.kind], Hva(self.address + offset), len_bytes)


def _open_backing(kind: MemoryKind, len_bytes: int, path: Path | None) -> int:
    if kind not in (MemoryKind.MEMFD, MemoryKind.FILE):
        return -1
    try:
        if path is None:
            fd = os.memfd_create("postcopyd-guest", os.MFD_CLOEXEC)
        else:
            # A file with older content would not be fresh memory.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise ConfigError(
            Code.IMAGE_UNREADABLE, f"cannot create the memory file {path}: {err.strerror}"
        ) from err
    try:
        os.ftruncate(fd, len_bytes)
    except OSError as err:
        os.close(fd)
        raise KernelError("sizing a memory file", 0, len_bytes, err.errno or 0) from err
    return fd


@contextmanager
def mapped_image(path: Path, len_bytes: int) -> Iterator[Hva]:
    """Map the file of another VMM's memory for reading.

    Raises:
        ConfigError: unreadable, or not of exactly `len_bytes`.
        KernelError: mmap was refused.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise ConfigError(Code.IMAGE_UNREADABLE, f"cannot open the image {path}: {err.strerror}") from err
    try:
        size = os.fstat(fd).st_size
        if size != len_bytes:
            raise ConfigError(
                Code.IMAGE_UNREADABLE,
                f"the image {path} has {size} bytes, and the guest's memory {len_bytes}",
            )
        address = native.map_readonly(len_bytes, fd)
    finally:
        os.close(fd)
    try:
        yield address
    finally:
        native.unmap(address, len_bytes)
