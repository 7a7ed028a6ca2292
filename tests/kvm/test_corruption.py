"""Wrong bytes are found: by the checker in every kind of page, and by the guest itself in those it visits."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.machine import GuestError, Machine, Phase
from postcopyd.vmm.state import GuestKind, Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
PAGES = 512
SHAPE = Shape(memory_bytes=PAGES * PAGE, vcpus=2, spare_bytes=64 * PAGE, seed=5, passes=0)


@pytest.fixture
def machine(guest: GuestKind) -> Iterator[Machine]:
    """Stopped somewhere after the first pass."""
    with (
        GuestMemory(MemoryKind.ANONYMOUS, SHAPE.memory_bytes) as memory,
        Machine(SHAPE, memory, guest) as made,
    ):
        made.fill()
        made.start()
        assert made.wait_steps(600, timeout_s=30)
        made.pause()
        yield made


def page_of_kind(machine: Machine, kind: str) -> int:
    """Return the index of a page that lies not at an edge and is of this kind, told from its content."""
    for index in range(10, PAGES - 64):
        page = machine.memory.read(index * PAGE, PAGE)
        counter = struct.unpack_from("<Q", page, 8)[0]
        if not any(page):
            found = "zero"
        elif counter < 2**32:
            found = "counter"
        else:
            found = "static"
        if found == kind:
            return index
    raise AssertionError(f"no {kind} page")


@pytest.mark.parametrize("kind", ["zero", "static", "counter"])
@pytest.mark.parametrize("offset", [0, 8, 16, 4095])
def test_one_wrong_bit_is_found_with_its_place(machine: Machine, kind: str, offset: int) -> None:
    index = page_of_kind(machine, kind)
    at = index * PAGE + offset
    machine.memory.write(at, bytes([machine.memory.read(at, 1)[0] ^ 1]))
    result = machine.check()
    assert (result.mismatched_pages, result.first_page, result.first_offset) == (1, index, offset)


def test_all_wrong_pages_are_counted_and_the_first_is_named(machine: Machine) -> None:
    for index in (PAGES - 1, 7, 300):
        at = index * PAGE + 100
        machine.memory.write(at, bytes([machine.memory.read(at, 1)[0] ^ 0x80]))
    result = machine.check()
    assert (result.pages, result.mismatched_pages, result.first_page) == (PAGES, 3, 7)


@pytest.mark.parametrize(("offset", "wrong"), [(0, "id"), (8, "counter")])
def test_the_guest_reports_a_wrong_page_itself(machine: Machine, offset: int, wrong: str) -> None:
    index = page_of_kind(machine, "counter")
    value = struct.unpack("<Q", machine.memory.read(index * PAGE + offset, 8))[0]
    machine.memory.write(index * PAGE + offset, struct.pack("<Q", value - 1))
    machine.start()
    assert machine.wait_steps(600, timeout_s=30)
    machine.pause()
    status = machine.status()
    assert status.first_guest_error == GuestError(page=index, wrong=wrong)
    assert status.guest_errors >= 1
    assert machine.check().mismatched_pages == 1, "the guest counts on, so only what was broken is wrong"


def test_ballooned_pages_must_be_zero(machine: Machine) -> None:
    spare = SHAPE.memory_bytes - SHAPE.spare_bytes
    machine.balloon(spare, 16 * PAGE)
    assert machine.memory.read(spare, 16 * PAGE) == bytes(16 * PAGE)
    assert machine.check().mismatched_pages == 0
    machine.memory.write(spare + 5 * PAGE + 3, b"x")
    result = machine.check()
    assert (result.mismatched_pages, result.first_offset) == (1, 3)
    assert machine.status().phase is Phase.PARKED


def test_a_state_tells_another_machine_what_was_ballooned(machine: Machine) -> None:
    machine.balloon(SHAPE.memory_bytes - SHAPE.spare_bytes, 16 * PAGE)
    with Machine(SHAPE, machine.memory, machine.guest) as other:
        other.load(machine.save())
        assert other.check().mismatched_pages == 0
