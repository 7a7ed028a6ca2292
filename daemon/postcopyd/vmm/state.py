"""What moves from source to destination besides memory: shape, registers, and what was ballooned away.

The file is JSON. Registers are opaque bytes of one vCPU each, in base64.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import msgspec

from .._native import vmm as native
from ..errors import Code, ConfigError
from ..units import PAGE_SIZE, Hva

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

MAX_FILE_BYTES = 4 << 20


class GuestKind(StrEnum):
    """KVM: machine code on vCPUs. PROCESS: plain threads that make the same accesses."""

    KVM = "kvm"
    PROCESS = "process"

    @property
    def code(self) -> native.GuestCode:
        return native.GuestCode[self.name]


class Order(StrEnum):
    SEQUENTIAL = "sequential"
    RANDOM = "random"


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What two machines must have in common for a guest to move from one to the other.

    The guest's content is a function of this alone (daemon/native/vmm_walk.h). Sizes are multiples of 4096;
    `spare_bytes` at the end of memory are never touched by the guest; `passes` 0 walks for ever.
    """

    memory_bytes: int
    vcpus: int = 1
    order: Order = Order.SEQUENTIAL
    seed: int = 1
    passes: int = 0
    spare_bytes: int = 0

    def raw(self) -> native.RawShape:
        return native.RawShape(
            memory_bytes=self.memory_bytes,
            spare_bytes=self.spare_bytes,
            seed=self.seed,
            passes=self.passes,
            vcpus=self.vcpus,
            order=native.OrderCode[self.order.name],
        )


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paused machine without its memory. `removed`: (offset, length) of ranges ballooned away, in bytes."""

    guest: GuestKind
    program_id: int
    shape: Shape
    registers: tuple[bytes, ...]
    removed: tuple[tuple[int, int], ...] = ()
    version: Literal[1] = 1

    def walks(self) -> list[native.Walk]:
        return [native.state_walk(self.guest.code, registers) for registers in self.registers]

    def validate(self) -> None:
        """Raises ConfigError: not a state this VMM can use."""
        native.check_shape(self.shape.raw())
        expected = native.state_bytes(self.guest.code)
        if len(self.registers) != self.shape.vcpus or any(len(r) != expected for r in self.registers):
            raise ConfigError(
                Code.GUEST_STATE_FILE,
                f"the saved state has not {self.shape.vcpus} times {expected} bytes of registers",
            )
        if self.program_id != native.program_id(self.guest.code):
            raise ConfigError(
                Code.GUEST_STATE_FILE,
                "the saved state is of another guest program; use the same postcopyd on both sides",
            )
        for offset, len_bytes in self.removed:
            if offset < 0 or not 0 < len_bytes <= self.shape.memory_bytes - offset:
                raise ConfigError(
                    Code.GUEST_STATE_FILE,
                    f"the saved state has removed {len_bytes} bytes at {offset}, beyond memory",
                )


def removed_map(memory_bytes: int, removed: Iterable[tuple[int, int]]) -> bytearray | None:
    """Return one byte a page, 1 where `removed` covers the page; None where it covers none."""
    pages: bytearray | None = None
    for offset, len_bytes in removed:
        pages = pages or bytearray(memory_bytes // PAGE_SIZE)
        first, end = offset // PAGE_SIZE, (offset + len_bytes) // PAGE_SIZE
        pages[first:end] = b"\x01" * (end - first)
    return pages


def check_memory(state: MachineState, address: Hva, removed: Sequence[tuple[int, int]]) -> native.CheckResult:
    """Compare every byte of the memory at `address` with what it must be where `state` stands.

    Blocks while pages are absent. Raises ConfigError.
    """
    shape = state.shape
    return native.check(shape.raw(), address, state.walks(), removed_map(shape.memory_bytes, removed))


def write_state(path: Path, state: MachineState) -> None:
    """Write so that a reader sees the whole state or none. Raises ConfigError."""
    staged = path.with_name(path.name + ".new")
    try:
        staged.write_bytes(msgspec.json.encode(state))
        os.replace(staged, path)
    except OSError as err:
        raise ConfigError(Code.GUEST_STATE_FILE, f"cannot write the state to {path}: {err.strerror}") from err


def read_state(path: Path) -> MachineState:
    """Raises ConfigError: unreadable, or not a state this VMM can use."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise ConfigError(Code.GUEST_STATE_FILE, f"cannot read the state {path}: {err.strerror}") from err
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            Code.GUEST_STATE_FILE, f"{path} is longer than any saved state ({MAX_FILE_BYTES} bytes)"
        )
    try:
        state = msgspec.json.decode(content, type=MachineState)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise ConfigError(Code.GUEST_STATE_FILE, f"{path} is not a saved state: {err}") from err
    state.validate()
    return state
