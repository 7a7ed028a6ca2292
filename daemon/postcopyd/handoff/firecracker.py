"""Firecracker's hand-off, all released generations: a bare JSON array of regions with one userfaultfd.

| Firecracker | fields of a region, whole numbers, bytes |
|---|---|
| 1.1 to 1.6 | base_host_virt_addr, size, offset |
| 1.7 to 1.11 | and page_size_kib: **bytes**, in spite of its name |
| 1.12 on | and page_size; page_size_kib repeats it, deprecated, and is not read |
| secret hiding | and gpa_start, is_guest_memfd: see firecracker_exits.py |

The array has no length and no terminator. Firecracker sends it once, wants no answer, and goes on. Before
1.12 it closes the socket at once; from 1.12 the socket stays open until the VMM ends.

e2b's fork may send a second descriptor, the memfd behind guest memory. It is accepted and closed: pages are
installed through the userfaultfd, and keeping the memfd would keep the guest's memory allocated after the VMM
ended.

Source: firecracker, docs/snapshotting/handling-page-faults-on-snapshot-resume.md and src/vmm/src/persist.rs,
GuestRegionUffdMapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, HandoffError
from ..units import PAGE_SIZE, Hva, Offset
from . import fields
from .firecracker_exits import MAX_DESCRIPTORS, forwards_exits, message_with_exits
from .message import BLANKS, MAX_MESSAGE_BYTES, MEMFD, UFFD, HandoffMessage, Incomplete, Missing, Mode
from .regions import MemoryRegion, check_regions

if TYPE_CHECKING:
    from collections.abc import Mapping

_DESCRIPTORS = (UFFD, MEMFD)


class FirecrackerParser:
    """Parses one hand-off; see HandoffParser."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._value_end = fields.ValueEnd()
        self._end: int | None = None
        self._message: HandoffMessage | None = None

    def feed(self, data: bytes, descriptors: int) -> Incomplete | HandoffMessage:
        """See HandoffParser. Blanks after the array are skipped, so that a descriptor may come with one."""
        self._data += data
        if descriptors > MAX_DESCRIPTORS:
            raise _too_many(descriptors, "ever hands over more than three")
        if len(self._data) > MAX_MESSAGE_BYTES:
            raise HandoffError(
                Code.HANDOFF_TOO_LARGE,
                f"the hand-off is longer than {MAX_MESSAGE_BYTES} bytes; it was not read further",
            )
        if self._end is None:
            self._end = self._value_end.find(self._data)
            if self._end is None:
                return Incomplete(Missing.BODY)
        trailing = bytes(self._data[self._end :]).lstrip(BLANKS)
        if self._message is None:
            self._message = _message(bytes(self._data[: self._end]))
        if self._message.exit_socket:
            return _with_exits(self._message, descriptors, trailing)
        if descriptors > len(_DESCRIPTORS):
            raise _too_many(descriptors, "of this generation hands over more than two")
        if trailing:
            raise HandoffError(
                Code.HANDOFF_UNEXPECTED,
                "more came after the regions: this Firecracker wants something else served than page faults",
            )
        if descriptors == 0:
            return Incomplete(Missing.DESCRIPTOR)
        return msgspec.structs.replace(self._message, descriptor_names=_DESCRIPTORS[:descriptors])


def _with_exits(message: HandoffMessage, descriptors: int, trailing: bytes) -> Incomplete | HandoffMessage:
    expected = len(message.descriptor_names)
    if descriptors > expected:
        raise _too_many(descriptors, f"with such regions hands over more than {expected}")
    if descriptors < expected:
        return Incomplete(Missing.DESCRIPTOR)
    return msgspec.structs.replace(message, leftover=trailing)


def _too_many(descriptors: int, who: str) -> HandoffError:
    return HandoffError(
        Code.HANDOFF_EXTRA_DESCRIPTORS, f"{descriptors} descriptors came; no Firecracker {who}"
    )


def _message(body: bytes) -> HandoffMessage:
    """Return what the array says; the names of descriptors only where the array decides them."""
    entries = [
        fields.as_object(entry, f"regions[{index}]")
        for index, entry in enumerate(fields.as_array(fields.decode(body), "message"))
    ]
    regions = tuple(_region(entry, f"regions[{index}]") for index, entry in enumerate(entries))
    if forwards_exits(entries):
        return message_with_exits(entries, regions)
    check_regions(regions, None)
    generation = _generation(entries)
    return HandoffMessage(
        format_name=f"firecracker-{generation}",
        regions=regions,
        mode=Mode.MISSING,
        descriptor_names=(),
        ignored=frozenset({MEMFD}),
        wants_ack=False,
        socket_is_liveness=generation == "1.12",
    )


def _generation(entries: list[Mapping[str, object]]) -> str:
    """Return the first version of Firecracker that sends these fields."""
    for version, field in (("1.12", "page_size"), ("1.7", "page_size_kib")):
        if all(field in entry for entry in entries):
            return version
    return "1.1"


def _region(entry: Mapping[str, object], where: str) -> MemoryRegion:
    page_size = PAGE_SIZE
    for name in ("page_size", "page_size_kib"):
        if name in entry:
            page_size = fields.unsigned(entry, name, where)
            break
    return MemoryRegion(
        host_addr=Hva(fields.unsigned(entry, "base_host_virt_addr", where)),
        size_bytes=fields.unsigned(entry, "size", where),
        image_offset=Offset(fields.unsigned(entry, "offset", where)),
        page_size=page_size,
    )
