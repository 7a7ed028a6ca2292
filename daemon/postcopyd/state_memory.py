"""What of a session survives its process: one memfd (daemon/native/state.h), and the record that Python keeps in it."""

from __future__ import annotations

import fcntl
import mmap
import os

from ._native.core import ffi, lib
from .crash import crash_point
from .errors import InvariantError

COPY_BYTES = 1 << 20
"""State memory is copied in pieces of this; those that are zero are left out."""


class StateMemory:
    """The memfd that holds what must survive the process (daemon/native/state.h).

    Owns the descriptor and the mapping until `close`. Sealed against shrinking, so that no holder of a duplicate can
    take the mapping away.
    """

    def __init__(self, fd: int, len_bytes: int) -> None:
        self.fd = fd
        self.len_bytes = len_bytes
        self._map = mmap.mmap(fd, len_bytes)
        self.memory = ffi.from_buffer(self._map)

    @classmethod
    def fresh(cls, name: str, pages: int) -> StateMemory:
        """Raises OSError when there is no memory or descriptor."""
        len_bytes: int = lib.pager_state_bytes(pages)
        return cls._made(name, len_bytes)

    @classmethod
    def copied(cls, name: str, fd: int, pages: int) -> StateMemory:
        """A sound copy of state memory for `pages` pages that somebody else holds in `fd`, who may write to it.

        Nothing of theirs is mapped, and it is judged after it was copied.

        Raises:
            InvariantError: it is no such state memory. OSError: no memory or descriptor, or `fd` cannot be read.
        """
        len_bytes: int = lib.pager_state_bytes(pages)
        if (size := os.fstat(fd).st_size) != len_bytes:
            raise InvariantError(f"state memory of {size} bytes; {pages} pages need {len_bytes}")
        state = cls._made(name, len_bytes)
        try:
            _copy(fd, state.fd, len_bytes)
            if not state.is_sound:
                raise InvariantError("the state memory's content makes no sense")
        except BaseException:
            state.close()
            raise
        return state

    @classmethod
    def _made(cls, name: str, len_bytes: int) -> StateMemory:
        fd = os.memfd_create(f"postcopyd-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A memfd is made for everybody; a holder of a read-only duplicate must not open it again to write.
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, len_bytes)
            _seal_size(fd)
            return cls(fd, len_bytes)
        except BaseException:
            os.close(fd)
            raise

    @property
    def is_sound(self) -> bool:
        """Whether a pager can work on it: of a layout we know, with numbers that lead nowhere astray."""
        return lib.state_is_sound(self.memory, self.len_bytes)

    def open_read_only(self) -> int:
        """A new descriptor of the same memory that cannot be written through. Raises OSError."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def descriptor(self) -> bytes:
        """The session descriptor, as it was last set. Raises InvariantError: there is none."""
        if not self.is_sound:
            raise InvariantError("the state memory is of another layout, or damaged")
        header = ffi.cast("struct state_header *", self.memory)
        current = header.descriptor_current & 1
        start = header.descriptor_offset + current * header.descriptor_capacity
        return self._map[start : start + header.descriptor_len[current]]

    @descriptor.setter
    def descriptor(self, text: bytes) -> None:
        """Replace it by one store, so that a process which dies here leaves the old one or the new one."""
        header = ffi.cast("struct state_header *", self.memory)
        if len(text) > header.descriptor_capacity:
            raise InvariantError(f"a session descriptor of {len(text)} bytes does not fit its place")
        spare = (header.descriptor_current & 1) ^ 1
        start = header.descriptor_offset + spare * header.descriptor_capacity
        self._map[start : start + len(text)] = text
        header.descriptor_len[spare] = len(text)
        crash_point("record.written")
        header.descriptor_current = spare

    def unmap(self) -> None:
        """Forget the memory but not the descriptor, which is the caller's again."""
        ffi.release(self.memory)
        self._map.close()
        self.fd = -1

    def close(self) -> None:
        """Unmap and close; idempotent. The pager over it must be closed first."""
        if self.fd < 0:
            return
        fd = self.fd
        self.unmap()
        os.close(fd)


def _copy(source: int, target: int, len_bytes: int) -> None:
    """Raises InvariantError: `source` ends before. OSError."""
    start = 0
    while start < len_bytes:
        chunk = os.pread(source, min(COPY_BYTES, len_bytes - start), start)
        if not chunk:
            raise InvariantError(f"state memory ends after {start} of {len_bytes} bytes")
        # What is zero stays a hole.
        if chunk.count(0) != len(chunk):
            os.pwrite(target, chunk, start)
        start += len(chunk)


def _seal_size(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
