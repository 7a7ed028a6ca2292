"""A guest's memory while it is served: the VMM's descriptors, the state that outlives us, the pager over both."""

from __future__ import annotations

import errno
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import structlog

from ._native.core import lib
from .attachment import STATE, Attachment, Phase, SessionRecord
from .errors import Code, HandoffError, InvariantError, KernelError
from .exit_socket import ExitJournal
from .guest_memfd import GuestMemfd
from .handoff.descriptors import kind_of
from .handoff.message import IMAGE
from .handoff.message import STATE as PRESENTED_STATE
from .pager import Pager, PagerStats, probe_registered
from .state_memory import StateMemory

if TYPE_CHECKING:
    from ._native.core import CData
    from .handoff.offer import Handoff
    from .handoff.regions import MemoryRegion
    from .status import MigrationSpec, MigrationStatus, ThreadBlocktime
    from .transport import ImageInfo

log = structlog.get_logger(__name__)

EVENTFD_KIND = "anon_inode:[eventfd]"


@dataclass
class Memory:
    """Exists from the hand-off to the end of a session, which owns it."""

    vmm: Attachment
    state: StateMemory
    pager: Pager
    guest_memfd: GuestMemfd | None = None
    _last: tuple[PagerStats, tuple[ThreadBlocktime, ...]] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of_handoff(
        cls,
        handoff: Handoff,
        spec: MigrationSpec,
        image: ImageInfo,
        socket_path: str,
        mark: int | None,
        present: bytes = b"",
    ) -> Memory:
        """Memory that a VMM hands over: fresh, or with the state that an earlier daemon left with it.

        Args:
            mark: of the state that must be presented; 0: whichever is; None: none needs to be.
            present: a bit for each 4 KiB page of the image that fresh memory has already.
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
            exits=ExitJournal(unread=handoff.message.leftover) if handoff.message.exit_socket else None,
        )
        vmm = Attachment.from_handoff(record, handoff)
        guest_memfd: GuestMemfd | None = None
        if PRESENTED_STATE in handoff.extras:
            state, pager = _presented(handoff, record, mark or 0)
        elif mark is not None:
            raise HandoffError(
                Code.HANDOFF_STALE_STATE,
                f"the guest of migration {spec.id!r} has run under an earlier daemon: its VMM must present the state "
                "memory that came with its acknowledgement",
            )
        else:
            guest_memfd = _guest_memfd(vmm)
            try:
                state, pager = _fresh(handoff, record, guest_memfd)
                pager.mark_present_pages(present)
            except BaseException:
                if guest_memfd is not None:
                    guest_memfd.close()
                raise
        memory = cls(vmm, state, pager, guest_memfd)
        try:
            # Once memory was given back, what is absent need not be the image's.
            memory._attach_exits(local=_has_image(handoff, image.epoch) and pager.stats().removed == 0)
            memory.note(kinds=tuple(memory.descriptors()))
        except BaseException:
            memory.let_go()
            raise
        return memory

    @classmethod
    def adopted(cls, vmm: Attachment, state: StateMemory) -> Memory:
        """Memory that an earlier process of ours left. Raises InvariantError, HandoffError: it cannot be served."""
        guest_memfd = _guest_memfd(vmm)
        try:
            pager = Pager.adopt(state, vmm.uffd.fileno(), _edge(guest_memfd))
        except BaseException:
            if guest_memfd is not None:
                guest_memfd.close()
            raise
        memory = cls(vmm, state, pager, guest_memfd)
        try:
            memory._attach_exits()
        except BaseException:
            memory._close_pager()
            raise
        return memory

    def _attach_exits(self, *, local: bool = False) -> None:
        """Serve the VMM's exit ring, if it has one, and ask for what must be there before a vCPU runs.

        local: its vCPUs' threads may install pages by themselves; where they did so before, they may in any case.
        """
        ring, doorbell = self.vmm.ring, self.vmm.doorbell
        if (ring is None) is not (doorbell is None):
            raise HandoffError(
                Code.EXIT_RING_BROKEN, "an exit ring and its doorbell come together or not at all"
            )
        # Anything else may not be pollable, or never be emptied by a read of eight bytes.
        if doorbell is not None and (kind := kind_of(doorbell)) != EVENTFD_KIND:
            raise HandoffError(
                Code.EXIT_RING_BROKEN, f"the exit ring's doorbell is no eventfd but {kind[:40]!a}"
            )
        if ring is not None:
            self.pager.attach_ring(ring.fileno(), local=local)
        if self.record.exits is not None:
            self.pager.forward_exits()
        for pinned in self.record.pinned:
            self.pager.want(pinned.gpa, pinned.size_bytes)

    def arm(self) -> None:
        """The VMM has filled its bitmap, if it has one: vCPUs may go where pages are."""
        if self.guest_memfd is not None:
            self.guest_memfd.arm(self.pager)

    @property
    def is_complete(self) -> bool:
        """Whether the guest needs nothing more. A bitmap that is not filled yet could not be cleared for good."""
        return self.pager.is_complete() and not self._is_held

    @property
    def _is_held(self) -> bool:
        exits = self.record.exits
        return self.guest_memfd is not None and exits is not None and not exits.opened

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
        self._close_pager()
        self.state.close()

    def _close_pager(self) -> None:
        self.pager.close()
        if self.guest_memfd is not None:
            self.guest_memfd.close()

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
        self._close_pager()
        self.vmm.close()
        self.state.close()


def _guest_memfd(vmm: Attachment) -> GuestMemfd | None:
    """Raises HandoffError: what came with it does not fit. InvariantError: one of two descriptors is lost."""
    if (vmm.guest_memfd is None) is not (vmm.bitmap is None):
        raise InvariantError(
            "of a guest_memfd and its bitmap one was lost; what vCPUs may touch is not known"
        )
    if vmm.guest_memfd is None or vmm.bitmap is None:
        return None
    return GuestMemfd(vmm.uffd.fileno(), vmm.guest_memfd.fileno(), vmm.bitmap.fileno(), vmm.record.regions)


def _has_image(handoff: Handoff, epoch: int) -> bool:
    """Whether the VMM's own copy of the content is the very file that the source serves, unchanged. Closes it.

    Only then do its vCPUs install from it; otherwise they ask, which is slower and right. A source on another host, or
    one that was told an epoch, cannot be compared.
    """
    file = handoff.extras.get(IMAGE)
    if file is None:
        return False
    with file:
        found = lib.file_epoch_of(file.fileno())
    # 0 is what nothing is known of, and no image's epoch; a source may say it all the same.
    if found and found == epoch:
        return True
    log.warning("exits.not_local", pid=handoff.vmm_pid, detail="the VMM's image is not the source's file")
    return False


def _edge(guest_memfd: GuestMemfd | None) -> CData | None:
    return None if guest_memfd is None else guest_memfd.edge


def _fresh(
    handoff: Handoff, record: SessionRecord, guest_memfd: GuestMemfd | None
) -> tuple[StateMemory, Pager]:
    for region in handoff.regions:
        _check_registered(handoff.uffd.fileno(), region)
    state = StateMemory.fresh(record.spec.id, record.pages)
    try:
        return state, Pager.create(state, handoff.regions, handoff.uffd.fileno(), _edge(guest_memfd))
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
