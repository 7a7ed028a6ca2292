"""A VMM that knows nothing of postcopyd: maps a file as its memory and does what its standard input says.

Run with LD_PRELOAD as `python preload_vmm.py`; a line of JSON in, one out.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys

PAGE = 4096
MAP_SHARED, MAP_PRIVATE = 1, 2
PROT_READ_WRITE = 3
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED = 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


class Memory:
    """Commands, by name; addresses are known to the VMM alone, offsets to both."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def map(self, path: str = "", size: int = 0, offset: int = 0, private: bool = False, fd: int = -1) -> int:
        fd = fd if fd >= 0 else os.open(path, os.O_RDWR)
        at = libc.mmap(None, size, PROT_READ_WRITE, MAP_PRIVATE if private else MAP_SHARED, fd, offset)
        assert at not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
        self.at[offset] = at
        return int(at)

    def memfd(self, name: str, size: int, huge: bool = False) -> int:
        fd = os.memfd_create(name, os.MFD_HUGETLB if huge else 0)
        os.ftruncate(fd, size)
        return self.map(size=size, fd=fd)

    def digest(self, size: int, mapping: int = 0, skip: int = 0) -> str:
        return hashlib.sha256(ctypes.string_at(self.at[mapping] + skip, size)).hexdigest()

    def unmap(self, skip: int, size: int) -> int:
        return int(libc.munmap(self.at[0] + skip, size))

    def discard(self, skip: int, size: int) -> int:
        return int(libc.madvise(self.at[0] + skip, size, MADV_DONTNEED))

    def move(self, skip: int, size: int) -> int:
        """Move a part elsewhere; it is mapping -1 then."""
        to = libc.mmap(None, size, PROT_READ_WRITE, MAP_PRIVATE | 0x20, -1, 0)
        moved = libc.mremap(self.at[0] + skip, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        assert moved == to, ctypes.get_errno()
        self.at[-1] = moved
        return 0

    def fork(self) -> str:
        """How a child that reads the memory ends, and whether its own mappings still work."""
        child = os.fork()
        if child == 0:
            libc.munmap(libc.mmap(None, PAGE, PROT_READ_WRITE, MAP_PRIVATE | 0x20, -1, 0), PAGE)
            ctypes.string_at(self.at[0], 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"

    def run(self, argv: list[str]) -> int:
        return subprocess.run(argv, check=False).returncode


def main() -> None:
    memory = Memory()
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(memory, command.pop("command"))(**command)
        print(json.dumps({"ok": True, "result": result}), flush=True)


if __name__ == "__main__":
    main()
