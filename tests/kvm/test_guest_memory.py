"""Guest memory of every kind: fresh, served on demand, and given back to the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from local_resolver import LocalResolver

from postcopyd.errors import ConfigError, KernelError
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind, mapped_image
from postcopyd.vmm.machine import Machine
from postcopyd.vmm.state import GuestKind, Shape
from postcopyd.vmm.uffd_client import register_memory
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
HUGE = 2 * MIB
NR_HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
FREE_HUGE = NR_HUGE.with_name("free_hugepages")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Three free huge pages, given back afterwards."""
    try:
        before = NR_HUGE.read_text()
        missing = 3 - int(FREE_HUGE.read_text())
        if missing > 0:
            NR_HUGE.write_text(str(int(before) + missing))
    except OSError as err:
        pytest.skip(f"huge pages cannot be reserved: {err}")
    try:
        if int(FREE_HUGE.read_text()) < 3:
            pytest.skip("the host has no three free huge pages")
        yield
    finally:
        if missing > 0:
            NR_HUGE.write_text(before)


@pytest.fixture(params=[kind for kind in MemoryKind if kind is not MemoryKind.FILE])
def kind(request: pytest.FixtureRequest) -> MemoryKind:
    kind = MemoryKind(request.param)
    if kind is MemoryKind.HUGETLB:
        request.getfixturevalue("huge_pages")
    return kind


def test_a_balloon_makes_pages_zero_and_they_are_never_fetched(guest: GuestKind, kind: MemoryKind) -> None:
    """The guest runs meanwhile; half of the range was there before, half was absent."""
    require_uffd()
    shape = Shape(memory_bytes=2 * HUGE, spare_bytes=HUGE, vcpus=2)
    with (
        GuestMemory(MemoryKind.SHARED, shape.memory_bytes) as source,
        GuestMemory(kind, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
        register_memory(memory) as uffd,
    ):
        machine_of_source = Machine(shape, source, guest)
        machine_of_source.fill()
        machine.load(machine_of_source.save())
        machine_of_source.close()
        with LocalResolver(
            uffd.fileno(), memory.address, memory.len_bytes, source.read, memory.page_size
        ) as resolver:
            machine.start()
            assert memory.read(HUGE, MIB) == source.read(HUGE, MIB)
            machine.balloon(HUGE, HUGE)
            fetched = len(resolver.fetched)
            assert memory.read(HUGE, HUGE) == bytes(HUGE)
            assert machine.wait_steps(2000, timeout_s=60)
            machine.pause()
            assert machine.check().mismatched_pages == 0
            assert machine.status().guest_errors == 0
        assert not [offset for offset in resolver.fetched[fetched:] if offset >= HUGE]


def test_memory_is_fresh_whatever_its_kind(kind: MemoryKind) -> None:
    with GuestMemory(kind, HUGE) as memory:
        assert memory.address % memory.page_size == 0
        assert memory.read(0, HUGE) == bytes(HUGE)


def test_file_memory_is_what_others_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    shape = Shape(memory_bytes=MIB)
    with (
        GuestMemory(MemoryKind.FILE, MIB, path) as memory,
        Machine(shape, memory, GuestKind.PROCESS) as machine,
    ):
        machine.fill()
        assert path.read_bytes() == memory.read(0, MIB)
        assert path.stat().st_mode & 0o077 == 0, "guest memory is nobody else's to read"
        machine.balloon(0, 64 << 10)
    assert path.read_bytes()[: 64 << 10] == bytes(64 << 10)


def test_an_existing_file_is_not_taken_for_fresh_memory(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists"):
        GuestMemory(MemoryKind.FILE, MIB, path)
    assert path.read_bytes() == b"precious"


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    with pytest.raises(ConfigError), mapped_image(path, 2 * MIB):
        pass
    with pytest.raises(ConfigError), mapped_image(tmp_path / "none", MIB):
        pass


def test_missing_huge_pages_are_refused_at_once_not_by_a_signal_later() -> None:
    free = int(FREE_HUGE.read_text())
    with pytest.raises(KernelError, match="ENOMEM"):
        GuestMemory(MemoryKind.HUGETLB, (free + 1) * HUGE)


@pytest.mark.parametrize(("offset", "len_bytes"), [(-1, 1), (MIB, 1), (0, MIB + 1), (MIB - 1, 2), (0, 0)])
def test_accesses_beyond_memory_are_refused(offset: int, len_bytes: int) -> None:
    with GuestMemory(MemoryKind.ANONYMOUS, MIB) as memory:
        with pytest.raises(ConfigError):
            memory.read(offset, len_bytes)
        with pytest.raises(ConfigError):
            memory.write(offset, bytes(len_bytes))
        with pytest.raises(ConfigError):
            memory.discard(offset * 4096, len_bytes * 4096)


def test_closed_memory_refuses_access() -> None:
    memory = GuestMemory(MemoryKind.ANONYMOUS, MIB)
    memory.close()
    memory.close()
    with pytest.raises(ConfigError):
        memory.read(0, 1)
