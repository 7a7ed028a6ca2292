"""A guest's memory while it is served: the VMM's descriptors, the state that outlives us, the pager over both."""

from __future__ import annotations

import errno
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from .attachment import STATE, Attachment, Phase, SessionRecord
from .errors import Code, HandoffError, InvariantError, KernelError
from .handoff.message import STATE as PRESENTED_STATE
from .pager import Pager, PagerStats, probe_registered
from .state_memory import StateMemory

if TYPE_CHECKING:
    from .handoff.offer import Handoff
    from .handoff.regions import MemoryRegion
    from .status import MigrationSpec, MigrationStatus, ThreadBlocktime
    from .transport import ImageInfo


@dataclass
class Memory:
    """Exists from the hand-off to the end of a session, which owns it."""

    vmm: Attachment
    state: StateMemory
    pager: Pager
    _last: tuple[PagerStats, tuple[ThreadBlocktime, ...]] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of_handoff(
        cls, handoff: Handoff, spec: MigrationSpec, image: ImageInfo, socket_path: str, mark: int | None
    ) -> Memory:
        """Memory that a VMM hands over: fresh, or with the state that an earlier daemon left with it.

        Args:
            mark: of the state that must be presented; 0: whichever is; None: none needs to be.
        Raises:
            HandoffError, KernelError: it cannot be served. OSError: no memory or descriptor. `handoff` stays the
                caller's then, and nothing of it is kept.
        """
        handoff.check_image(image.size_bytes)
        record = SessionRecord(
            spec=spec,
            image=image,
            socket_path=socket_path,
            format_name=handoff.format_name,
            regions=handoff.regions,
            vmm_pid=handoff.vmm_pid,
            socket_is_liveness=handoff.socket_is_liveness,
            began_at=time.time(),
            phase=Phase.STORING,
            wants_ack=handoff.wants_ack,
            acknowledged=not handoff.wants_ack,
            keep_state=handoff.message.keep_state,
            pinned=handoff.message.pinned,
            mark=secrets.randbits(63) | 1,
        )
        if PRESENTED_STATE in handoff.extras:
            state, pager = _presented(handoff, record, mark or 0)
        elif mark is not None:
            raise HandoffError(
                Code.HANDOFF_STALE_STATE,
                f"the guest of migration {spec.id!r} has run under an earlier daemon: its VMM must present the state "
                "memory that came with its acknowledgement",
            )
        else:
            state, pager = _fresh(handoff, record)
        memory = cls(Attachment.from_handoff(record, handoff), state, pager)
        try:
            memory._attach_exits()
            memory.note(kinds=tuple(memory.descriptors()))
        except BaseException:
            pager.close()
            state.close()
            raise
        return memory

    @classmethod
    def adopted(cls, vmm: Attachment, state: StateMemory) -> Memory:
        """Memory that an earlier process of ours left. Raises InvariantError, HandoffError: it cannot be served."""
        memory = cls(vmm, state, Pager.adopt(state, vmm.uffd.fileno()))
        try:
            memory._attach_exits()
        except BaseException:
            memory.pager.close()
            raise
        return memory

    def _attach_exits(self) -> None:
        """Serve the VMM's exit ring, if it has one, and ask for what must be there before a vCPU runs."""
        ring, doorbell = self.vmm.ring, self.vmm.doorbell
        if (ring is None) is not (doorbell is None):
            raise HandoffError(
                Code.EXIT_RING_BROKEN, "an exit ring and its doorbell come together or not at all"
            )
        if ring is not None:
            self.pager.attach_ring(ring.fileno())
        for pinned in self.record.pinned:
            self.pager.want(pinned.gpa, pinned.size_bytes)

    @property
    def record(self) -> SessionRecord:
        return self.vmm.record

    @property
    def uffd(self) -> int:
        return self.vmm.uffd.fileno()

    def note(self, **changes: object) -> None:
        """Change the record, here and for the next process."""
        record = msgspec.structs.replace(self.vmm.record, **changes)
        self.state.descriptor = record.encode()
        self.vmm.record = record

    def descriptors(self) -> dict[str, int]:
        """What must outlive the process, by kind. The state comes first: it says what the others mean."""
        return {STATE: self.state.fd, **self.vmm.descriptors()}

    def let_go(self) -> None:
        """Forget it without a trace: the descriptors stay open, for they are somebody else's."""
        self.pager.close()
        self.state.close()

    def status(self, common: MigrationStatus, elapsed_s: float) -> MigrationStatus:
        """`common` with what is known of the memory: as it is now, or as it was at the end."""
        stats, blocktime = self._last or (self.pager.stats(), self.pager.blocktime())
        return msgspec.structs.replace(
            common,
            vmm_pid=self.record.vmm_pid,
            handoff_format=self.record.format_name,
            page_size=min(region.page_size for region in self.record.regions),
            memory_bytes=self.record.memory_bytes,
            pages_total=stats.pages,
            pages_installed=stats.present + stats.zero,
            pages_demand=stats.demand,
            pages_pushed=stats.pushed,
            pages_zero=stats.zero,
            pages_removed=stats.removed,
            pages_requested=stats.requested,
            faults=stats.faults,
            exits=stats.exits,
            waiting=stats.waiting,
            oldest_wait_us=stats.oldest_wait_us,
            bytes_received=stats.bytes_received,
            bad_replies=stats.bad_replies,
            duplicates=stats.duplicates,
            retries=stats.retries,
            fault_latency_us=stats.latency,
            latency_log2_us=stats.latency_log2_us,
            latency_sum_us=stats.latency_sum_us,
            blocktime=blocktime,
            elapsed_s=elapsed_s,
        )

    @property
    def is_closed(self) -> bool:
        return self._last is not None

    def close(self) -> None:
        """Close all. Only after the memory is unregistered, or gone."""
        self._last = self.pager.stats(), self.pager.blocktime()
        self.pager.close()
        self.vmm.close()
        self.state.close()


def _fresh(handoff: Handoff, record: SessionRecord) -> tuple[StateMemory, Pager]:
    for region in handoff.regions:
        _check_registered(handoff.uffd.fileno(), region)
    state = StateMemory.fresh(record.spec.id, record.pages)
    try:
        return state, Pager.create(state, handoff.regions, handoff.uffd.fileno())
    except BaseException:
        state.close()
        raise


def _presented(handoff: Handoff, record: SessionRecord, mark: int) -> tuple[StateMemory, Pager]:
    """A copy of the state that the VMM presents. The VMM may write to its own, or present an older one.

    Pages that came since an older copy was taken are harmless: installing them again answers EEXIST. Pages that the
    guest gave back since are not: they would be fetched again where zeros belong. So only the last one counts.
    """
    try:
        state = StateMemory.copied(record.spec.id, handoff.extras[PRESENTED_STATE].fileno(), record.pages)
    except InvariantError as error:
        raise HandoffError(Code.HANDOFF_STALE_STATE, f"the VMM presents {error.message}") from error
    try:
        before = SessionRecord.decode(state.descriptor)
        if mark not in (0, before.mark):
            raise HandoffError(
                Code.HANDOFF_STALE_STATE,
                f"the VMM presents state memory of migration {record.spec.id!r} that is not the last one it was given",
            )
        if before.image.epoch != record.image.epoch:
            raise HandoffError(
                Code.HANDOFF_STALE_STATE,
                f"the VMM presents state memory of epoch {before.image.epoch:#x}; the source serves "
                f"{record.image.epoch:#x}",
            )
        pager = Pager.adopt(state, handoff.uffd.fileno())
    except InvariantError as error:
        state.close()
        raise HandoffError(Code.HANDOFF_STALE_STATE, error.message) from error
    except BaseException:
        state.close()
        raise
    if pager.regions() != [
        (region.host_addr, region.size_bytes, region.image_offset, region.page_size)
        for region in handoff.regions
    ]:
        pager.close()
        state.close()
        raise HandoffError(Code.HANDOFF_STALE_STATE, "the VMM presents state memory of other regions")
    return state, pager


def _check_registered(uffd: int, region: MemoryRegion) -> None:
    """Raises HandoffError: the kernel does not serve `region` with `uffd`."""
    try:
        registered = probe_registered(uffd, region)
    except KernelError as error:
        match error.errno:
            case errno.ESRCH:
                raise HandoffError(Code.VMM_GONE, "the VMM ended right after its hand-off") from error
            case errno.EINVAL:
                raise HandoffError(
                    Code.HANDOFF_PAGE_SIZE, f"the kernel has no pages of {region.page_size} bytes in {region}"
                ) from error
            case _:
                raise
    if not registered:
        raise HandoffError(
            Code.HANDOFF_NOT_REGISTERED,
            f"the region of {region} is not registered with the userfaultfd that came with it",
        )
