"""One VM's memory while it arrives: the typed face of daemon/native/pager.h.

The C drains the userfaultfd, checks and installs replies and writes requests; each method here is one call into it
for a whole batch. All methods belong to the event loop's thread.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple

from ._native.core import (
    ANSWERS_MAX,
    EXTERNAL_FULL,
    REGION_NO_GPA,
    RING_OUTSIDE,
    WAITER_EXIT,
    CData,
    address_of_feed,
    ffi,
    lib,
    ring_error_text,
)
from .errors import Code, HandoffError, InvariantError, KernelError
from .state_memory import StateMemory as StateMemory  # noqa: TC001 - part of what this module offers
from .status import Latency, ThreadBlocktime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handoff.regions import MemoryRegion

REQUEST_BYTES = 32 << 10
"""Room for the ranges of one request message."""

MAX_VCPUS = 4096
"""Source: KVM_MAX_VCPUS, arch/x86/include/asm/kvm_host.h."""


class Signal(IntFlag):
    """What a call into the pager asks its caller to do next; daemon/native/pager.h.

    Calls return plain integers: making an enum of each would cost more than the call.
    """

    SEND = 1
    MORE = 2
    STALLED = 4
    GONE = 8
    SHORT = 16
    FAILED = 32
    DISTRUST = 64
    RING_BROKEN = 128
    ANSWERS = 256
    HELD = 512


class Lane(IntEnum):
    DEMAND = 0
    BULK = 1


class Answer(NamedTuple):
    """vCPU `vcpu` may touch `page`, of `len_bytes`; zero: its content is zero by right."""

    vcpu: int
    page: int
    len_bytes: int
    zero: bool


@dataclass(frozen=True)
class PagerStats:
    """Pages unless the name says otherwise; latencies from the reading of a fault to its wake."""

    pages: int
    missing: int
    requested: int
    present: int
    zero: int
    faults: int
    exits: int
    faults_outside: int
    demand: int
    pushed: int
    removed: int
    duplicates: int
    bad_replies: int
    bytes_received: int
    retries: int
    waiting: int
    oldest_wait_us: int
    latency: Latency
    latency_log2_us: tuple[int, ...]
    latency_sum_us: int


_OPS = ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_CONTINUE", "UFFDIO_POISON", "read of the userfaultfd")


def probe_registered(uffd: int, region: MemoryRegion) -> bool:
    """Whether the first and the last page of `region` are registered with `uffd`. Installs nothing.

    Raises:
        KernelError: neither yes nor no; errno ESRCH if the VMM is gone.
    """
    for start in (region.host_addr, region.host_addr + region.size_bytes - region.page_size):
        answer = lib.uffd_probe_registered(uffd, start, region.page_size)
        if answer < 0:
            raise KernelError("UFFDIO_COPY (probe)", start, region.page_size, -answer)
        if answer == 0:
            return False
    return True


def _ring_error(error: int) -> HandoffError:
    text = "a fault lies outside of every region" if error == RING_OUTSIDE else ring_error_text(error)
    return HandoffError(Code.EXIT_RING_BROKEN, f"the VMM's exit ring cannot be served: {text}")


def region_table(regions: Sequence[MemoryRegion]) -> CData:
    """struct region[] of regions that are checked already (handoff.regions.check_regions)."""
    table = ffi.new("struct region[]", len(regions))
    for entry, region in zip(table, regions, strict=True):
        entry.hva = region.host_addr
        entry.len_bytes = region.size_bytes
        entry.image_offset = region.image_offset
        gpa = region.guest_phys_addr
        entry.gpa = REGION_NO_GPA if gpa is None else gpa
        entry.page_shift = region.page_size.bit_length() - 1
    return table


class Pager:
    """A pager over `state`. `uffd` and `state` stay the caller's and must outlive it.

    `edge` stands between it and the kernel (struct uffd_edge): guest_memfd's, a test's, None for the kernel itself.
    """

    def __init__(self, pager: CData, state: StateMemory) -> None:
        if pager == ffi.NULL:
            raise InvariantError("the pager's state memory is not usable")
        self._pager = pager
        self.state = state
        self._ring: tuple[CData, int] | None = None
        self._out = ffi.new("uint8_t[]", REQUEST_BYTES)
        self._out_view = ffi.buffer(self._out)
        self._claimed = ffi.new("uint64_t *")
        self._answers: CData = ffi.NULL
        self.feed_address = (address_of_feed(), int(ffi.cast("uintptr_t", pager)))

    @classmethod
    def create(
        cls, state: StateMemory, regions: Sequence[MemoryRegion], uffd: int, edge: CData | None = None
    ) -> Pager:
        """A pager over fresh state memory. Regions are checked already (handoff.regions.check_regions)."""
        table = region_table(regions)
        pager = lib.pager_create(state.memory, state.len_bytes, table, len(regions), uffd, edge or ffi.NULL)
        return cls(pager, state)

    @classmethod
    def adopt(cls, state: StateMemory, uffd: int, edge: CData | None = None) -> Pager:
        """A pager over state memory that another process left. Wakes every range.

        Raises:
            InvariantError: not state memory of a version we know.
        """
        return cls(lib.pager_adopt(state.memory, state.len_bytes, uffd, edge or ffi.NULL), state)

    def close(self) -> None:
        """Free the pager, not the state; idempotent."""
        if self._pager is not None:
            lib.pager_destroy(self._pager)
            self._unmap_ring()
        # Not NULL, which the C would follow: a call on a closed pager is a TypeError.
        self._pager = None

    def regions(self) -> list[tuple[int, int, int, int]]:
        """Host virtual address, bytes, offset in the image and page size of each region, as they were handed over."""
        return [
            (r.hva, r.len_bytes, r.image_offset, 1 << r.page_shift)
            for r in self._pager.region[0 : self._pager.state.regions]
        ]

    def attach_ring(self, fd: int, *, local: bool = False) -> None:
        """Serve the fault exits of vCPUs in the ring that `fd`, a sealed memfd, holds; `fd` stays the caller's.

        local: the VMM has the source's own file, so its vCPUs' threads may install pages by themselves.

        Raises:
            HandoffError: EXIT_RING_BROKEN: not a ring that can be served.
        """
        memory, length = ffi.new("void **"), ffi.new("size_t *")
        error = lib.exit_ring_map(fd, memory, length)
        if error == 0:
            self._ring = (memory[0], length[0])
            error = lib.pager_attach_ring(self._pager, *self._ring, local)
        if error:
            self._unmap_ring()
            raise _ring_error(error)

    def _unmap_ring(self) -> None:
        if self._ring is not None:
            lib.exit_ring_unmap(*self._ring)
            self._ring = None

    def ring_failure(self) -> HandoffError:
        """What Signal.RING_BROKEN is about."""
        return _ring_error(self._pager.ring_error)

    def on_doorbell(self, doorbell: int) -> int:
        """The exit ring's eventfd is readable: empty it, and answer what ring and kernel have."""
        return lib.pager_on_doorbell(self._pager, doorbell)

    def want(self, gpa: int, len_bytes: int) -> None:
        """Ask for guest physical memory at once, though nobody waits for it yet."""
        lib.pager_want_gpa(self._pager, gpa, len_bytes)

    def forward_exits(self) -> None:
        """Take fault exits by `external_fault`; not together with a ring."""
        lib.pager_forward_exits(self._pager)
        self._answers = ffi.new("struct pager_answer[]", ANSWERS_MAX)

    def external_fault(self, vcpu: int, *, gpa: int | None, offset: int) -> int:
        """Note that a vCPU waits for the page at `gpa`, or without one at `offset` in the image; return its number.

        Raises:
            HandoffError: EXIT_SOCKET_BROKEN: it lies in no region, or too many wait.
        """
        address = offset if gpa is None else gpa
        if vcpu >= MAX_VCPUS:
            what = f"vCPU {vcpu} is more than KVM has"
        elif (page := lib.pager_external_fault(self._pager, address, gpa is None, vcpu)) >= 0:
            return page
        elif page == EXTERNAL_FULL:
            what = f"more than {ANSWERS_MAX} faults wait for their answers"
        else:
            what = f"vCPU {vcpu} faults at {address:#x}, which no region has"
        raise HandoffError(Code.EXIT_SOCKET_BROKEN, f"the VMM's forwarded faults cannot be served: {what}")

    def take_answers(self) -> list[Answer]:
        """What Signal.ANSWERS is about; each accepted fault comes up once."""
        count = lib.pager_take_answers(self._pager, self._answers, ANSWERS_MAX)
        return [Answer(a.vcpu, a.page, a.len_bytes, bool(a.zero)) for a in self._answers[0:count]]

    def arm(self, memory: CData) -> None:
        """Let `memory` (struct guest_memfd) clear bits, beginning with those of the pages that are here."""
        lib.guest_memfd_arm(memory, ffi.addressof(self._pager, "ledger"))

    def drain(self) -> int:
        """Read and answer what the kernel has."""
        return lib.pager_drain(self._pager)

    def feed(self, message: bytes) -> bool:
        """Take one serialised PageReply; False if the stream is not to be trusted any more."""
        return lib.pager_feed(self._pager, ffi.from_buffer(message), len(message)) >= 0

    def take_signals(self) -> int:
        """Signals that feeding raised."""
        return lib.pager_take_signals(self._pager)

    def retry(self) -> int:
        """Go through all that is owed again."""
        return lib.pager_retry(self._pager)

    def mark_zero(self, offset: int, len_bytes: int) -> None:
        lib.pager_mark_zero(self._pager, offset, len_bytes)

    def mark_present(self, offset: int, len_bytes: int) -> None:
        lib.pager_mark_present(self._pager, offset, len_bytes)

    def mark_present_pages(self, bitmap: bytes) -> None:
        """The 4 KiB pages of the image whose bits are set are in place: bit n % 8 of byte n // 8."""
        lib.pager_mark_present_bitmap(self._pager, ffi.from_buffer(bitmap), len(bitmap))

    def encode_demand(self) -> bytes:
        """Ranges of the pages that threads wait for, as the body of a PageRequest; empty if there are none."""
        n = lib.pager_encode_demand(self._pager, self._out, REQUEST_BYTES)
        return bytes(self._out_view[:n])

    def encode_bulk(self, want_bytes: int, run_bytes: int) -> tuple[bytes, int]:
        """Ranges for the push, and how many bytes of memory they ask for."""
        n = lib.pager_encode_bulk(self._pager, want_bytes, run_bytes, self._out, REQUEST_BYTES, self._claimed)
        return bytes(self._out_view[:n]), self._claimed[0]

    def set_source_limits(self, *, range_bytes: int, ranges: int) -> None:
        """What the source in use takes: bytes in one range, and ranges outstanding on one stream. Both positive."""
        self._pager.max_range_bytes = range_bytes
        self._pager.max_ranges = ranges

    @property
    def bulk_inflight_bytes(self) -> int:
        return int(self._pager.bulk_inflight_bytes)

    @property
    def bulk_bytes_received(self) -> int:
        """Page data that the push brought; zero runs bring none."""
        return int(self._pager.state.counters.bytes_received[Lane.BULK])

    @property
    def demand_inflight(self) -> int:
        """Demand ranges that are not answered yet."""
        return int(self._pager.inflight.requests[Lane.DEMAND])

    @property
    def settled(self) -> int:
        """Pages that are in place, or zero."""
        return int(self._pager.ledger.count[2] + self._pager.ledger.count[3])

    @property
    def missing(self) -> int:
        """Pages that nobody has asked for yet."""
        return int(self._pager.ledger.count[0])

    def reset_lane(self, lane: Lane) -> None:
        lib.pager_reset_lane(self._pager, lane)

    def is_complete(self) -> bool:
        return lib.pager_is_complete(self._pager)

    def release(self) -> None:
        """Unregister the memory: the guest is free of us.

        Raises:
            KernelError: the kernel refused; its threads are woken by the close of the descriptor.
        """
        error = lib.pager_release(self._pager)
        if error not in (0, errno.ESRCH):
            raise KernelError("UFFDIO_UNREGISTER", 0, 0, error)

    def let_go(self) -> bool:
        """After `release`: read what the VMM announced meanwhile. False: more is to come, and its thread would wait on.

        Source: userfaultfd(2): madvise, munmap, mremap and fork wait until their event was read.
        """
        return lib.pager_let_go(self._pager)

    def poison_missing(self) -> bool:
        """Poison every page that is not here: whoever touches one sees a memory error. False: the kernel cannot.

        Source: ioctl_userfaultfd(2), UFFDIO_POISON, Linux 6.6.
        """
        return lib.pager_poison_missing(self._pager)

    def failure(self) -> KernelError:
        """What Signal.FAILED is about."""
        f = self._pager.failure
        return KernelError(_OPS[f.op], f.addr, f.len_bytes, f.error)

    def stats(self) -> PagerStats:
        s = ffi.new("struct pager_stats *")
        lib.pager_get_stats(self._pager, s)
        c = s.counters
        return PagerStats(
            pages=s.pages,
            missing=s.missing,
            requested=s.requested,
            present=s.present,
            zero=s.zero,
            faults=c.faults,
            exits=c.exits,
            faults_outside=c.faults_outside,
            demand=c.arrived[Lane.DEMAND],
            pushed=c.arrived[Lane.BULK],
            removed=c.removed,
            duplicates=c.duplicates,
            bad_replies=c.bad_replies,
            bytes_received=sum(c.bytes_received),
            retries=c.retries,
            waiting=s.waiting,
            oldest_wait_us=s.oldest_wait_ns // 1000,
            latency=Latency(
                count=s.latency_count,
                p50=s.latency_p50_ns / 1000,
                p90=s.latency_p90_ns / 1000,
                p99=s.latency_p99_ns / 1000,
                max=s.latency_max_ns / 1000,
            ),
            latency_log2_us=tuple(s.latency_log2_us),
            latency_sum_us=s.latency_sum_ns // 1000,
        )

    def blocktime(self) -> tuple[ThreadBlocktime, ...]:
        """Per thread of the VMM; tid 0 gathers what has no name."""
        waiters = self._pager.waiters
        return tuple(
            ThreadBlocktime(
                tid=t.tid & ~WAITER_EXIT,
                is_vcpu=bool(t.tid & WAITER_EXIT),
                faults=t.faults,
                blocktime_us=t.blocked_ns // 1000,
            )
            for t in waiters.thread[0 : waiters.threads]
            if t.faults
        )
