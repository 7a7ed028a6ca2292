"""The VMM's own userfaultfd: open, agree on features, register memory.

Source: ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from enum import IntFlag
from typing import TYPE_CHECKING, Self

from .._native import vmm as native
from ..errors import KernelError
from .guestmem import GuestMemory, MemoryKind

if TYPE_CHECKING:
    from types import TracebackType

    from ..units import Hva

UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
REGISTER_MODE_MISSING = 1


class Feature(IntFlag):
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8


_NEEDED = {
    MemoryKind.ANONYMOUS: Feature(0),
    MemoryKind.SHARED: Feature.MISSING_SHMEM,
    MemoryKind.MEMFD: Feature.MISSING_SHMEM,
    MemoryKind.FILE: Feature.MISSING_SHMEM,
    MemoryKind.HUGETLB: Feature.MISSING_HUGETLBFS,
}


class Uffd:
    """A userfaultfd, O_NONBLOCK, not yet registered with any memory.

    The last close of a userfaultfd makes absent pages read zero, so the VMM keeps this one until its guest
    has all its pages.
    """

    def __init__(self, features: Feature, *, user_mode_only: bool = False) -> None:
        """Args:
            features: asked for in the handshake; all must be there.
            user_mode_only: faults in the kernel, KVM's included, then fail instead of waiting.

        Raises:
            KernelError: no userfaultfd here, no permission, or a feature the kernel lacks.
        """
        self.features = features
        self._fd = native.userfaultfd(user_mode_only=user_mode_only)
        try:
            self._ioctl("UFFDIO_API", UFFDIO_API, struct.pack("=QQQ", UFFD_API, features, 0))
        except KernelError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close this descriptor, not its duplicates; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _ioctl(self, op: str, request: int, argument: bytes, addr: int = 0, len_bytes: int = 0) -> bytes:
        try:
            return fcntl.ioctl(self._fd, request, argument)
        except OSError as err:
            raise KernelError(op, addr, len_bytes, err.errno or 0) from err

    def register_missing(self, address: Hva, len_bytes: int) -> int:
        """Report faults on absent pages of the range; return the mask of its ioctls. Raises KernelError."""
        argument = struct.pack("=QQQQ", address, len_bytes, REGISTER_MODE_MISSING, 0)
        answer = self._ioctl("UFFDIO_REGISTER", UFFDIO_REGISTER, argument, address, len_bytes)
        return int(struct.unpack("=QQQQ", answer)[3])

    def unregister(self, address: Hva, len_bytes: int) -> None:
        """Absent pages of the range read zero from now on, and their waiters go on. Raises KernelError.

        The wake is for those that the kernel misses: docs/kernel-policy.md, "The end".
        """
        argument = struct.pack("=QQ", address, len_bytes)
        self._ioctl("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, argument, address, len_bytes)
        self._ioctl("UFFDIO_WAKE", UFFDIO_WAKE, argument, address, len_bytes)


def register_memory(
    memory: GuestMemory, features: Feature = Feature.EVENT_REMOVE, *, user_mode_only: bool = False
) -> Uffd:
    """Return a userfaultfd to which all of fresh `memory` is missing. Raises KernelError."""
    uffd = Uffd(features | _NEEDED[memory.kind], user_mode_only=user_mode_only)
    try:
        uffd.register_missing(memory.address, memory.len_bytes)
    except KernelError:
        uffd.close()
        raise
    return uffd
