"""A VMM that is attached: its descriptors, and what must be known of it to serve it, also after a restart."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

from .errors import Code, HandoffError, InvariantError
from .exit_socket import ExitJournal
from .handoff.channel import receive_chunk
from .handoff.message import BITMAP, EXIT_NOTIFY, EXIT_RING, GUEST_MEMFD, PinnedRange
from .handoff.offer import send_acknowledgement
from .handoff.regions import MemoryRegion
from .status import MigrationSpec
from .transport import ImageInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .handoff.descriptors import OwnedFd
    from .handoff.offer import Handoff

log = structlog.get_logger(__name__)

UFFD = "uffd"
STATE = "state"
SOCKET = "socket"
PIDFD = "pidfd"
RING = "ring"
DOORBELL = "doorbell"


class Phase(StrEnum):
    """How far the keeping of a session's descriptors got; what the next process may conclude from what is missing.

    STORING: they are on their way into the store; the VMM was told nothing. HELD: all are there. ENDED: the memory is
    unregistered, or gone; what is left is only to be let go.
    """

    STORING = "storing"
    HELD = "held"
    ENDED = "ended"


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The session descriptor in state memory (JSON). Fields are only added; unknown ones are ignored.

    began_at: seconds since the epoch, as a monotonic clock does not outlive the process.
    kinds: of all the descriptors that belong to it.
    mark: names this state memory, so that an older copy of it is known for what it is.
    exits: of a VMM that forwards its vCPUs' faults over its socket.
    """

    version: Literal[1] = 1
    spec: MigrationSpec
    image: ImageInfo
    socket_path: str
    format_name: str
    regions: tuple[MemoryRegion, ...]
    vmm_pid: int
    socket_is_liveness: bool
    began_at: float
    phase: Phase = Phase.HELD
    kinds: tuple[str, ...] = ()
    wants_ack: bool = False
    acknowledged: bool = True
    keep_state: bool = False
    mark: int = 0
    pinned: tuple[PinnedRange, ...] = ()
    exits: ExitJournal | None = None

    @property
    def memory_bytes(self) -> int:
        return sum(region.size_bytes for region in self.regions)

    @property
    def pages(self) -> int:
        return sum(region.size_bytes // region.page_size for region in self.regions)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, text: bytes) -> SessionRecord:
        """Raises InvariantError: not a record of a version that this release knows."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise InvariantError(f"the session record in state memory cannot be read: {error}") from error


@dataclass
class Attachment:
    """Owns the descriptors of one VMM until `close`.

    sock: None if the VMM closed it, or it was not kept. pidfd: None if the kernel could not say who connected.
    """

    record: SessionRecord
    uffd: OwnedFd
    sock: socket.socket | None
    pidfd: OwnedFd | None
    ring: OwnedFd | None = None
    doorbell: OwnedFd | None = None
    guest_memfd: OwnedFd | None = None
    bitmap: OwnedFd | None = None

    @classmethod
    def from_handoff(cls, record: SessionRecord, handoff: Handoff) -> Attachment:
        """Share the hand-off's descriptors: `handoff` must not be closed any more."""
        return cls(
            record,
            handoff.uffd,
            handoff.sock,
            handoff.pidfd,
            ring=handoff.extras.get(EXIT_RING),
            doorbell=handoff.extras.get(EXIT_NOTIFY),
            guest_memfd=handoff.extras.get(GUEST_MEMFD),
            bitmap=handoff.extras.get(BITMAP),
        )

    @classmethod
    def from_store(cls, record: SessionRecord, fds: Mapping[str, OwnedFd]) -> Attachment:
        sock = None
        if SOCKET in fds:
            sock = socket.socket(fileno=fds[SOCKET].take())
            sock.setblocking(False)
        return cls(
            record,
            fds[UFFD],
            sock,
            fds.get(PIDFD),
            ring=fds.get(RING),
            doorbell=fds.get(DOORBELL),
            guest_memfd=fds.get(GUEST_MEMFD),
            bitmap=fds.get(BITMAP),
        )

    @property
    def doorbell_fileno(self) -> int | None:
        return None if self.doorbell is None else self.doorbell.fileno()

    def descriptors(self) -> dict[str, int]:
        """What a store must hold, by kind; the state memory is not ours.

        The socket is the last: as long as the store lacks it, the end of this process ends the VMM's connection, and
        so its wait for an answer.
        """
        held = {UFFD: self.uffd.fileno()}
        for kind, owned in (
            (RING, self.ring),
            (DOORBELL, self.doorbell),
            (GUEST_MEMFD, self.guest_memfd),
            (BITMAP, self.bitmap),
            (PIDFD, self.pidfd),
        ):
            if owned is not None:
                held[kind] = owned.fileno()
        if self.sock is not None:
            held[SOCKET] = self.sock.fileno()
        return held

    def is_of(self, handoff: Handoff) -> bool:
        """Whether `handoff` presents this very memory again, by the same VMM."""
        ours, theirs = os.fstat(self.uffd.fileno()), os.fstat(handoff.uffd.fileno())
        # A userfaultfd has an inode of its own since Linux 5.12; before, all of them share one, and the rest decides.
        return (
            (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
            and handoff.vmm_pid == self.record.vmm_pid
            and handoff.regions == self.record.regions
        )

    def replace_socket(self, sock: socket.socket) -> None:
        """The VMM speaks through `sock` from now on, which is ours."""
        former, self.sock = self.sock, sock
        # Without a pidfd the former one is being read (wait_gone), which closes it.
        if former is not None and self.pidfd is not None:
            former.close()

    def take_socket(self) -> None:
        """The socket is somebody else's from now on."""
        self.sock = None

    async def acknowledge(self, descriptors: Sequence[int] = ()) -> None:
        """Tell the VMM that its memory is served whatever becomes of this process. Raises HandoffError."""
        if self.sock is not None:
            await send_acknowledgement(self.sock, descriptors)

    async def wait_gone(self) -> None:
        """Return when the process that handed over has ended, as far as that can be known; else never."""
        if self.pidfd is not None:
            await _readable(self.pidfd.fileno())
            return
        while self.sock is not None and self.record.socket_is_liveness:
            watched = self.sock
            await self._read_to_end(watched)
            if self.sock is watched:
                return
            watched.close()
        await asyncio.Event().wait()

    async def _read_to_end(self, sock: socket.socket) -> None:
        try:
            while (chunk := await receive_chunk(sock)).data:
                for descriptor in chunk.descriptors:
                    descriptor.close()
                log.warning("handoff.unexpected", len_bytes=len(chunk.data), pid=self.record.vmm_pid)
        except HandoffError as error:
            if error.code is not Code.VMM_GONE:
                log.warning("handoff.unexpected", code=error.code, error=error.message)

    def close(self) -> None:
        """Close all; idempotent. Only after the memory is unregistered, or gone."""
        if self.sock is not None:
            self.sock.close()
        for owned in (self.uffd, self.pidfd, self.ring, self.doorbell, self.guest_memfd, self.bitmap):
            if owned is not None:
                owned.close()


async def _readable(fd: int) -> None:
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
