"""A daemon may die at any step: the next one goes on, and the guest gets every byte.

The steps are the crash points found in the code; one that no plan here passes fails the test of completeness.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from harness import PATIENCE_S, Host, LocalGuest, content_of
from postcopyd._native import vmm as native
from postcopyd.errors import Code, HandoffError
from postcopyd.status import Limits
from postcopyd.units import PAGE_SIZE, Hva
from postcopyd.vmm.state import GuestKind
from postcopyd.vmm.uffd_client import Feature
from private_systemd import STANDBY_STEPS
from supervised import Supervised
from support import require_kvm, require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any

in_one_loop = pytest.mark.asyncio(loop_scope="module")

EVENT_REMAP, EVENT_UNMAP = Feature(1 << 2), Feature(1 << 6)
MADV_DONTNEED = 4
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_PRIVATE, MAP_ANONYMOUS = 0x02, 0x20

libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap"):
    getattr(libc, _name).restype = ctypes.c_ulong
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
libc.mremap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
)  # fmt: skip
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

ROOT = Path(__file__).resolve().parents[2] / "daemon"
POINT = re.compile(r'\b(?:CRASH_POINT|crash_point)\("([a-z_.]+)"\)')

CONTENT = content_of(1024)
# So that a guest asks for its pages itself, and the push is nowhere near where the map changes.
SLOW = Limits(push_rate=PAGE_SIZE)
SHAPE = ("--memory", "32M", "--vcpus", "2", "--order", "random")

WHILE_IT_RUNS = (
    ("inbox.read:4",),
    ("inbox.acted:5",),
    ("install.done:7",),
    ("install.marked:7",),
    ("install.done:7", "adopt.lost"),
    ("install.marked:9", "adopt.woken"),
    ("inbox.read:9", "adopt.lost", "inbox.acted:3", "adopt.woken", "install.marked:40"),
)

WHILE_THE_REST_IS_PUSHED = (
    # Installed but not marked: the next process finds the page in place. Its thread is awake and does not ask again.
    ("install.done:7", "install.there"),
    ("complete.told",),
    ("complete.before_release",),
    ("complete.released",),
    ("store.one_removed",),
    ("store.one_removed:2",),
    ("store.one_removed:3",),
    # The last of a session's four records: the end.
    ("record.written:4",),
)

AT_THE_HAND_OFF = (
    ("record.written",),
    ("handoff.before_store",),
    ("store.one_sent",),
    ("store.one_sent:2",),
    ("store.one_sent:3",),
    ("store.one_sent:4",),
    ("store.held",),
    ("record.written:2",),
    ("handoff.before_ack",),
    ("handoff.acknowledged",),
    ("record.written:3",),
    ("store.held", "handoff.before_ack", "handoff.acknowledged", "adopt.woken"),
)

BY_A_CHANGING_MAP = (
    ("zero.marked:2",),
    ("zero.filled",),
    ("extents.written:2",),
    ("extents.written:3",),
    ("inbox.acted:30", "zero.filled", "extents.written"),
)

WITH_EXITS = (
    ("exits.taken",),
    ("exits.taken:4", "exits.taken"),
    ("exits.answered",),
    # Answered and not woken, then taken again, among what comes as messages.
    ("exits.answered:3", "inbox.acted:2", "exits.taken:2", "adopt.woken"),
)

PLANS = (*WHILE_IT_RUNS, *WHILE_THE_REST_IS_PUSHED, *AT_THE_HAND_OFF, *BY_A_CHANGING_MAP, *WITH_EXITS)


def points_in_the_code() -> set[str]:
    files = [*ROOT.glob("native/*.c"), *ROOT.glob("postcopyd/**/*.py")]
    return {name for path in files for name in POINT.findall(path.read_text())}


def test_every_step_has_a_plan_that_dies_there() -> None:
    planned = {point.partition(":")[0] for plan in PLANS for point in plan}
    # A standby needs a service manager that lets it be the main process: systemd/test_daemon_unit.py.
    assert points_in_the_code() == planned | STANDBY_STEPS


def parametrized(plans: tuple[tuple[str, ...], ...]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("plan", plans, ids=", ".join)


@dataclass
class Source:
    """A paused guest's memory and registers, and a page server of it and of `content`."""

    host: Host
    address: str
    ram: Path
    registers: Path
    guest: GuestKind


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def source() -> AsyncIterator[Source]:
    require_uffd()
    guest = GuestKind.KVM if os.access("/dev/kvm", os.R_OK | os.W_OK) else GuestKind.PROCESS
    async with Host() as host:
        ram, registers = await host.paused_source(*SHAPE, "--guest", guest)
        _, address = await host.page_server(
            f"guest={ram}", f"content={host.image('content', CONTENT)}", options=("--keep",)
        )
        yield Source(host, address, ram, registers, guest)


@pytest.fixture
def folder(source: Source, request: pytest.FixtureRequest) -> Path:
    return source.host.folder / str(abs(hash(request.node.name)))


@in_one_loop
@parametrized((*WHILE_IT_RUNS, *WHILE_THE_REST_IS_PUSHED))
async def test_a_guest_survives(plan: tuple[str, ...], source: Source, folder: Path) -> None:
    await survive(plan, source, folder, "--guest", source.guest)


@in_one_loop
@parametrized(WITH_EXITS)
async def test_a_guest_whose_faults_are_exits_survives(
    plan: tuple[str, ...], source: Source, folder: Path
) -> None:
    require_kvm()
    await survive(plan, source, folder, "--faults", "exits")


async def survive(plan: tuple[str, ...], source: Source, folder: Path, *options: str) -> None:
    async with AsyncExitStack() as stack:
        daemon = await Supervised.start(stack, folder, plan)
        prepared = await daemon.call(lambda client: client.prepare("guest", [source.address], limits=SLOW))
        vmm = await source.host.destination(prepared.socket_path, source.registers, *SHAPE, *options)
        stack.push_async_callback(vmm.end)
        if plan not in WHILE_THE_REST_IS_PUSHED:
            await daemon.started(len(plan) + 1)
        assert await daemon.drained() == []
        assert daemon.starts == len(plan) + 1
        await vmm.command("wait", steps=100, timeout_s=PATIENCE_S)
        await vmm.command("pause")
        check = await vmm.command("check", ram=str(source.ram), state=str(source.registers))
        assert (check["mismatched_pages"], check["source_mismatched_pages"]) == (0, 0)
        assert check["guest_errors"] == 0


@in_one_loop
@parametrized(AT_THE_HAND_OFF)
async def test_a_hand_off_is_completed_or_repeated(
    plan: tuple[str, ...], source: Source, folder: Path
) -> None:
    async with AsyncExitStack() as stack:
        daemon = await Supervised.start(stack, folder, plan)
        prepared = await daemon.call(lambda client: client.prepare("content", [source.address]))
        async with LocalGuest(len(CONTENT)) as guest:
            await handed_over(guest, prepared.socket_path)
            assert await guest.read_all() == CONTENT
            assert await daemon.drained() == []
        assert daemon.starts == len(plan) + 1


async def handed_over(guest: LocalGuest, path: str) -> None:
    """Hand over until it is acknowledged, as a VMM does whose connection ended without an answer."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await guest.hand_off(path)
            except HandoffError as error:
                if error.code is not Code.VMM_HANDOFF_UNANSWERED:
                    raise
                # Nobody tells when the next daemon listens.
                await asyncio.sleep(0.02)


@in_one_loop
@parametrized(BY_A_CHANGING_MAP)
async def test_removals_and_moves_are_not_forgotten(
    plan: tuple[str, ...], source: Source, folder: Path
) -> None:
    async with AsyncExitStack() as stack:
        daemon = await Supervised.start(stack, folder, plan)
        prepared = await daemon.call(lambda client: client.prepare("content", [source.address], limits=SLOW))
        async with MovingGuest(len(CONTENT)) as guest:
            await handed_over(guest, prepared.socket_path)
            async with asyncio.timeout(PATIENCE_S):
                await change_the_map(guest)
            assert await daemon.drained() == []
            async with asyncio.timeout(PATIENCE_S):
                await compare_the_map(guest)
        assert daemon.starts == len(plan) + 1


def pages(first: int, count: int) -> slice:
    return slice(first * PAGE_SIZE, (first + count) * PAGE_SIZE)


REMOVED = (pages(410, 10), pages(500, 1), pages(708, 2))
UNMAPPED = pages(600, 16)
MOVED = pages(700, 32)


async def change_the_map(guest: MovingGuest) -> None:
    """Pages are read, given back, unmapped and moved, in places that nothing else asks for."""
    for page in range(300, 400, 3):
        assert await guest.read(pages(page, 1)) == CONTENT[pages(page, 1)]
    assert await guest.read(REMOVED[1]) == CONTENT[REMOVED[1]]
    for gone in REMOVED[:2]:
        await guest.remove(gone)
        assert not any(await guest.read(gone))
    await guest.unmap(UNMAPPED)
    await guest.move(MOVED)
    assert await guest.read(pages(702, 2)) == CONTENT[pages(702, 2)]
    await guest.remove(REMOVED[2])
    assert not any(await guest.read(REMOVED[2]))


async def compare_the_map(guest: MovingGuest) -> None:
    expected = bytearray(CONTENT)
    for gone in REMOVED:
        expected[gone] = bytes(gone.stop - gone.start)
    for kept in (
        slice(0, UNMAPPED.start),
        slice(UNMAPPED.stop, MOVED.start),
        MOVED,
        slice(MOVED.stop, len(CONTENT)),
    ):
        assert await guest.read(kept) == expected[kept]


class MovingGuest(LocalGuest):
    """Memory whose owner unmaps some of it and moves some elsewhere; places are named as at the hand-off."""

    def __init__(self, len_bytes: int) -> None:
        super().__init__(len_bytes, features=Feature.EVENT_REMOVE | EVENT_REMAP | EVENT_UNMAP)
        self._moved = slice(0, 0)
        self._moved_to = 0

    async def __aexit__(self, *details: object) -> None:
        if self._moved_to:
            self.uffd.unregister(Hva(self._moved_to), self._moved.stop - self._moved.start)
        await super().__aexit__(*details)
        if self._moved_to:
            libc.munmap(self._moved_to, self._moved.stop - self._moved.start)

    def _address(self, place: slice) -> Hva:
        if self._moved.start <= place.start < self._moved.stop:
            return Hva(self._moved_to + place.start - self._moved.start)
        return Hva(self.memory.address + place.start)

    async def read(self, place: slice) -> bytes:
        return await asyncio.to_thread(native.read, self._address(place), 0, place.stop - place.start)

    async def remove(self, place: slice) -> None:
        len_bytes = place.stop - place.start
        await self._call(libc.madvise, self._address(place), len_bytes, MADV_DONTNEED)

    async def unmap(self, place: slice) -> None:
        await self._call(libc.munmap, self._address(place), place.stop - place.start)

    async def move(self, place: slice) -> None:
        len_bytes = place.stop - place.start
        # Reserved first, so that nothing else comes to lie where a read may be under way.
        target = libc.mmap(None, len_bytes, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        source = self._address(place)
        moved = await asyncio.to_thread(
            libc.mremap, source, len_bytes, len_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target
        )
        assert moved == target
        self._moved, self._moved_to = place, target

    @staticmethod
    async def _call(function: Callable[..., int], *arguments: int) -> None:
        assert await asyncio.to_thread(function, *arguments) == 0, os.strerror(ctypes.get_errno())
