"""Fault exits that a VMM forwards over its hand-off socket: requests in, replies out. Sans-IO.

Two forms, told apart by the first byte of a message, as `{` would be the length of more than a request ever has:

- bitcode 0.6: u32 little-endian length, then the fields in order. An integer is a tag byte and little-endian bytes (u64:
  tags 0, 2, 4, 6 for 8, 4, 2, 1 bytes; u32: 0, 2, 4 for 4, 2, 1), an Option is 00 or 01 and its value, a bool one byte.
  The smallest width is written, every width is read.
- the older one: JSON objects one behind the other, a memory offset, and `token` where the other has `gpa`.

Source: firecracker, branch feature/secret-hiding, src/vmm/src/vstate/memory.rs and persist.rs, FaultRequest, FaultReply.
"""

from __future__ import annotations

import struct
from enum import StrEnum

import msgspec

from ..errors import Code, HandoffError
from . import fields

LENGTH = struct.Struct("<I")
MAX_BITCODE_BYTES = 64
"""Of one request or reply; the longest reply has 43."""
MAX_JSON_BYTES = 512

_U32_LIMIT = 1 << 32
_U64_WIDTHS = {0: 8, 2: 4, 4: 2, 6: 1}
_U32_WIDTHS = {0: 4, 2: 2, 4: 1}


class Form(StrEnum):
    BITCODE = "bitcode"
    JSON = "json"


class FaultRequest(msgspec.Struct, frozen=True):
    """A vCPU waits for a page: at `gpa`, or without one at the memory offset `offset`. `flags` are KVM's."""

    vcpu: int
    offset: int
    flags: int
    gpa: int | None = None
    token: int | None = None


class FaultReply(msgspec.Struct, frozen=True):
    """[offset, offset + len_bytes) is there. All but `len_bytes` and `zero` is the request's.

    A Firecracker that gets no vCPU panics.
    """

    vcpu: int | None
    offset: int
    len_bytes: int
    flags: int
    gpa: int | None
    zero: bool
    token: int | None = None


class Received(msgspec.Struct, frozen=True):
    """A request, how it was said, and its bytes."""

    request: FaultRequest
    form: Form
    frame: bytes


class RequestReader:
    """Cuts a byte stream into requests; holds at most one incomplete message."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Received]:
        """Take the next bytes and return the requests that are whole.

        Raises:
            HandoffError: what came is no request; the stream is of no further use.
        """
        self._data += data
        received = []
        while (one := self._next()) is not None:
            received.append(one)
        return received

    @property
    def partial(self) -> bytes:
        """The beginning of a request whose end did not come yet."""
        return bytes(self._data)

    def _next(self) -> Received | None:
        if not self._data:
            return None
        form = Form.JSON if self._data[0] == ord("{") else Form.BITCODE
        end = self._json_end() if form is Form.JSON else self._bitcode_end()
        if end is None:
            return None
        frame = bytes(self._data[:end])
        del self._data[:end]
        if form is Form.JSON:
            return Received(decode_json_request(frame), form, frame)
        return Received(decode_request(frame[LENGTH.size :]), form, frame)

    def _bitcode_end(self) -> int | None:
        if len(self._data) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._data)
        if length > MAX_BITCODE_BYTES:
            raise _broken(f"a request of {length} bytes is announced; at most {MAX_BITCODE_BYTES} make sense")
        return LENGTH.size + length if len(self._data) >= LENGTH.size + length else None

    def _json_end(self) -> int | None:
        start = bytes(self._data[:MAX_JSON_BYTES])
        end = fields.ValueEnd().find(start)
        if end is None and len(start) == MAX_JSON_BYTES:
            raise _broken(f"a JSON request is longer than {MAX_JSON_BYTES} bytes")
        return end


def encode_request(request: FaultRequest) -> bytes:
    """Return the payload, without its length."""
    return (
        _pack(request.vcpu, _U32_WIDTHS)
        + _pack(request.offset, _U64_WIDTHS)
        + _pack(request.flags, _U64_WIDTHS)
        + _pack_option(request.gpa, _U64_WIDTHS)
    )


def decode_request(payload: bytes) -> FaultRequest:
    """Raises HandoffError: EXIT_SOCKET_BROKEN."""
    reader = _Reader(payload)
    request = FaultRequest(
        vcpu=reader.integer(_U32_WIDTHS),
        offset=reader.integer(_U64_WIDTHS),
        flags=reader.integer(_U64_WIDTHS),
        gpa=reader.option(_U64_WIDTHS),
    )
    reader.end()
    return request


def encode_reply(reply: FaultReply) -> bytes:
    """Return the payload, without its length."""
    return (
        _pack_option(reply.vcpu, _U32_WIDTHS)
        + _pack(reply.offset, _U64_WIDTHS)
        + _pack(reply.len_bytes, _U64_WIDTHS)
        + _pack(reply.flags, _U64_WIDTHS)
        + _pack_option(reply.gpa, _U64_WIDTHS)
        + bytes([reply.zero])
    )


def decode_reply(payload: bytes) -> FaultReply:
    """Raises HandoffError: EXIT_SOCKET_BROKEN."""
    reader = _Reader(payload)
    reply = FaultReply(
        vcpu=reader.option(_U32_WIDTHS),
        offset=reader.integer(_U64_WIDTHS),
        len_bytes=reader.integer(_U64_WIDTHS),
        flags=reader.integer(_U64_WIDTHS),
        gpa=reader.option(_U64_WIDTHS),
        zero=reader.flag(),
    )
    reader.end()
    return reply


def encode_json_request(request: FaultRequest) -> bytes:
    body = {
        "vcpu": request.vcpu,
        "offset": request.offset,
        "flags": request.flags,
        "token": request.token,
    }
    return msgspec.json.encode(body)


def decode_json_request(text: bytes) -> FaultRequest:
    """Raises HandoffError: HANDOFF_NOT_JSON."""
    values = fields.as_object(fields.decode(text), "fault request")
    token = None
    if values.get("token") is not None:
        token = fields.unsigned(values, "token", "fault request", _U32_LIMIT)
    return FaultRequest(
        vcpu=fields.unsigned(values, "vcpu", "fault request", _U32_LIMIT),
        offset=fields.unsigned(values, "offset", "fault request"),
        flags=fields.unsigned(values, "flags", "fault request"),
        token=token,
    )


def encode_json_reply(reply: FaultReply) -> bytes:
    body = {
        "vcpu": reply.vcpu,
        "offset": reply.offset,
        "len": reply.len_bytes,
        "flags": reply.flags,
        "token": reply.token,
        "zero": reply.zero,
    }
    return msgspec.json.encode(body)


def frame_reply(reply: FaultReply, form: Form) -> bytes:
    """Return the bytes that answer a request of `form`."""
    if form is Form.JSON:
        return encode_json_reply(reply)
    payload = encode_reply(reply)
    return LENGTH.pack(len(payload)) + payload


class _Reader:
    """Takes fields off the front of a payload."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    def _take(self, count: int) -> bytes:
        taken = self._payload[self._at : self._at + count]
        if len(taken) < count:
            raise _broken(f"a message of {len(self._payload)} bytes ends within a field")
        self._at += count
        return taken

    def integer(self, widths: dict[int, int]) -> int:
        tag = self._take(1)[0]
        if tag not in widths:
            raise _broken(f"the tag {tag} stands for no integer")
        return int.from_bytes(self._take(widths[tag]), "little")

    def option(self, widths: dict[int, int]) -> int | None:
        return self.integer(widths) if self.flag() else None

    def flag(self) -> bool:
        value = self._take(1)[0]
        if value > 1:
            raise _broken(f"{value} is neither true nor false")
        return bool(value)

    def end(self) -> None:
        if self._at != len(self._payload):
            raise _broken(f"{len(self._payload) - self._at} bytes follow the last field of a message")


def _pack(value: int, widths: dict[int, int]) -> bytes:
    """Write the smallest form. The value fits the widest, as whoever made it has checked."""
    tag = max(tag for tag, width in widths.items() if value < 1 << 8 * width)
    return bytes([tag]) + value.to_bytes(widths[tag], "little")


def _pack_option(value: int | None, widths: dict[int, int]) -> bytes:
    return b"\0" if value is None else b"\1" + _pack(value, widths)


def _broken(what: str) -> HandoffError:
    return HandoffError(
        Code.EXIT_SOCKET_BROKEN, f"the VMM's fault requests on its socket cannot be served: {what}"
    )
