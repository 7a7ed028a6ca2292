"""A guest that is paused, moved and resumed goes on as if nothing had happened, to the byte."""

from __future__ import annotations

import itertools
import os
import select
import threading

import pytest
from local_resolver import MESSAGE_BYTES, LocalResolver

from postcopyd.errors import KernelError, MigrationError
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.machine import Machine, Phase
from postcopyd.vmm.state import GuestKind, MachineState, Order, Shape
from postcopyd.vmm.uffd_client import Feature, Uffd, register_memory
from support import require_kvm, require_uffd

MIB = 1 << 20


def paused_source(memory: GuestMemory, shape: Shape, guest: GuestKind, steps: int = 500) -> MachineState:
    """Run a guest for a while; return its state. It is proven to be consistent with its memory."""
    with Machine(shape, memory, guest) as machine:
        machine.fill()
        machine.start()
        assert machine.wait_steps(steps, timeout_s=30)
        machine.pause()
        assert machine.check().mismatched_pages == 0
        return machine.save()


def resolver_for(uffd: Uffd, memory: GuestMemory, source: GuestMemory) -> LocalResolver:
    return LocalResolver(uffd.fileno(), memory.address, memory.len_bytes, source.read, memory.page_size)


def await_faults(uffd: Uffd, count: int) -> None:
    """Return when `count` threads wait for a page that nobody serves. Their messages are lost with this."""
    poll = select.poll()
    poll.register(uffd, select.POLLIN)
    seen = 0
    while seen < count:
        assert poll.poll(30_000), f"{seen} of {count} vCPUs came to wait"
        seen += len(os.read(uffd.fileno(), count * MESSAGE_BYTES)) // MESSAGE_BYTES


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_a_moved_guest_continues_without_a_wrong_byte(guest: GuestKind, vcpus: int, order: Order) -> None:
    require_uffd()
    shape = Shape(memory_bytes=3 * MIB, vcpus=vcpus, order=order, seed=11)
    with (
        GuestMemory(MemoryKind.SHARED, shape.memory_bytes) as source,
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
    ):
        state = paused_source(source, shape, guest)
        with register_memory(memory) as uffd, resolver_for(uffd, memory, source) as resolver:
            machine.load(state)
            machine.start()
            assert machine.wait_steps(5000, timeout_s=60)
            machine.pause()
            assert machine.check().mismatched_pages == 0
            assert machine.status().guest_errors == 0
        assert len(resolver.fetched) == len(set(resolver.fetched)) == shape.memory_bytes // 4096


def test_state_is_exact_at_any_instruction() -> None:
    """A tiny guest, so that pauses fall everywhere in its loop, also between count and tick."""
    require_kvm()
    shape = Shape(memory_bytes=64 * 4096, vcpus=1, order=Order.RANDOM)
    with (
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, GuestKind.KVM) as machine,
    ):
        machine.fill()
        visited = set()
        # About 4 % of pauses fall between count and tick; 5000 without one do not happen.
        for count in itertools.count(1):
            machine.start()
            assert machine.wait_steps(1, timeout_s=60), "the pause came before the guest"
            machine.pause()
            visited.add(machine.save().walks()[0].visited)
            assert machine.check().mismatched_pages == 0
            if (count >= 300 and len(visited) == 2) or count == 5000:
                break
        assert visited == {False, True}
        assert machine.status().guest_errors == 0


@pytest.mark.parametrize("kind", [MemoryKind.ANONYMOUS, MemoryKind.SHARED, MemoryKind.MEMFD])
def test_a_vcpu_that_waits_for_a_page_can_be_paused_and_moved(guest: GuestKind, kind: MemoryKind) -> None:
    require_uffd()
    shape = Shape(memory_bytes=1 * MIB, vcpus=2, order=Order.RANDOM)
    with (
        GuestMemory(MemoryKind.SHARED, shape.memory_bytes) as source,
        GuestMemory(kind, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
        register_memory(memory) as uffd,
    ):
        state = paused_source(source, shape, guest)
        machine.load(state)
        machine.start()
        await_faults(uffd, 2)
        machine.pause()
        waiting = machine.save()
        machine.load(waiting)
        with resolver_for(uffd, memory, source):
            machine.start()
            assert machine.wait_steps(2000, timeout_s=60)
            machine.pause()
            assert machine.check().mismatched_pages == 0
        assert machine.status().guest_errors == 0


def test_close_ends_a_guest_that_waits_for_a_page(guest: GuestKind) -> None:
    require_uffd()
    shape = Shape(memory_bytes=1 * MIB, vcpus=3)
    with GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory, register_memory(memory) as uffd:
        machine = Machine(shape, memory, guest)
        machine.start()
        await_faults(uffd, 3)
        closer = threading.Thread(target=machine.close, daemon=True)
        closer.start()
        closer.join(timeout=30)
        assert not closer.is_alive()


def test_fault_messages_name_the_vcpus_threads(guest: GuestKind) -> None:
    require_uffd()
    shape = Shape(memory_bytes=1 * MIB, vcpus=3)
    with (
        GuestMemory(MemoryKind.SHARED, shape.memory_bytes) as source,
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
        register_memory(memory, Feature.THREAD_ID) as uffd,
    ):
        state = paused_source(source, shape, guest)
        with resolver_for(uffd, memory, source) as resolver:
            machine.load(state)
            machine.start()
            assert machine.wait_steps(1000, timeout_s=60)
            machine.pause()
        assert len(set(machine.tids)) == 3
        assert resolver.tids == set(machine.tids)


def test_a_guest_that_was_done_stays_done_after_the_move(guest: GuestKind) -> None:
    shape = Shape(memory_bytes=1 * MIB, vcpus=2, passes=2)
    with (
        GuestMemory(MemoryKind.SHARED, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as source,
        Machine(shape, memory, guest) as destination,
    ):
        source.fill()
        source.start()
        assert source.wait_stopped(timeout_s=30)
        destination.load(source.save())
        destination.start()
        assert destination.wait_stopped(timeout_s=30)
        assert destination.status().phase is Phase.DONE
        assert destination.check().mismatched_pages == 0


def test_running_guests_are_neither_saved_nor_loaded(guest: GuestKind) -> None:
    shape = Shape(memory_bytes=1 * MIB)
    with (
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, guest) as machine,
    ):
        machine.fill()
        state = machine.save()
        machine.start()
        with pytest.raises(MigrationError):
            machine.save()
        with pytest.raises(MigrationError):
            machine.load(state)
        machine.pause()
        machine.load(machine.save())


def test_an_outcome_of_kvm_run_without_an_answer_parks_the_vcpu_with_its_reason() -> None:
    """With a user-mode-only userfaultfd, KVM's own fault on an absent page fails instead of waiting."""
    require_kvm()
    require_uffd()
    shape = Shape(memory_bytes=1 * MIB)
    with (
        GuestMemory(MemoryKind.ANONYMOUS, shape.memory_bytes) as memory,
        Machine(shape, memory, GuestKind.KVM) as machine,
        register_memory(memory, user_mode_only=True),
    ):
        machine.start()
        assert machine.wait_stopped(timeout_s=30)
        status = machine.status()
        assert status.phase is Phase.FAILED
        assert "EFAULT" in status.vcpus[0].failure
        with pytest.raises(MigrationError, match="EFAULT"):
            machine.save()


def test_a_feature_the_kernel_lacks_is_refused() -> None:
    require_uffd()
    with pytest.raises(KernelError, match="UFFDIO_API"):
        Uffd(Feature(1 << 60))
