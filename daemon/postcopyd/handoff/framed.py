"""The framed hand-off: u32 little-endian length, then a JSON object; each message is answered by one byte.

```
{"type": "handoff", "version": 0, "vmm_pid": 4711, "mode": "MISSING|WP",
 "regions": [{"guest_phys_addr": 0, "host_virt_addr": …, "size": …, "backing_file_offset": 0}]}
{"type": "add_region", "region": {…}}
```

A region may carry `page_size` in bytes; without it, 4096. `descriptors` may name what came with the message,
in order; without it exactly one descriptor comes, the userfaultfd. A name that the caller does not serve is
refused: to acknowledge a descriptor and then not use it would leave the VMM waiting for ever. Other unknown
fields are ignored. The socket stays open until the VMM ends.

To refuse a hand-off is to close the socket without the byte: there is no other no.

Source: cloud-hypervisor pull request 8657, "vmm: hand off the guest-RAM userfaultfd to an external manager".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, HandoffError
from ..units import PAGE_SIZE, Gpa, Hva, Offset
from . import fields
from .message import MAX_MESSAGE_BYTES, UFFD, HandoffMessage, Incomplete, Missing, Mode, PinnedRange
from .regions import U64_LIMIT, MemoryRegion, check_regions

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

FORMAT_NAME = "framed"
VERSION = 0
LENGTH = struct.Struct("<I")
MAX_BODY_BYTES = MAX_MESSAGE_BYTES - LENGTH.size
_U32_LIMIT = 1 << 32
MAX_PINNED_RANGES = 256
MAX_PINNED_BYTES = 64 << 20
"""Of one range: page tables and descriptor tables are small."""


class AddRegion(msgspec.Struct, frozen=True):
    """The VMM got more memory after its hand-off, and waits for one byte. The region is sound by itself."""

    region: MemoryRegion


class FrameReader:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = bytearray(data)

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> bytes | None:
        """Return the next whole frame's body, or None.

        Raises:
            HandoffError: HANDOFF_TOO_LARGE, as soon as the length says so.
        """
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        end = LENGTH.size + length
        if length > MAX_BODY_BYTES:
            raise HandoffError(
                Code.HANDOFF_TOO_LARGE,
                f"the VMM announces a message of {length} bytes; at most {MAX_BODY_BYTES} are read",
            )
        if len(self._data) < end:
            return None
        body = bytes(self._data[LENGTH.size : end])
        del self._data[:end]
        return body

    @property
    def pending_bytes(self) -> int:
        return len(self._data)

    def rest(self) -> bytes:
        """Return what came after the last whole frame."""
        return bytes(self._data)


class FramedParser:
    """Parses one hand-off; see HandoffParser.

    Args:
        served: names of descriptors that the caller knows what to do with.
    """

    def __init__(self, served: Set[str] = frozenset({UFFD})) -> None:
        self._frames = FrameReader()
        self._served = served
        self._message: HandoffMessage | None = None

    def feed(self, data: bytes, descriptors: int) -> Incomplete | HandoffMessage:
        """See HandoffParser. What follows the first frame is left over for the reader of events."""
        self._frames.feed(data)
        if descriptors > len(self._served):
            raise self._too_many(descriptors, len(self._served))
        if self._message is None:
            body = self._frames.next()
            if body is None:
                return Incomplete(Missing.BODY)
            self._message = _parse_handoff(body, self._served)
        expected = len(self._message.descriptor_names)
        if descriptors > expected:
            raise self._too_many(descriptors, expected)
        if descriptors < expected:
            self._check_pending()
            return Incomplete(Missing.DESCRIPTOR)
        return msgspec.structs.replace(self._message, leftover=self._frames.rest())

    def _check_pending(self) -> None:
        if self._frames.pending_bytes > MAX_MESSAGE_BYTES:
            raise HandoffError(
                Code.HANDOFF_NO_DESCRIPTOR, "messages went on coming, but not the descriptors of the first"
            )

    @staticmethod
    def _too_many(came: int, expected: int) -> HandoffError:
        return HandoffError(
            Code.HANDOFF_EXTRA_DESCRIPTORS,
            f"{came} descriptors came with a framed hand-off that has {expected}",
        )


def parse_event(body: bytes) -> AddRegion:
    """Parse a frame that came after the hand-off.

    Raises:
        HandoffError: no `add_region` with one sound region. HANDOFF_UNEXPECTED: another type of message.
    """
    message = fields.as_object(fields.decode(body), "message")
    kind = fields.as_text(message.get("type"), "type")
    if kind != "add_region":
        raise HandoffError(Code.HANDOFF_UNEXPECTED, f"the VMM sent {kind[:40]!a} after its hand-off")
    region = _region(fields.as_object(message.get("region"), "region"), "region")
    check_regions([region], None)
    return AddRegion(region)


def _parse_handoff(body: bytes, served: Set[str]) -> HandoffMessage:
    message = fields.as_object(fields.decode(body), "message")
    kind = fields.as_text(message.get("type"), "type")
    if kind != "handoff":
        raise HandoffError(
            Code.HANDOFF_UNEXPECTED, f"the VMM's first message is {kind[:40]!a} instead of a hand-off"
        )
    version = fields.unsigned(message, "version", "message", _U32_LIMIT)
    if version != VERSION:
        raise HandoffError(
            Code.HANDOFF_VERSION,
            f"the VMM speaks version {version} of the framed hand-off; this is version {VERSION}",
        )
    regions = tuple(
        _region(fields.as_object(entry, f"regions[{index}]"), f"regions[{index}]")
        for index, entry in enumerate(fields.as_array(message.get("regions"), "regions"))
    )
    check_regions(regions, None)
    return HandoffMessage(
        format_name=FORMAT_NAME,
        regions=regions,
        mode=_mode(fields.as_text(message.get("mode"), "mode")),
        descriptor_names=_descriptor_names(message, served),
        vmm_pid=fields.unsigned(message, "vmm_pid", "message", _U32_LIMIT),
        wants_ack=True,
        socket_is_liveness=True,
        sends_events=True,
        pinned=_pinned(message),
        keep_state=_flag(message, "keep_state"),
    )


def _flag(message: Mapping[str, object], name: str) -> bool:
    value = message.get(name, False)
    if not isinstance(value, bool):
        raise fields.wrong(name, "true or false", value)
    return value


def _pinned(message: Mapping[str, object]) -> tuple[PinnedRange, ...]:
    if message.get("pinned") is None:
        return ()
    ranges = fields.as_array(message["pinned"], "pinned")
    if len(ranges) > MAX_PINNED_RANGES:
        raise fields.wrong("pinned", f"at most {MAX_PINNED_RANGES} ranges", len(ranges))
    pinned = []
    for index, entry in enumerate(ranges):
        where = f"pinned[{index}]"
        values = fields.as_object(entry, where)
        gpa, size = fields.unsigned(values, "gpa", where), fields.unsigned(values, "size", where)
        if size > MAX_PINNED_BYTES or gpa + size > U64_LIMIT:
            raise fields.wrong(where, f"a range of at most {MAX_PINNED_BYTES} bytes", size)
        pinned.append(PinnedRange(Gpa(gpa), size))
    return tuple(pinned)


def _mode(text: str) -> Mode:
    mode = Mode(0)
    for name in text.split("|"):
        flag = Mode.__members__.get(name.strip())
        if flag is None:
            raise fields.wrong("mode", "of MISSING, MINOR, WP and WP_ASYNC, joined by |", text)
        mode |= flag
    if not mode & (Mode.MISSING | Mode.MINOR):
        raise fields.wrong("mode", "one in which absent pages are reported: MISSING or MINOR", text)
    return mode


def _descriptor_names(message: Mapping[str, object], served: Set[str]) -> tuple[str, ...]:
    if message.get("descriptors") is None:
        return (UFFD,)
    listed = fields.as_array(message["descriptors"], "descriptors")
    names = tuple(fields.as_text(name, f"descriptors[{index}]") for index, name in enumerate(listed))
    for name in names:
        if name not in served:
            raise HandoffError(
                Code.HANDOFF_EXTRA_DESCRIPTORS,
                f"the VMM hands over a descriptor {name[:40]!a}, which is not served here",
            )
    if len(set(names)) != len(names):
        raise fields.wrong("descriptors", "names without a repetition", listed)
    if UFFD not in names:
        raise HandoffError(
            Code.HANDOFF_NO_DESCRIPTOR, "the VMM lists its descriptors, and no userfaultfd among them"
        )
    return names


def _region(entry: Mapping[str, object], where: str) -> MemoryRegion:
    return MemoryRegion(
        host_addr=Hva(fields.unsigned(entry, "host_virt_addr", where)),
        size_bytes=fields.unsigned(entry, "size", where),
        image_offset=Offset(fields.unsigned(entry, "backing_file_offset", where)),
        page_size=fields.unsigned(entry, "page_size", where) if "page_size" in entry else PAGE_SIZE,
        guest_phys_addr=Gpa(fields.unsigned(entry, "guest_phys_addr", where)),
    )
