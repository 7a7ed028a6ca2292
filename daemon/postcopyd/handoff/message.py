"""What a hand-off says, before any descriptor is looked at: the value every format's parser makes."""

from __future__ import annotations

from enum import Flag, StrEnum, auto
from typing import Protocol

import msgspec

from ..units import Gpa
from .regions import MemoryRegion

MAX_MESSAGE_BYTES = 64 << 10
"""The longest hand-off that is read, header included; a thousand regions fit."""

BLANKS = b" \t\r\n"
"""What JSON allows around a value."""

UFFD = "uffd"
MEMFD = "memfd"
EXIT_RING = "exit_ring"
EXIT_NOTIFY = "exit_notify"
IMAGE = "image"
STATE = "state"
GUEST_MEMFD = "guest_memfd"
BITMAP = "bitmap"


class Mode(Flag):
    """The modes in which the VMM registered its memory. Source: ioctl_userfaultfd(2), UFFDIO_REGISTER."""

    MISSING = auto()
    MINOR = auto()
    WP = auto()
    WP_ASYNC = auto()


class Missing(StrEnum):
    """What an incomplete hand-off still lacks."""

    FIRST_BYTES = "first bytes"
    BODY = "rest of the message"
    DESCRIPTOR = "descriptor"


class Incomplete(msgspec.Struct, frozen=True):
    """Nothing is wrong so far; more must come."""

    missing: Missing


class PinnedRange(msgspec.Struct, frozen=True):
    """Guest physical memory, bytes."""

    gpa: Gpa
    size_bytes: int


class HandoffMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One parsed hand-off. Its regions passed `check_regions`, but for the image's size.

    descriptor_names: one for each descriptor that came, in order; always contains `uffd` once.
    ignored: those of them that postcopyd has no use for and closes.
    vmm_pid: as the VMM sees itself, so in its own PID name space; never to be used as a process id here.
    socket_is_liveness: the VMM keeps its socket open for as long as it lives, so a hang-up means its end.
    sends_events: framed messages may follow; without it, nothing may.
    pinned: what must be there before a vCPU runs, as the kernel itself reads it (page tables, descriptor tables).
    keep_state: the acknowledgement is to carry the state memory, so that the VMM can present it again.
    exit_socket: the VMM forwards fault exits over its socket, after a word of its own about how.
    leftover: bytes that came after the hand-off; they belong to whoever reads the socket next.
    """

    format_name: str
    regions: tuple[MemoryRegion, ...]
    mode: Mode
    descriptor_names: tuple[str, ...]
    ignored: frozenset[str] = frozenset()
    vmm_pid: int | None = None
    wants_ack: bool
    socket_is_liveness: bool
    sends_events: bool = False
    leftover: bytes = b""
    pinned: tuple[PinnedRange, ...] = ()
    keep_state: bool = False
    exit_socket: bool = False


class HandoffParser(Protocol):
    """One format's parser for one connection. Sans-IO: it sees bytes and a count of descriptors.

    A format decides how many descriptors may come and what they are, whether an acknowledgement is due, and
    what the socket means afterwards; the reader that feeds it knows none of that.
    """

    def feed(self, data: bytes, descriptors: int) -> Incomplete | HandoffMessage:
        """Take the next bytes, and the number of all descriptors received so far. Not called after a message.

        Bytes and descriptors may come in any order and in any pieces; the work is linear in the bytes.

        Raises:
            HandoffError: this can never become a valid hand-off.
        """
