"""Huge pages that nobody promised, and a pool to take them from."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from postcopyd.units import MIB, Hva
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind

if TYPE_CHECKING:
    from collections.abc import Iterator

NR_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE = 2 * MIB
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_HUGETLB, MAP_HUGE_2MB = 0x2, 0x20, 0x4000, 0x40000, 21 << 26

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_ulong
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip


class UnreservedMemory(GuestMemory):
    """Huge pages that nobody promised."""

    def __init__(self, len_bytes: int) -> None:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB | MAP_HUGE_2MB
        address = libc.mmap(None, len_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address != ctypes.c_ulong(-1).value, "no huge pages"
        self.kind = MemoryKind.HUGETLB
        self.len_bytes = len_bytes
        self.page_size = HUGE
        self.address = Hva(address)
        self._mapped = True


@contextlib.contextmanager
def reserved(pages: int) -> Iterator[bool]:
    """So many more huge pages in the pool; False if the host has none to give."""
    before = int(NR_HUGE_PAGES.read_text())
    try:
        NR_HUGE_PAGES.write_text(str(before + pages))
        yield int(NR_HUGE_PAGES.read_text()) == before + pages
    finally:
        # Others may have reserved some meanwhile.
        NR_HUGE_PAGES.write_text(str(max(0, int(NR_HUGE_PAGES.read_text()) - pages)))


def free_pages() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("HugePages_Free:")[1].split()[0])
