"""Real userfaultfds for tests."""

from __future__ import annotations

import ctypes
import os

from support import require_uffd

_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
USER_MODE_ONLY = 1
_libc = ctypes.CDLL(None, use_errno=True)


def open_uffd(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """Return a new userfaultfd for faults in user mode only, which needs no privilege; the caller closes it."""
    fd = int(_libc.syscall(_NR_USERFAULTFD, flags | USER_MODE_ONLY))
    if fd < 0:
        error = ctypes.get_errno()
        require_uffd()
        raise OSError(error, os.strerror(error))
    return fd
