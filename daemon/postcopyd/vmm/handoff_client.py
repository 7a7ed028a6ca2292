"""The VMM's side of a hand-off: tell the daemon where memory is, and give it the userfaultfd."""

from __future__ import annotations

import os
import socket
import struct
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import structlog

from .._native.vmm import MEMORY_GPA
from ..errors import Code, HandoffError
from ..units import Gpa, Hva, Offset

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .guestmem import GuestMemory
    from .uffd_client import Uffd

_log = structlog.get_logger(__name__)


class HandoffFormat(StrEnum):
    """Firecracker's by the first version that spoke each, and the length-framed JSON hand-off."""

    FIRECRACKER_1_1 = "firecracker-1.1"
    FIRECRACKER_1_7 = "firecracker-1.7"
    FIRECRACKER_1_12 = "firecracker-1.12"
    FRAMED = "framed"

    @property
    def is_framed(self) -> bool:
        return self is HandoffFormat.FRAMED

    @property
    def keeps_socket(self) -> bool:
        """Whether the VMM keeps its socket open, so that its end means the VMM's end."""
        return self in (HandoffFormat.FIRECRACKER_1_12, HandoffFormat.FRAMED)


class Region(msgspec.Struct, frozen=True):
    """Part of guest memory, `size` bytes, multiple of the page size."""

    address: Hva
    size: int
    offset: Offset
    gpa: Gpa


def regions_of(memory: GuestMemory, count: int = 1) -> list[Region]:
    """Cut memory into `count` adjacent regions of whole pages, as a VMM with several memory slots would."""
    pages = memory.len_bytes // memory.page_size
    cuts = [pages * i // count * memory.page_size for i in range(count + 1)]
    return [
        Region(Hva(memory.address + at), end - at, Offset(at), Gpa(MEMORY_GPA + at))
        for at, end in pairwise(cuts)
        if end > at
    ]


def encode(fmt: HandoffFormat, regions: Sequence[Region], page_size: int) -> bytes:
    """Return the message that goes with the descriptor."""
    if fmt.is_framed:
        body = msgspec.json.encode(
            {
                "type": "handoff",
                "version": 0,
                "vmm_pid": os.getpid(),
                "mode": "MISSING",
                "regions": [
                    {
                        "guest_phys_addr": r.gpa,
                        "host_virt_addr": r.address,
                        "size": r.size,
                        "backing_file_offset": r.offset,
                        "page_size": page_size,
                    }
                    for r in regions
                ],
            }
        )
        return struct.pack("<I", len(body)) + body
    # page_size_kib holds bytes: the name is wrong in Firecracker, and stayed.
    sizes = {
        HandoffFormat.FIRECRACKER_1_1: {},
        HandoffFormat.FIRECRACKER_1_7: {"page_size_kib": page_size},
        HandoffFormat.FIRECRACKER_1_12: {"page_size": page_size, "page_size_kib": page_size},
    }[fmt]
    return msgspec.json.encode(
        [{"base_host_virt_addr": r.address, "size": r.size, "offset": r.offset} | sizes for r in regions]
    )


def _refused(path: Path) -> HandoffError:
    return HandoffError(
        Code.VMM_HANDOFF_UNANSWERED, f"the daemon at {path} refused the hand-off; its log says why"
    )


def hand_off(
    path: Path,
    uffd: Uffd,
    memory: GuestMemory,
    fmt: HandoffFormat = HandoffFormat.FRAMED,
    *,
    regions: int = 1,
    timeout_s: float = 5.0,
) -> socket.socket | None:
    """Give `uffd` to the daemon that listens at `path`; `uffd` stays open here.

    Returns:
        The socket, to be kept open while the guest lives; None where the format closes it.
    Raises:
        HandoffError: nobody listens, or no acknowledgement came in `timeout_s` where the format has one.
    """
    message = encode(fmt, regions_of(memory, regions), memory.page_size)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        rest = message[socket.send_fds(sock, [message], [uffd.fileno()]) :]
        if rest:
            sock.sendall(rest)
        if fmt.is_framed and not sock.recv(1):
            raise _refused(path)
    except (BrokenPipeError, ConnectionResetError) as err:
        sock.close()
        raise _refused(path) from err
    except OSError as err:
        sock.close()
        reason = err.strerror or str(err)
        raise HandoffError(
            Code.VMM_HANDOFF_UNANSWERED, f"the hand-off to the daemon at {path} failed: {reason}"
        ) from err
    except HandoffError:
        sock.close()
        raise
    _log.info("handoff.sent", format=fmt, path=str(path), regions=regions, memory_bytes=memory.len_bytes)
    if not fmt.keeps_socket:
        sock.close()
        return None
    return sock
