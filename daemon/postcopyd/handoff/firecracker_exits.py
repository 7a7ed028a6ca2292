"""The hand-off of Firecracker's secret-hiding branch: guest_memfd, and fault exits over the socket.

An entry carries `gpa_start` and `is_guest_memfd` too. Ordinary memory comes with the userfaultfd alone; guest_memfd
with `[uffd, guest_memfd, bitmap]`, where the bitmap has one bit for each 4 KiB of memory offset (u64 words, set: a
vCPU's access exits). After the array comes, on the same socket, `no_exitless_apf` or `exitless_apf:<n>` (ASCII, no
terminator), then frames (exit_frames.py). Until that word came the VMM has not filled its bitmap.

Source: firecracker, branch feature/secret-hiding, src/vmm/src/persist.rs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, HandoffError
from ..units import PAGE_SIZE, Gpa
from . import fields
from .message import BITMAP, GUEST_MEMFD, UFFD, HandoffMessage, Mode
from .regions import MemoryRegion, check_regions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT_NAME = "firecracker-exits"
MAX_DESCRIPTORS = 3

_BY_SOCKET = b"no_exitless_apf"
_EXITLESS = re.compile(rb"exitless_apf:[0-9]")


def forwards_exits(entries: Sequence[Mapping[str, object]]) -> bool:
    """Whether these regions are of the generation that forwards fault exits."""
    return any("gpa_start" in entry or "is_guest_memfd" in entry for entry in entries)


def message_with_exits(
    entries: Sequence[Mapping[str, object]], regions: Sequence[MemoryRegion]
) -> HandoffMessage:
    """Add what this generation says. Raises HandoffError."""
    placed = tuple(
        msgspec.structs.replace(
            region, guest_phys_addr=Gpa(fields.unsigned(entry, "gpa_start", f"regions[{index}]"))
        )
        for index, (entry, region) in enumerate(zip(entries, regions, strict=True))
    )
    check_regions(placed, None)
    kinds = {_is_guest_memfd(entry, f"regions[{index}]") for index, entry in enumerate(entries)}
    if len(kinds) > 1:
        raise HandoffError(
            Code.HANDOFF_BAD_REGION,
            "some regions are guest_memfd and some are not: what the descriptors are is not clear then",
        )
    is_guest_memfd = kinds == {True}
    if is_guest_memfd and any(region.page_size != PAGE_SIZE for region in placed):
        raise HandoffError(Code.HANDOFF_PAGE_SIZE, "guest_memfd is served in pages of 4096 bytes only")
    return HandoffMessage(
        format_name=FORMAT_NAME,
        regions=placed,
        mode=Mode.MISSING | Mode.MINOR if is_guest_memfd else Mode.MISSING,
        descriptor_names=(UFFD, GUEST_MEMFD, BITMAP) if is_guest_memfd else (UFFD,),
        wants_ack=False,
        socket_is_liveness=True,
        exit_socket=True,
    )


def split_word(data: bytes) -> bytes | None:
    """Return what follows the word about exits; None: the word is not whole.

    Raises:
        HandoffError: EXIT_SOCKET_EXITLESS, or EXIT_SOCKET_BROKEN: it is neither word.
    """
    if data.startswith(_BY_SOCKET):
        return data[len(_BY_SOCKET) :]
    if _EXITLESS.match(data):
        raise HandoffError(
            Code.EXIT_SOCKET_EXITLESS, "the VMM wants exitless asynchronous page faults, which are not served"
        )
    if _BY_SOCKET.startswith(data) or b"exitless_apf:".startswith(data):
        return None
    raise HandoffError(
        Code.EXIT_SOCKET_BROKEN,
        f"the VMM sent {data[:24]!a} where no_exitless_apf belongs",
    )


def _is_guest_memfd(entry: Mapping[str, object], where: str) -> bool:
    value = entry.get("is_guest_memfd", False)
    if not isinstance(value, bool):
        raise fields.wrong(f"{where}.is_guest_memfd", "true or false", value)
    return value
