"""vCPU faults forwarded over the hand-off socket are served beside those of the userfaultfd, to the last byte."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from exit_socket_vmm import NO_EXITLESS, ExitSocketVmm, MemfdGuest, frame
from harness import LocalDaemon, LocalGuest, content_of, local_daemon
from postcopyd.handoff.exit_frames import Form
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE
from scripted_source import ScriptedSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

PAGES = 512
CONTENT = content_of(PAGES)
VCPUS = 4
ZERO_PAGE = 5
"""content_of makes every eighth page zero, from this one on."""

# A byte a second: what comes was asked for.
HELD = Limits(push_rate=1)


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def daemon() -> AsyncIterator[LocalDaemon]:
    async with local_daemon() as daemon:
        yield daemon


@pytest.fixture
async def source() -> AsyncIterator[ScriptedSource]:
    async with ScriptedSource(CONTENT) as source:
        yield source


def page_of(page: int) -> bytes:
    return CONTENT[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


async def run_vcpus(vmm: ExitSocketVmm, look: Callable[[int], Awaitable[bytes]]) -> None:
    """Each vCPU takes its share of all pages, and looks at each when it may."""

    async def run(vcpu: int) -> None:
        for page in range(vcpu, PAGES, VCPUS):
            await vmm.resolve(vcpu, page)
            assert await look(page) == page_of(page), page

    async with asyncio.TaskGroup() as group:
        for vcpu in range(VCPUS):
            group.create_task(run(vcpu))


@pytest.mark.parametrize("form", Form)
async def test_every_page_comes_by_exits_and_userfaultfd_together(
    daemon: LocalDaemon, source: ScriptedSource, form: Form
) -> None:
    prepared = await daemon.prepare("vm", source.address, limits=HELD)
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm(form) as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        vmm.listen()
        device = asyncio.ensure_future(guest.read_all())
        await run_vcpus(vmm, lambda page: guest.reading(page * PAGE_SIZE))
        assert await device == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
        # Not all: those that come when all is there are answered without being counted.
        assert done.exits > VCPUS
        assert done.faults > 0
        assert done.handoff_format == "firecracker-exits"
        assert vmm.replies == []


async def test_guest_memfd_is_written_before_its_bits_are_cleared(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    prepared = await daemon.prepare("vm", source.address, limits=HELD)
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), guest.descriptors)
        await vmm.send(NO_EXITLESS[:4])
        vmm.listen()
        guest.fill_bitmap(exempt=(7,))
        await vmm.send(NO_EXITLESS[4:])
        device = asyncio.ensure_future(guest.read_all())

        async def look(page: int) -> bytes:
            return guest.kvm_reads(page)

        await run_vcpus(vmm, look)
        assert await device == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
        assert done.exits > VCPUS
        assert not any(guest.would_exit(page) for page in range(PAGES))


async def test_no_bit_is_cleared_before_the_vmm_has_filled_its_bitmap(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    """What was installed before is cleared then: its bits were filled after its content came."""
    prepared = await daemon.prepare("vm", source.address, limits=HELD)
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), guest.descriptors)
        guest.fill_bitmap()
        filled = bytes(guest.bits)
        early = (200, 300, 301)
        for page in early:
            assert await guest.reading(page * PAGE_SIZE) == page_of(page)
        assert bytes(guest.bits) == filled
        vmm.listen()
        await vmm.send(NO_EXITLESS)
        await vmm.resolve(0, 400)
        assert not any(guest.would_exit(page) for page in early)
        assert guest.would_exit(500)


async def test_a_memory_that_is_all_there_waits_for_its_bitmap(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    prepared = await daemon.prepare("vm", source.address)
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), guest.descriptors)
        there = await daemon.until("vm", lambda status: status.pages_installed == PAGES)
        assert there.state is State.RUNNING
        guest.fill_bitmap()
        await vmm.send(NO_EXITLESS)
        await daemon.until_state("vm", State.COMPLETE)
        assert not any(guest.would_exit(page) for page in range(PAGES))
        assert b"".join(guest.kvm_reads(page) for page in range(PAGES)) == CONTENT


async def test_what_the_guest_wrote_is_not_overwritten_when_its_page_is_asked_for_again(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    prepared = await daemon.prepare("vm", source.address, limits=HELD)
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        guest.fill_bitmap()
        fds = guest.descriptors
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        vmm.listen()
        for page in (200, ZERO_PAGE + 8 * 30):
            await vmm.resolve(0, page)
            await asyncio.to_thread(guest.memory.write, page * PAGE_SIZE, b"guest")
            await vmm.resolve(1, page)
            # A bit that the VMM set again for a page that is there changes nothing about its content.
            guest.bits[page // 8] |= 1 << page % 8
            await vmm.resolve(2, page)
            assert guest.kvm_reads(page)[:5] == b"guest"


async def test_a_vcpu_that_asks_when_all_is_there_gets_its_reply(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    """It may have exited while the last page came."""
    prepared = await daemon.prepare("vm", source.address)
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        await daemon.until_state("vm", State.COMPLETE)
        vmm.listen()
        for page in (0, 1, ZERO_PAGE):
            await vmm.resolve(0, page)
            assert await guest.reading(page * PAGE_SIZE) == page_of(page)


async def test_a_page_that_is_zero_by_right_is_said_to_be(
    daemon: LocalDaemon, source: ScriptedSource
) -> None:
    prepared = await daemon.prepare("vm", source.address, limits=HELD)
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        # The word and a first request lie in one message with the regions.
        behind = NO_EXITLESS + frame(vmm.request(3, 450))
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(prepared.socket_path, guest.memory.address, len(CONTENT), fds, behind)
        vmm.listen()
        assert not (await vmm.resolve(0, 400)).zero
        await guest.discard(400 * PAGE_SIZE, PAGE_SIZE)
        assert (await vmm.resolve(0, 400)).zero
        assert await guest.reading(400 * PAGE_SIZE) == bytes(PAGE_SIZE)
        assert [reply.vcpu for reply in vmm.replies] == [3]
