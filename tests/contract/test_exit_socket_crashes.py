"""A daemon that dies over forwarded faults: the next answers every one of them, and every byte is right."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from exit_socket_vmm import NO_EXITLESS, ExitSocketVmm, MemfdGuest
from harness import Host, LocalGuest, content_of
from postcopyd.status import Limits
from postcopyd.units import PAGE_SIZE
from supervised import Supervised
from support import require_uffd

PAGES = 512
CONTENT = content_of(PAGES)
VCPUS = 4
HELD = Limits(push_rate=1)

PLANS = (
    # Requests are looked at and not noted; noted before; installed, its bit clear or not, and not marked.
    ("record.written:5",),
    ("record.written:8", "record.written:9"),
    ("install.done:7",),
    ("install.marked:7", "adopt.woken"),
    ("zero.filled:3", "install.done:20", "record.written:6"),
)


def page_of(page: int) -> bytes:
    return CONTENT[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


async def until_sent(vmm: ExitSocketVmm, guest: LocalGuest, path: str) -> None:
    """Hand over and say how exits come."""
    fds = guest.descriptors if isinstance(guest, MemfdGuest) else [guest.uffd.fileno()]
    await vmm.hand_off(path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
    vmm.listen()


CASES = [*((MemfdGuest, plan) for plan in PLANS), (LocalGuest, PLANS[-1])]


@pytest.mark.parametrize(
    ("kind", "plan"), CASES, ids=[f"{kind.__name__}: {', '.join(plan)}" for kind, plan in CASES]
)
async def test_every_vcpu_is_answered_by_the_next_daemon(
    kind: type[LocalGuest], plan: tuple[str, ...]
) -> None:
    require_uffd()
    async with Host() as host, AsyncExitStack() as stack:
        image = host.image("image", CONTENT)
        _, source = await host.page_server(f"vm={image}")
        daemon = await Supervised.start(stack, host.folder / "d", plan)
        prepared = await daemon.call(lambda client: client.prepare("vm", [source], limits=HELD))
        async with kind(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
            if isinstance(guest, MemfdGuest):
                guest.fill_bitmap()
            await until_sent(vmm, guest, prepared.socket_path)

            async def run(vcpu: int) -> None:
                for page in range(vcpu, PAGES, VCPUS):
                    await vmm.resolve(vcpu, page)
                    if isinstance(guest, MemfdGuest):
                        assert guest.kvm_reads(page) == page_of(page)
                    else:
                        assert await guest.reading(page * PAGE_SIZE) == page_of(page)

            async with asyncio.TaskGroup() as group:
                for vcpu in range(VCPUS):
                    group.create_task(run(vcpu))
            assert await guest.read_all() == CONTENT
            assert await daemon.drained() == []
            assert daemon.starts == len(plan) + 1
