"""What a QEMU says of itself, as far as it decides whether its guest can move."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ..errors import Code, MigrationError
from .preload import RAM_VARIABLE, SOCKET_VARIABLE
from .qmp import COMMAND_TIMEOUT_S

if TYPE_CHECKING:
    from .qmp import Machine

FILE_BACKEND = "memory-backend-file"

Reply = TypeVar("Reply")


class RamBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A memory backend. path: of its file, empty if it has none that others can open."""

    id: str
    size_bytes: int
    shared: bool
    prealloc: bool = False
    path: str = ""


class Shim(msgspec.Struct, frozen=True):
    """What the preload shim of a QEMU was told: sockets by RAM file; `registered`: the files it has."""

    sockets: dict[str, str]
    registered: frozenset[str]


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One QEMU.

    capabilities: of its migration, and whether they are on. pid None: not on this host, so that what only the host knows
    is not known either.
    """

    name: str
    vm_name: str
    version: str
    machine_type: str
    status: str
    vcpu_tids: tuple[int, ...]
    memory_bytes: int
    ram: tuple[RamBlock, ...]
    capabilities: dict[str, bool]
    blockers: tuple[str, ...] = ()
    pid: int | None = None
    shim: Shim | None = None


class _Version(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _VersionReply(msgspec.Struct):
    qemu: _Version


class _Memdev(msgspec.Struct):
    size: int
    share: bool = False
    prealloc: bool = False
    id: str = ""


class _Cpu(msgspec.Struct, rename="kebab"):
    thread_id: int


class _Capability(msgspec.Struct):
    capability: str
    state: bool


class _Memory(msgspec.Struct, rename="kebab"):
    base_memory: int
    plugged_memory: int = 0


class _MigrationInfo(msgspec.Struct, rename="kebab"):
    blocked_reasons: list[str] = []


class _Status(msgspec.Struct):
    status: str


class _Name(msgspec.Struct):
    name: str = ""


class _Property(msgspec.Struct):
    name: str
    type: str


async def examine(machine: Machine) -> MachineFacts:
    """Ask a machine what it is; changes nothing.

    Raises:
        MigrationError: QEMU_REFUSED: an answer has another shape than QEMU's have. QEMU_GONE.
    """
    version = (await _ask(machine, _VersionReply, "query-version")).qemu
    memory = await _ask(machine, _Memory, "query-memory-size-summary")
    capabilities = await _ask(machine, list[_Capability], "query-migrate-capabilities")
    ram = tuple(
        [await _block(machine, memdev) for memdev in await _ask(machine, list[_Memdev], "query-memdev")]
    )
    return MachineFacts(
        name=machine.name,
        vm_name=(await _ask(machine, _Name, "query-name")).name,
        version=f"{version.major}.{version.minor}.{version.micro}",
        machine_type=await _ask(machine, str, "qom-get", path="/machine", property="type"),
        status=(await _ask(machine, _Status, "query-status")).status,
        vcpu_tids=tuple(cpu.thread_id for cpu in await _ask(machine, list[_Cpu], "query-cpus-fast")),
        memory_bytes=memory.base_memory + memory.plugged_memory,
        ram=ram,
        capabilities={entry.capability: entry.state for entry in capabilities},
        blockers=tuple((await _ask(machine, _MigrationInfo, "query-migrate")).blocked_reasons),
        pid=machine.pid,
        shim=None
        if machine.pid is None
        else await asyncio.to_thread(find_shim, machine.pid, [b.path for b in ram]),
    )


async def _block(machine: Machine, memdev: _Memdev) -> RamBlock:
    path = ""
    if memdev.id:
        objects = await _ask(machine, list[_Property], "qom-list", path="/objects")
        if any(o.name == memdev.id and o.type == f"child<{FILE_BACKEND}>" for o in objects):
            path = await _ask(machine, str, "qom-get", path=f"/objects/{memdev.id}", property="mem-path")
    return RamBlock(
        id=memdev.id, size_bytes=memdev.size, shared=memdev.share, prealloc=memdev.prealloc, path=path
    )


async def _ask(machine: Machine, kind: type[Reply], command: str, **arguments: str) -> Reply:
    answer = await machine.execute(command, COMMAND_TIMEOUT_S, **arguments)
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise MigrationError(
            Code.QEMU_REFUSED,
            f"the {machine.name} QEMU answers {command} in a way that is not known: {error}",
        ) from error


def find_shim(pid: int, paths: list[str], proc: Path = Path("/proc")) -> Shim | None:
    """What the shim in process `pid` was told and did; None if it is not in there, or must not be looked at.

    Source: proc(5), environ and smaps; VmFlags `um` is a range whose missing pages a userfaultfd reports.
    """
    try:
        environ = (proc / str(pid) / "environ").read_bytes()
        smaps = (proc / str(pid) / "smaps").read_text(errors="replace")
    except OSError:
        return None
    pairs = (entry.partition("=") for entry in environ.decode(errors="replace").split("\0"))
    variables = {name: value for name, _, value in pairs}
    rams = [ram for ram in variables.get(RAM_VARIABLE, "").split(",") if ram]
    sockets = [path for path in variables.get(SOCKET_VARIABLE, "").split(",") if path]
    if not rams or len(rams) != len(sockets):
        return None
    registered = frozenset(path for path in paths if path and _is_registered(smaps, path))
    return Shim(dict(zip(rams, sockets, strict=True)), registered)


def _is_registered(smaps: str, path: str) -> bool:
    found = re.search(rf"^[0-9a-f]+-.* {re.escape(path)}\n(?:.*\n)*?VmFlags:(.*)", smaps, re.MULTILINE)
    return found is not None and "um" in found[1].split()
