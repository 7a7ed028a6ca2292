"""A newer daemon goes on with what an older one left: state memory as the first layout wrote it.

`python tests/contract/test_upgrade.py` writes tests/data/state-v1.zlib anew. That is right only before a release: what a
released version wrote must be read for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, Host, content_of, memory_folder
from postcopyd.attachment import Phase, SessionRecord
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Pager
from postcopyd.state_memory import StateMemory
from postcopyd.status import Limits, MigrationSpec
from postcopyd.transport import ImageInfo
from postcopyd.units import PAGE_SIZE, Gpa, Hva, Offset
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.uffd_client import Uffd, register_memory
from stored import StoredDaemon
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import Iterator

STORED = Path(__file__).parents[1] / "data" / "state-v1.zlib"

# What the stored session says: its memory lies at this address, its source listens at this port.
ADDRESS = Hva(0x1000_0000_0000)
PAGES = 64
EPOCH = 0xC0FFEE
SOURCE = "127.0.0.1:50961"
PRESENT = range(24)
REMOVED = range(40, 44)
FAULTED = 7 + 24

UFFDIO_COPY = 0xC028AA03
EVENT_PAGEFAULT, EVENT_REMOVE = 0x12, 0x15
MAP_FIXED_NOREPLACE = 0x100000

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_ulong
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip


class PlacedMemory(GuestMemory):
    """Fresh memory at ADDRESS."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(ADDRESS, PAGES * PAGE_SIZE, protection, flags, -1, 0) == ADDRESS, (
            "the place is taken"
        )
        self.kind = MemoryKind.ANONYMOUS
        self.len_bytes = PAGES * PAGE_SIZE
        self.page_size = PAGE_SIZE
        self.address = ADDRESS
        self._mapped = True


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


async def test_a_session_of_the_first_layout_is_finished(folder: Path) -> None:
    require_uffd()
    content = content_of(PAGES)
    with PlacedMemory() as memory, register_memory(memory) as uffd:
        # The guest has written to what it had.
        written = content_of(len(PRESENT), seed=2)
        await asyncio.to_thread(install, uffd, written)
        state = os.memfd_create("stored-state", os.MFD_CLOEXEC)
        os.write(state, zlib.decompress(STORED.read_bytes()))
        async with Host() as host:
            await host.page_server(f"old={host.image('image', content)}@{EPOCH}", listen=SOURCE)
            kept = {"uffd@old": uffd.fileno(), "state@old": state}
            async with StoredDaemon(folder / "d", kept) as daemon, asyncio.timeout(PATIENCE_S):
                found = await asyncio.to_thread(memory.read, 0, memory.len_bytes)
                await daemon.until_told("FDNAME", "state@old")
        os.close(state)
        expected = bytearray(content)
        expected[: len(written)] = written
        gone = slice(REMOVED.start * PAGE_SIZE, REMOVED.stop * PAGE_SIZE)
        expected[gone] = bytes(len(REMOVED) * PAGE_SIZE)
        assert found == expected


def install(uffd: Uffd, data: bytes) -> None:
    source = ctypes.create_string_buffer(data, len(data))
    argument = struct.pack("=QQQQq", ADDRESS, ctypes.addressof(source), len(data), 0, 0)
    uffd._ioctl("UFFDIO_COPY", UFFDIO_COPY, argument)


def write_stored() -> None:
    """A session in its middle: some pages are there, some asked for, two messages read and not acted upon."""
    with PlacedMemory() as memory, register_memory(memory) as uffd:
        region = MemoryRegion(ADDRESS, memory.len_bytes, Offset(0), PAGE_SIZE, Gpa(0x1_0000_0000))
        record = SessionRecord(
            spec=MigrationSpec("old", (SOURCE,), limits=Limits(push_rate=100 << 20, weight=50)),
            image=ImageInfo("old", EPOCH, memory.len_bytes, 1024, 1 << 20, 1 << 20, False),
            socket_path="/run/postcopyd/vmm/old.sock",
            format_name="framed",
            regions=(region,),
            vmm_pid=4711,
            socket_is_liveness=True,
            began_at=1.7e9,
            phase=Phase.HELD,
            kinds=("state", "uffd"),
            wants_ack=True,
            acknowledged=True,
            mark=1,
        )
        state = StateMemory.fresh("old", PAGES)
        pager = Pager.create(state, record.regions, uffd.fileno())
        pager.mark_present(0, len(PRESENT) * PAGE_SIZE)
        pager.encode_bulk(8 * PAGE_SIZE, 8 * PAGE_SIZE)
        pager.close()
        state.descriptor = record.encode()
        (inbox,) = struct.unpack_from("=Q", os.pread(state.fd, 96, 0), 72)
        fault = struct.pack("=B7xQQI4x", EVENT_PAGEFAULT, 0, ADDRESS + FAULTED * PAGE_SIZE, 12)
        remove = struct.pack(
            "=B7xQQ8x", EVENT_REMOVE, ADDRESS + REMOVED.start * PAGE_SIZE, ADDRESS + REMOVED.stop * PAGE_SIZE
        )
        # The slot before them was worked off already.
        os.pwrite(state.fd, fault + remove, inbox + 32)
        STORED.write_bytes(zlib.compress(os.pread(state.fd, state.len_bytes, 0), 9))
        state.close()


if __name__ == "__main__":
    write_stored()
