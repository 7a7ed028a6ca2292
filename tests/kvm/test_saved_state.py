"""A saved state that another machine cannot use is refused before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from postcopyd.errors import Code, ConfigError
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.machine import Machine
from postcopyd.vmm.state import (
    MAX_FILE_BYTES,
    GuestKind,
    MachineState,
    Order,
    Shape,
    read_state,
    write_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
SHAPE = Shape(memory_bytes=16 * PAGE, vcpus=2)


@pytest.fixture
def machine(guest: GuestKind) -> Iterator[Machine]:
    with (
        GuestMemory(MemoryKind.ANONYMOUS, SHAPE.memory_bytes) as memory,
        Machine(SHAPE, memory, guest) as made,
    ):
        made.fill()
        yield made


def test_a_state_survives_its_file(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "state"
    machine.balloon(0, PAGE)
    write_state(path, machine.save())
    assert read_state(path) == machine.save()
    assert list(tmp_path.iterdir()) == [path]


REPLACEMENTS: dict[str, Callable[[MachineState], dict[str, object]]] = {
    "a vCPU too few": lambda state: {"registers": state.registers[:1]},
    "registers too short": lambda state: {"registers": (state.registers[0], state.registers[1][:-1])},
    "another guest program": lambda state: {"program_id": state.program_id ^ 1},
    "memory of no size": lambda state: {"shape": msgspec.structs.replace(state.shape, memory_bytes=0)},
    "memory beyond all bounds": lambda state: {
        "shape": msgspec.structs.replace(state.shape, memory_bytes=1 << 63)
    },
    "a removed range beyond memory": lambda state: {"removed": ((0, 17 * PAGE),)},
    "a removed range before memory": lambda state: {"removed": ((-PAGE, PAGE),)},
    "a version from the future": lambda state: {"version": 2},
}


@pytest.mark.parametrize("what", list(REPLACEMENTS))
def test_a_file_that_says_nonsense_is_refused(machine: Machine, tmp_path: Path, what: str) -> None:
    path = tmp_path / "state"
    state = machine.save()
    write_state(path, msgspec.structs.replace(state, **REPLACEMENTS[what](state)))
    with pytest.raises(ConfigError) as caught:
        read_state(path)
    assert caught.value.code in (Code.GUEST_STATE_FILE, Code.ARGUMENT_INVALID)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"guest":"kvm"}', b" " * (MAX_FILE_BYTES + 1)]
)
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_state(path)
    assert caught.value.code is Code.GUEST_STATE_FILE


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_state(tmp_path / "none")


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(SHAPE, vcpus=1),
        msgspec.structs.replace(SHAPE, seed=2),
        msgspec.structs.replace(SHAPE, order=Order.RANDOM),
        msgspec.structs.replace(SHAPE, passes=1),
        msgspec.structs.replace(SHAPE, spare_bytes=PAGE),
    ],
)
def test_a_state_of_another_shape_is_not_loaded(machine: Machine, other: Shape) -> None:
    with Machine(other, machine.memory, machine.guest) as stranger, pytest.raises(ConfigError):
        machine.load(stranger.save())


def test_a_state_of_the_other_kind_of_guest_is_not_loaded(machine: Machine) -> None:
    state = machine.save()
    other = next(kind for kind in GuestKind if kind is not state.guest)
    with pytest.raises(ConfigError):
        machine.load(msgspec.structs.replace(state, guest=other))
