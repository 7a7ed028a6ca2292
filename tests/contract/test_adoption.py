"""What a daemon makes of what the store kept: it serves what can be served, and closes nothing that a guest may need."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from harness import Host, LocalGuest, content_of, memory_folder
from postcopyd.attachment import Phase, SessionRecord
from postcopyd.errors import Code, PostcopyError
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Pager
from postcopyd.state_memory import StateMemory
from postcopyd.status import MigrationSpec
from postcopyd.transport import ImageInfo
from postcopyd.units import PAGE_SIZE, Offset
from stored import StoredDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = 64
CONTENT = content_of(PAGES)
EPOCH = 0x1234


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def record_of(guest: LocalGuest, address: str, **changes: object) -> SessionRecord:
    region = MemoryRegion(guest.memory.address, guest.memory.len_bytes, Offset(0), PAGE_SIZE)
    values: dict[str, object] = {
        "spec": MigrationSpec("vm", (address,)),
        "image": ImageInfo("vm", EPOCH, guest.memory.len_bytes, 1024, 1 << 20, 1 << 20, False),
        "socket_path": "/nowhere/vm.sock",
        "format_name": "framed",
        "regions": (region,),
        "vmm_pid": os.getpid(),
        "socket_is_liveness": True,
        "began_at": 0.0,
        "kinds": ("state", "uffd"),
        **changes,
    }
    return SessionRecord(**values)


def state_of(guest: LocalGuest, record: SessionRecord) -> StateMemory:
    state = StateMemory.fresh("vm", PAGES)
    Pager.create(state, record.regions, guest.uffd.fileno()).close()
    state.descriptor = record.encode()
    return state


async def test_a_session_is_served_on_to_its_end_and_let_go(folder: Path) -> None:
    async with Host() as host, LocalGuest(len(CONTENT)) as guest:
        _, address = await host.page_server(f"vm={host.image('image', CONTENT)}@{EPOCH}")
        state = state_of(guest, record_of(guest, address))
        kept = {"uffd@vm": guest.uffd.fileno(), "state@vm": state.fd}
        async with StoredDaemon(folder / "d", kept) as daemon:
            assert await guest.read_all() == CONTENT
            await daemon.until_told("FDNAME", "state@vm")
            # The state tells what the others mean, so it is the last to go.
            assert daemon.removed == ["uffd@vm", "state@vm"]
        state.close()


@pytest.mark.parametrize(
    ("phase", "kinds", "kept_kinds", "wants_ack"),
    [
        # Its memory was released, and the daemon died over emptying the store.
        (Phase.ENDED, ("state", "uffd"), ("state",), True),
        (Phase.ENDED, ("state", "uffd"), ("state", "uffd"), True),
        # The store never held all of it: its VMM was told nothing, and hands over again.
        (Phase.STORING, ("state", "uffd"), ("state",), True),
        (Phase.STORING, ("state", "uffd", "socket"), ("state", "uffd"), True),
        (Phase.STORING, ("state", "uffd"), ("state",), False),
    ],
)
async def test_leftovers_that_nobody_needs_are_let_go(
    folder: Path, phase: Phase, kinds: tuple[str, ...], kept_kinds: tuple[str, ...], wants_ack: bool
) -> None:
    async with LocalGuest(len(CONTENT)) as guest:
        record = record_of(guest, "127.0.0.1:1", phase=phase, kinds=kinds, wants_ack=wants_ack)
        state = state_of(guest, record)
        fds = {"uffd": guest.uffd.fileno(), "state": state.fd}
        async with StoredDaemon(folder / "d", {f"{kind}@vm": fds[kind] for kind in kept_kinds}) as daemon:
            assert sorted(daemon.removed) == sorted(f"{kind}@vm" for kind in kept_kinds)
            async with daemon.client() as client:
                assert await client.list() == []
        state.close()


async def test_a_vmm_that_waits_for_no_answer_is_served_with_what_is_there(folder: Path) -> None:
    async with Host() as host, LocalGuest(len(CONTENT)) as guest:
        _, address = await host.page_server(f"vm={host.image('image', CONTENT)}@{EPOCH}")
        record = record_of(guest, address, phase=Phase.STORING, kinds=("state", "uffd", "pidfd"))
        state = state_of(guest, record)
        async with StoredDaemon(folder / "d", {"uffd@vm": guest.uffd.fileno(), "state@vm": state.fd}):
            assert await guest.read_all() == CONTENT
        state.close()


def another_layout(state: StateMemory) -> None:
    os.pwrite(state.fd, b"\xff", 8)


def another_record(state: StateMemory) -> None:
    state.descriptor = b'{"version": 2}'


def no_record(state: StateMemory) -> None:
    state.descriptor = b"\xff\xfe"


@pytest.mark.parametrize("damage", [another_layout, another_record, no_record])
async def test_a_session_of_another_version_is_reported_and_kept(folder: Path, damage: object) -> None:
    assert callable(damage)
    async with LocalGuest(len(CONTENT)) as guest:
        state = state_of(guest, record_of(guest, "127.0.0.1:1"))
        damage(state)
        kept = {"uffd@vm": guest.uffd.fileno(), "state@vm": state.fd}
        async with StoredDaemon(folder / "d", kept) as daemon:
            assert daemon.removed == []
            assert "anon_inode:[userfaultfd]" in daemon.open_files()
            reported = [json.loads(line) for line in daemon.log.splitlines() if "session.not_adopted" in line]
            assert [(entry["migration"], entry["code"]) for entry in reported] == [
                ("vm", Code.STORE_INCOMPLETE)
            ]
            # Its names in the store are taken: another session of this id would let go of it.
            async with daemon.client() as client:
                with pytest.raises(PostcopyError) as raised:
                    await client.prepare("vm", ["127.0.0.1:1"])
                assert raised.value.code is Code.MIGRATION_EXISTS
        state.close()


async def test_a_userfaultfd_without_its_state_is_kept(folder: Path) -> None:
    async with (
        LocalGuest(len(CONTENT)) as guest,
        StoredDaemon(folder / "d", {"uffd@vm": guest.uffd.fileno()}) as daemon,
    ):
        assert "anon_inode:[userfaultfd]" in daemon.open_files()
        assert daemon.removed == []


async def test_one_unusable_session_does_not_keep_the_others_from_their_pages(folder: Path) -> None:
    async with Host() as host, LocalGuest(len(CONTENT)) as guest, LocalGuest(len(CONTENT)) as lost:
        _, address = await host.page_server(f"vm={host.image('image', CONTENT)}@{EPOCH}")
        state = state_of(guest, record_of(guest, address))
        kept = {
            "uffd@lost": lost.uffd.fileno(),
            "uffd@vm": guest.uffd.fileno(),
            "state@vm": state.fd,
        }
        async with StoredDaemon(folder / "d", kept):
            assert await guest.read_all() == CONTENT
        state.close()
