"""What two QEMUs say of themselves decides whether a guest can move: nothing is changed to find out."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from postcopyd.errors import Code, PostcopyError
from postcopyd.qemu import qmp
from postcopyd.qemu.machine import MachineFacts, RamBlock, Shim, find_shim
from postcopyd.qemu.plan import CAPABILITIES, make_plan

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> MachineFacts:
    ram = tmp_path / "source-ram"
    ram.touch()
    os.truncate(ram, SIZE)
    return MachineFacts(
        name="source",
        vm_name="web1",
        version="7.2.0",
        machine_type="pc-i440fx-7.2-machine",
        status="running",
        vcpu_tids=(11,),
        memory_bytes=SIZE,
        ram=(RamBlock(id="ram0", size_bytes=SIZE, shared=True, path=str(ram)),),
        capabilities=dict.fromkeys(CAPABILITIES, False),
        pid=10,
    )


@pytest.fixture
def destination(source: MachineFacts, tmp_path: Path) -> MachineFacts:
    ram, gate = str(tmp_path / "destination-ram"), str(tmp_path / "gate")
    return msgspec.structs.replace(
        source,
        name="destination",
        status="inmigrate",
        vcpu_tids=(21,),
        pid=20,
        ram=(RamBlock(id="ram0", size_bytes=SIZE, shared=True, path=ram),),
        shim=Shim({ram: gate}, frozenset({ram})),
    )


def change(facts: MachineFacts, **more: object) -> MachineFacts:
    return msgspec.structs.replace(facts, **more)


def block(facts: MachineFacts, **more: object) -> tuple[RamBlock, ...]:
    return (msgspec.structs.replace(facts.ram[0], **more),)


def test_two_equal_machines_make_a_plan(source: MachineFacts, destination: MachineFacts) -> None:
    plan = make_plan(source, destination)
    assert [b.migration for b in plan.blocks] == ["web1"]
    assert plan.vcpu_tids == (21,)
    assert plan.was_running


def test_the_operators_id_goes_before_the_machines_name(
    source: MachineFacts, destination: MachineFacts
) -> None:
    assert make_plan(source, destination, "mine").blocks[0].migration == "mine"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "postmigrate"}, Code.QEMU_STATE),
        ({"capabilities": {"x-ignore-shared": False}}, Code.QEMU_UNSUITABLE),
        ({"blockers": ("a vhost device",)}, Code.QEMU_UNSUITABLE),
        ({"memory_bytes": 2 * SIZE}, Code.QEMU_UNSUITABLE),
        ({"vcpu_tids": (1, 2)}, Code.QEMU_DIFFERENT),
        ({"machine_type": "pc-q35-7.2-machine"}, Code.QEMU_DIFFERENT),
    ],
)
def test_a_source_that_cannot_move_is_refused(
    source: MachineFacts, destination: MachineFacts, changes: dict[str, Any], code: Code
) -> None:
    with pytest.raises(PostcopyError) as refused:
        make_plan(change(source, **changes), destination)
    assert refused.value.code is code


@pytest.mark.parametrize(
    "changes", [{"shared": False}, {"path": ""}, {"path": "/dev/shm"}], ids=["private", "no file", "a folder"]
)
def test_memory_that_is_no_shared_file_is_refused(
    source: MachineFacts, destination: MachineFacts, changes: dict[str, Any]
) -> None:
    with pytest.raises(PostcopyError) as refused:
        make_plan(change(source, ram=block(source, **changes)), destination)
    assert refused.value.code is Code.QEMU_UNSUITABLE


def test_a_ram_file_of_another_size_is_refused(source: MachineFacts, destination: MachineFacts) -> None:
    os.truncate(source.ram[0].path, SIZE - 4096)
    with pytest.raises(PostcopyError, match=f"{SIZE - 4096} bytes") as refused:
        make_plan(source, destination)
    assert refused.value.code is Code.QEMU_DIFFERENT


def test_a_ram_file_on_another_host_needs_a_page_server_there(
    source: MachineFacts, destination: MachineFacts
) -> None:
    away = change(source, ram=block(source, path="/nowhere/ram"))
    with pytest.raises(PostcopyError, match="--source"):
        make_plan(away, destination)
    assert make_plan(away, destination, serves_here=False).blocks[0].source_path == "/nowhere/ram"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "running"}, Code.QEMU_STATE),
        ({"pid": None}, Code.ARGUMENT_INVALID),
        ({"shim": None}, Code.QEMU_NO_SHIM),
        ({"shim": Shim({"/other": "/gate"}, frozenset())}, Code.QEMU_NO_SHIM),
    ],
)
def test_a_destination_that_cannot_take_the_guest_is_refused(
    source: MachineFacts, destination: MachineFacts, changes: dict[str, Any], code: Code
) -> None:
    with pytest.raises(PostcopyError) as refused:
        make_plan(source, change(destination, **changes))
    assert refused.value.code is code


def test_a_shim_that_was_told_but_did_not_register_is_refused(
    source: MachineFacts, destination: MachineFacts
) -> None:
    assert destination.shim is not None
    with pytest.raises(PostcopyError) as refused:
        make_plan(source, change(destination, shim=Shim(destination.shim.sockets, frozenset())))
    assert refused.value.code is Code.QEMU_NO_SHIM


def test_a_socket_that_is_there_already_is_refused(source: MachineFacts, destination: MachineFacts) -> None:
    assert destination.shim is not None
    (gate,) = destination.shim.sockets.values()
    os.symlink("/nowhere", gate)
    with pytest.raises(PostcopyError, match="remove it"):
        make_plan(source, destination)


def test_memory_filled_beforehand_is_refused(source: MachineFacts, destination: MachineFacts) -> None:
    with pytest.raises(PostcopyError, match="prealloc=off"):
        make_plan(source, change(destination, ram=block(destination, prealloc=True)))


def test_one_file_for_both_is_refused(source: MachineFacts, destination: MachineFacts) -> None:
    with pytest.raises(PostcopyError, match="give each a file"):
        make_plan(source, change(destination, ram=source.ram))


def test_a_shim_is_found_by_what_the_kernel_says_of_the_mapping(tmp_path: Path) -> None:
    process = tmp_path / "7"
    process.mkdir()
    (process / "environ").write_bytes(b"A=b\0POSTCOPYD_RAM=/m/a,/m/b\0POSTCOPYD_SOCKET=/s/a,/s/b\0")
    (process / "smaps").write_text(
        "7f00-7f10 rw-s 0 00:1 5    /m/a\nSize: 4 kB\nVmFlags: rd wr um sd \n"
        "7f20-7f30 rw-s 0 00:1 6    /m/b\nSize: 4 kB\nVmFlags: rd wr sd \n"
    )
    shim = find_shim(7, ["/m/a", "/m/b"], tmp_path)
    assert shim == Shim({"/m/a": "/s/a", "/m/b": "/s/b"}, frozenset({"/m/a"}))
    assert find_shim(8, ["/m/a"], tmp_path) is None


async def _serve(path: Path, *says: bytes) -> asyncio.Server:
    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for line in says:
            writer.write(line)
        await reader.read()
        writer.close()

    return await asyncio.start_unix_server(on_connection, path)


@pytest.mark.parametrize(
    "says",
    [(), (b"220 mail ready\r\n",), (b'{"QMP": 1}\r\n',), (b"\0" * 100 + b"\n",)],
    ids=["silent", "mail", "no greeting", "zeros"],
)
async def test_what_is_no_qemu_is_named_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(qmp, "COMMAND_TIMEOUT_S", 0.2)
    path = tmp_path / "qmp"
    async with await _serve(path, *says):
        with pytest.raises(PostcopyError) as failed:
            await qmp.Machine.connect("source", str(path))
    assert failed.value.code is Code.QEMU_UNREACHABLE


async def test_nobody_at_the_monitor_is_named_unreachable(tmp_path: Path) -> None:
    with pytest.raises(PostcopyError) as failed:
        await qmp.Machine.connect("source", str(tmp_path / "qmp"))
    assert failed.value.code is Code.QEMU_UNREACHABLE
