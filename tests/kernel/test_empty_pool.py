"""A pool of huge pages that runs empty under a guest costs it time, not content.

Linux answers EEXIST to an install for which the pool has no page, just as where a page is there already.
"""

from __future__ import annotations

import asyncio

import pytest

from harness import PATIENCE_S, Host, content_of
from huge_memory import HUGE, UnreservedMemory, free_pages, reserved
from postcopyd.status import State
from postcopyd.units import PAGE_SIZE
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.handoff_client import hand_off
from postcopyd.vmm.uffd_client import register_memory
from support import require_uffd

PAGES = 5


async def test_a_guest_waits_for_huge_pages_and_gets_its_content() -> None:
    require_uffd()
    content = content_of(PAGES * HUGE // PAGE_SIZE)
    with reserved(PAGES) as enough:
        if not enough:
            pytest.skip(f"no {PAGES} huge pages are to be had")
        # A reservation is enough: the kernel gives to no one else what was promised.
        hog = GuestMemory(MemoryKind.HUGETLB, (free_pages() - 2) * HUGE)
        async with Host() as host:
            _, address = await host.page_server(f"vm={host.image('image', content)}")
            daemon = await host.daemon()
            prepared = await daemon.client.prepare("vm", [address])
            with UnreservedMemory(PAGES * HUGE) as memory, register_memory(memory) as uffd:
                sock = await asyncio.to_thread(hand_off, host.folder / prepared.socket_path, uffd, memory)
                try:
                    # Nobody touches the memory yet: taken for present, an absent page would end this process.
                    short = await daemon.until("vm", lambda status: status.memory_short)
                    assert short.pages_installed <= 2
                    hog.close()
                    async with asyncio.timeout(PATIENCE_S):
                        assert await asyncio.to_thread(memory.read, 0, memory.len_bytes) == content
                    done = await daemon.until_state("vm", State.COMPLETE)
                    assert not done.memory_short
                finally:
                    hog.close()
                    if sock is not None:
                        sock.close()
