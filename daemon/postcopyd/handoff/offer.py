"""A hand-off that arrived whole: what the VMM said, and the descriptors that came with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from ..errors import Code, HandoffError, PostcopyError
from .channel import receive_chunk, send_byte
from .framed import AddRegion, FrameReader, parse_event
from .regions import MemoryRegion, check_regions

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from .descriptors import OwnedFd
    from .message import HandoffMessage, Mode
    from .peer import Peer

log = structlog.get_logger(__name__)

ACK = b"\x01"
ACK_TIMEOUT_S = 2.0


@dataclass
class Handoff:
    """Owns the VMM's socket and all descriptors until they are taken or this is closed.

    A session takes what it keeps (`handoff.uffd.take()`); `close` closes the rest. Closing the uffd here does
    not harm the guest: every known VMM keeps its own duplicate, so absent pages block, and do not read
    as zeros.

    extras: descriptors other than the uffd, by the names the VMM gave; only names that the receiver serves.
    pidfd: of the VMM, None if the kernel could not give one.
    """

    message: HandoffMessage
    sock: socket.socket
    uffd: OwnedFd
    extras: Mapping[str, OwnedFd]
    peer: Peer
    pidfd: OwnedFd | None
    _frames: FrameReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._frames = FrameReader(self.message.leftover)

    @property
    def format_name(self) -> str:
        return self.message.format_name

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        return self.message.regions

    @property
    def mode(self) -> Mode:
        return self.message.mode

    @property
    def vmm_pid(self) -> int:
        """The VMM's process here, 0 if it is in a PID name space that cannot be seen."""
        return self.peer.pid

    @property
    def claimed_vmm_pid(self) -> int | None:
        """What the VMM believes its process id to be; for logs only."""
        return self.message.vmm_pid

    @property
    def wants_ack(self) -> bool:
        return self.message.wants_ack

    @property
    def socket_is_liveness(self) -> bool:
        """Whether a hang-up means that the VMM ended."""
        return self.message.socket_is_liveness

    def check_image(self, image_size: int) -> None:
        """Raises HandoffError: HANDOFF_BEYOND_IMAGE, if there is memory that the image does not have."""
        check_regions(self.regions, image_size)

    async def acknowledge(self, timeout_s: float = ACK_TIMEOUT_S) -> None:
        """Tell the VMM that its hand-off, or its last event, was accepted; does nothing if none is due.

        Call it only once the descriptors would survive a crash: the VMM relies on it.

        Raises:
            HandoffError: VMM_GONE, or HANDOFF_TIMEOUT: the VMM does not read.
        """
        if self.wants_ack:
            await send_acknowledgement(self.sock, timeout_s=timeout_s)

    def take_socket(self) -> socket.socket:
        """Give up the socket: the caller closes it."""
        taken = self.sock.dup()
        taken.setblocking(False)
        self.sock.close()
        return taken

    def refuse(self, error: PostcopyError) -> None:
        """Log why, and close everything.

        No format has a word for no: a framed VMM sees end-of-file where it waits for its byte and fails; a
        Firecracker waits for its pages until it is killed.
        """
        log.warning(
            "handoff.refused",
            code=str(error.code),
            error=error.message,
            format=self.format_name,
            pid=self.vmm_pid,
        )
        self.close()

    async def receive_event(self) -> AddRegion | None:
        """Wait for what the VMM says after its hand-off; None: it closed its socket.

        What None means, `socket_is_liveness` says. The region of an event is sound by itself; whether it
        overlaps the others, the receiver checks with `check_regions` over all of them, and then calls
        `acknowledge`.

        Raises:
            HandoffError: the format knows no such message; the socket is of no further use.
        """
        while (frame := self._frames.next()) is None:
            chunk = await receive_chunk(self.sock)
            for descriptor in chunk.descriptors:
                descriptor.close()
            if not chunk.data:
                return None
            if chunk.descriptors or not self.message.sends_events:
                raise HandoffError(
                    Code.HANDOFF_UNEXPECTED,
                    f"{len(chunk.data)} bytes and {len(chunk.descriptors)} descriptors followed the hand-off",
                )
            self._frames.feed(chunk.data)
        return parse_event(frame)

    def close(self) -> None:
        """Close the socket and what was not taken; idempotent."""
        self.sock.close()
        for descriptor in (self.uffd, *self.extras.values()):
            descriptor.close()
        if self.pidfd is not None:
            self.pidfd.close()

    def __enter__(self) -> Handoff:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def send_acknowledgement(
    sock: socket.socket, descriptors: Sequence[int] = (), *, timeout_s: float = ACK_TIMEOUT_S
) -> None:
    """Say yes to whoever handed over at `sock`; `descriptors` go with it. Raises as Handoff.acknowledge."""
    try:
        async with asyncio.timeout(timeout_s):
            await send_byte(sock, ACK, descriptors)
    except TimeoutError:
        raise HandoffError(
            Code.HANDOFF_TIMEOUT, f"the VMM did not read its acknowledgement within {timeout_s:g} s"
        ) from None
