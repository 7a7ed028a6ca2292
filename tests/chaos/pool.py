"""A pool of huge pages that is empty while a guest needs some: its threads wait, and nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.host import PAGES_ADDRESS, PATIENCE_S, UNIT
from huge_memory import HUGE, UnreservedMemory, free_pages, reserved
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.handoff_client import hand_off
from postcopyd.vmm.uffd_client import register_memory

if TYPE_CHECKING:
    from chaos.host import DestinationHost
    from chaos.tally import Tally

PAGES = 8


async def exhaust_huge_pages(host: DestinationHost, id: str, image: Path, tally: Tally) -> None:
    """Somebody else holds all but two of the pool's pages; the daemon dies meanwhile; then they are given back."""
    with reserved(PAGES) as enough:
        if enough:
            hog = GuestMemory(MemoryKind.HUGETLB, (free_pages() - 2) * HUGE)
            try:
                await _arrive_meanwhile(host, id, image, hog, tally)
            finally:
                hog.close()
            tally.short_pools += 1


async def _arrive_meanwhile(
    host: DestinationHost, id: str, image: Path, hog: GuestMemory, tally: Tally
) -> None:
    # A reservation is enough: the kernel gives to no one else what was promised.
    prepared = await host.call(lambda client: client.prepare(id, [PAGES_ADDRESS]))
    path = Path(f"/proc/{host.pid}/root{prepared.socket_path}")
    with UnreservedMemory(PAGES * HUGE) as memory, register_memory(memory) as uffd:
        sock = await asyncio.to_thread(hand_off, path, uffd, memory)
        assert sock is not None
        reading = asyncio.ensure_future(asyncio.to_thread(memory.read, 0, memory.len_bytes))
        try:
            with sock:
                await host.until(id, lambda status: status.memory_short)
                await host.kill(UNIT)
                tally.kills += 1
                await host.until(id, lambda status: status.memory_short)
                hog.close()
                async with asyncio.timeout(PATIENCE_S):
                    content = await asyncio.shield(reading)
                await host.until(id, lambda status: status.state.is_final)
        finally:
            uffd.unregister(memory.address, memory.len_bytes)
            await reading
    tally.migrations += 1
    tally.lost_bytes += await asyncio.to_thread(_differences, content, image)
    tally.leaked_fds += await host.held()


def _differences(content: bytes, image: Path) -> int:
    with image.open("rb") as file:
        expected = file.read(len(content))
    return sum(a != b for a, b in zip(content, expected, strict=True)) if content != expected else 0
