"""File descriptors with exactly one owner."""

from __future__ import annotations

import errno
import os
from typing import Self

import structlog

from ..errors import InvariantError

log = structlog.get_logger(__name__)

UFFD_KIND = "anon_inode:[userfaultfd]"
MEMFD_KIND_PREFIX = "/memfd:"
GUEST_MEMFD_KIND = "anon_inode:[kvm-gmem]"
"""Source: virt/kvm/guest_memfd.c, Linux 6.8 and later."""


class OwnedFd:
    """A descriptor that is closed exactly once, by whoever holds this, unless somebody takes it over.

    There is no finaliser on purpose: the last close of a userfaultfd makes absent pages read as zeros, so
    no garbage collection may ever do it.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd if self._fd >= 0 else 'closed'})"

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def fileno(self) -> int:
        """Return the number; ownership stays here.

        Raises:
            InvariantError: it was taken or closed.
        """
        if self._fd < 0:
            raise InvariantError("a descriptor was used after it was closed or handed on")
        return self._fd

    def take(self) -> int:
        """Return the number and give up ownership: the caller closes it. Raises InvariantError."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it if it is still owned; idempotent.

        close(2) frees the number even when it reports an error, which a descriptor that a peer chose can make
        it do; so an error is logged and the next descriptor gets its turn.
        """
        if self._fd < 0:
            return
        fd = self.take()
        try:
            os.close(fd)
        except OSError as error:
            log.warning("descriptor.close_failed", fd=fd, errno=errno.errorcode.get(error.errno or 0))


def kind_of(fd: OwnedFd) -> str:
    """Return what the kernel calls the file: `anon_inode:[userfaultfd]`, `/memfd:name (deleted)`, a path."""
    return os.readlink(f"/proc/self/fd/{fd.fileno()}")
