"""The documented content of guest memory, against a model that shares no code with the C."""

from __future__ import annotations

import struct
from collections import Counter

import pytest

from postcopyd.errors import ConfigError
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.machine import Machine
from postcopyd.vmm.state import GuestKind, Order, Shape

PAGE = 4096
MASK = 2**64 - 1


def model_hash(index: int, seed: int) -> int:
    h = (index * 0x9E3779B97F4A7C15 + seed) & MASK
    h = ((h ^ h >> 32) * 0xBF58476D1CE4E5B9) & MASK
    h = ((h ^ h >> 29) * 0x94D049BB133111EB) & MASK
    return h ^ h >> 32


def words_of(page: bytes) -> tuple[int, ...]:
    return struct.unpack("<512Q", page)


@pytest.mark.parametrize("seed", [0, 7, 2**63])
def test_fill_writes_what_the_documentation_says(seed: int) -> None:
    pages, spare = 800, 100
    shape = Shape(memory_bytes=pages * PAGE, seed=seed, spare_bytes=spare * PAGE)
    with GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory:
        with Machine(shape, memory, GuestKind.PROCESS) as machine:
            machine.fill()
        kinds: Counter[int] = Counter()
        contents = set()
        for index in range(pages):
            page = memory.read(index * PAGE, PAGE)
            h = model_hash(index, seed)
            kinds[min(h >> 61, 2)] += 1
            if h >> 61 == 0:
                assert page == bytes(PAGE)
                continue
            contents.add(page[16:])
            is_counter = h >> 61 > 1 and index < pages - spare
            assert (words_of(page)[:2] == (h, 0)) == is_counter
            assert page.count(0) < PAGE // 8
    assert len(contents) == kinds[1] + kinds[2], "no two pages are alike"
    assert kinds[0] > pages // 16
    assert kinds[1] > pages // 16


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(
    ("pages", "vcpus"), [(1, 1), (2, 1), (3, 2), (5, 5), (257, 1), (1000, 3), (1000, 64)]
)
def test_every_counter_page_is_visited_exactly_once_a_pass(
    guest: GuestKind, order: Order, pages: int, vcpus: int
) -> None:
    shape = Shape(memory_bytes=pages * PAGE, vcpus=vcpus, order=order, seed=3, passes=4)
    with (
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
    ):
        machine.fill()
        before = memory.read(0, shape.memory_bytes)
        machine.start()
        assert machine.wait_stopped(timeout_s=20)
        status = machine.status()
        assert [(vcpu.phase, vcpu.passes) for vcpu in status.vcpus] == [("done", 4)] * vcpus
        after = memory.read(0, shape.memory_bytes)
        assert machine.check().mismatched_pages == 0
    assert status.guest_errors == 0
    expected = bytearray(before)
    for index in range(pages):
        if model_hash(index, 3) >> 61 > 1:
            struct.pack_into("<Q", expected, index * PAGE + 8, 4)
    assert after == expected


@pytest.mark.parametrize(
    "shape",
    [
        Shape(memory_bytes=PAGE + 1),
        Shape(memory_bytes=PAGE, vcpus=2),
        Shape(memory_bytes=PAGE, vcpus=0),
        Shape(memory_bytes=PAGE * 100, vcpus=65),
        Shape(memory_bytes=PAGE, spare_bytes=PAGE),
        Shape(memory_bytes=PAGE, passes=2**40),
        Shape(memory_bytes=PAGE, seed=-1),
        Shape(memory_bytes=PAGE, seed=2**64),
    ],
)
def test_a_shape_that_no_guest_can_have_is_refused(shape: Shape) -> None:
    len_bytes = (shape.memory_bytes + PAGE - 1) // PAGE * PAGE
    with GuestMemory(MemoryKind.ANONYMOUS, len_bytes) as memory, pytest.raises(ConfigError):
        Machine(shape, memory, GuestKind.PROCESS)
