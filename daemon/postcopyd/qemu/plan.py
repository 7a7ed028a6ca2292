"""Whether one QEMU's guest can move to another, and how: decided before anything is changed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

import msgspec

from ..arguments import check_id
from ..errors import Code, ConfigError, MigrationError
from ..units import format_size

if TYPE_CHECKING:
    from .machine import MachineFacts, RamBlock

IGNORE_SHARED = "x-ignore-shared"
"""Shared memory is not part of the stream. Source: QEMU, migration/ram.c, migrate_ignore_shared()."""

PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
CAPABILITIES = (IGNORE_SHARED, PAUSE_BEFORE_SWITCHOVER)


class BlockPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A RAM file and the migration that carries it. socket: where the destination's shim waits for it."""

    migration: str
    size_bytes: int
    source_path: str
    destination_path: str
    socket: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing that is known forbids this."""

    machine_type: str
    memory_bytes: int
    was_running: bool
    blocks: tuple[BlockPlan, ...]
    vcpu_tids: tuple[int, ...]

    def lines(self) -> list[str]:
        """For people, a step a line."""
        ram = [
            f"serve {b.source_path} ({format_size(b.size_bytes)}) as image {b.migration}, and prepare its migration"
            for b in self.blocks
        ]
        handed = [f"let the shim hand over {b.destination_path} at {b.socket}" for b in self.blocks]
        return [
            f"guest: {self.machine_type}, {format_size(self.memory_bytes)}, {len(self.vcpu_tids)} vCPUs",
            *ram,
            f"set {IGNORE_SHARED} on both, {PAUSE_BEFORE_SWITCHOVER} on the source",
            "stop the source's vCPUs" if self.was_running else "leave the source paused, as it is",
            *handed,
            "move the device state",
            "resume the destination" if self.was_running else "leave the destination paused",
            "follow until every page is there, then end the source",
        ]


def make_plan(
    source: MachineFacts, destination: MachineFacts, id: str = "", *, serves_here: bool = True
) -> Plan:
    """Check everything that can be known beforehand.

    Args:
        id: of the migration; by default the name of the source's VM, or its process.
        serves_here: the source's RAM file is served by this host, so it must be there and of the right size.
    Raises:
        MigrationError: QEMU_UNSUITABLE, QEMU_DIFFERENT, QEMU_STATE or QEMU_NO_SHIM, with what to change.
    """
    for facts in (source, destination):
        _check_machine(facts)
    _check_status(source, destination)
    _check_same(source, destination)
    if destination.pid is None:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            "the destination QEMU must run on this host: name its monitor by the path of its UNIX socket",
        )
    id = check_id(id or source.vm_name or f"qemu-{source.pid or destination.pid}")
    pairs = list(zip(sorted(source.ram, key=_by_id), sorted(destination.ram, key=_by_id), strict=True))
    blocks = tuple(
        BlockPlan(
            migration=id if len(pairs) == 1 else check_id(f"{id}.{theirs.id}"),
            size_bytes=theirs.size_bytes,
            source_path=theirs.path,
            destination_path=ours.path,
            socket=_socket_of(destination, ours),
        )
        for theirs, ours in pairs
    )
    if serves_here:
        for block in blocks:
            _check_file(block)
    return Plan(
        machine_type=source.machine_type,
        memory_bytes=source.memory_bytes,
        was_running=source.status == "running",
        blocks=blocks,
        vcpu_tids=destination.vcpu_tids,
    )


def _by_id(block: RamBlock) -> str:
    return block.id


def _check_machine(facts: MachineFacts) -> None:
    missing = [name for name in CAPABILITIES if name not in facts.capabilities]
    if missing:
        _unsuitable(facts, f"version {facts.version} has no {' and no '.join(missing)}; 4.0 or later has")
    if facts.blockers:
        _unsuitable(facts, f"it does not let its guest move: {'; '.join(facts.blockers)}")
    for block in facts.ram:
        if not block.shared or not block.path or os.path.isdir(block.path):
            _unsuitable(
                facts,
                f"its RAM {block.id or '(unnamed)'} is not a shared file; start it with -object "
                f"memory-backend-file,id=ram0,size={block.size_bytes},mem-path=FILE,share=on "
                "-machine memory-backend=ram0, FILE on tmpfs or hugetlbfs",
            )
    if (covered := sum(block.size_bytes for block in facts.ram)) != facts.memory_bytes:
        _unsuitable(
            facts,
            f"it has {format_size(facts.memory_bytes)} of memory, {format_size(covered)} of it in files",
        )


def _unsuitable(facts: MachineFacts, why: str) -> NoReturn:
    raise MigrationError(Code.QEMU_UNSUITABLE, f"the {facts.name} QEMU cannot take part: {why}")


def _check_status(source: MachineFacts, destination: MachineFacts) -> None:
    if source.status not in ("running", "paused"):
        raise MigrationError(
            Code.QEMU_STATE, f"the source QEMU is {source.status}; it must be running or paused"
        )
    if destination.status != "inmigrate":
        raise MigrationError(
            Code.QEMU_STATE,
            f"the destination QEMU is {destination.status} already; start it with -incoming defer",
        )
    if any(block.prealloc for block in destination.ram):
        _unsuitable(destination, "its RAM is filled before it begins; use prealloc=off")


def _check_same(source: MachineFacts, destination: MachineFacts) -> None:
    def layout(facts: MachineFacts) -> str:
        return ", ".join(f"{b.id} {b.size_bytes}" for b in sorted(facts.ram, key=_by_id))

    for what, ours, theirs in (
        ("machine type", source.machine_type, destination.machine_type),
        ("RAM", layout(source), layout(destination)),
        ("number of vCPUs", str(len(source.vcpu_tids)), str(len(destination.vcpu_tids))),
    ):
        if ours != theirs:
            raise MigrationError(
                Code.QEMU_DIFFERENT,
                f"the two machines differ in their {what}: the source has {ours}, the destination {theirs}",
            )
    shared = {b.path for b in source.ram} & {b.path for b in destination.ram}
    if shared and source.pid is not None:
        raise MigrationError(
            Code.QEMU_DIFFERENT, f"both machines have their memory in {shared.pop()}; give each a file"
        )


def _socket_of(destination: MachineFacts, block: RamBlock) -> str:
    """Where the shim will hand `block` over; it must have it, and nobody must listen there yet."""
    shim = destination.shim
    if shim is None or block.path not in shim.sockets or block.path not in shim.registered:
        raise MigrationError(
            Code.QEMU_NO_SHIM,
            f"the destination QEMU does not wait for the pages of {block.path}: start it with "
            f"LD_PRELOAD=libpostcopy-preload.so POSTCOPYD_RAM={block.path} POSTCOPYD_SOCKET=PATH POSTCOPYD_WAIT=1",
        )
    path = shim.sockets[block.path]
    if os.path.lexists(path):
        raise MigrationError(
            Code.QEMU_STATE, f"{path} exists, where the destination waits for its migration; remove it"
        )
    return path


def _check_file(block: BlockPlan) -> None:
    try:
        size = os.stat(block.source_path).st_size
    except OSError as error:
        raise MigrationError(
            Code.QEMU_UNSUITABLE,
            f"the source's RAM file {block.source_path} cannot be served from here ({error.strerror}); "
            "run `postcopyd serve` on its host and name it with --source",
        ) from error
    if size != block.size_bytes:
        raise MigrationError(
            Code.QEMU_DIFFERENT,
            f"the source's RAM file {block.source_path} has {size} bytes, its RAM {block.size_bytes}",
        )
