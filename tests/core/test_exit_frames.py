"""Fault exits as frames: the published bytes, every width, and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.errors import Code, HandoffError
from postcopyd.handoff.exit_frames import (
    MAX_BITCODE_BYTES,
    MAX_JSON_BYTES,
    FaultReply,
    FaultRequest,
    Form,
    RequestReader,
    decode_json_request,
    decode_reply,
    decode_request,
    encode_json_reply,
    encode_json_request,
    encode_reply,
    encode_request,
    frame_reply,
)
from support_handoff import refused_with

REQUESTS = {
    "04 01 06 00 06 10 01 02 00 50 34 12": FaultRequest(1, 0, 16, 0x12345000),
    "04 00 06 00 06 00 00": FaultRequest(0, 0, 0),
}
REPLIES = {
    "01 04 01 06 00 04 00 10 06 10 01 02 00 50 34 12 01": FaultReply(1, 0, 4096, 16, 0x12345000, zero=True),
    "01 04 03 06 00 04 00 10 06 30 00 00": FaultReply(3, 0, 4096, 48, None, zero=False),
}

U32 = st.one_of(*(st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32)))
U64 = st.one_of(*(st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64)))
REQUEST = st.builds(FaultRequest, U32, U64, U64, st.none() | U64)
REPLY = st.builds(FaultReply, st.none() | U32, U64, U64, U64, st.none() | U64, st.booleans())


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


@pytest.mark.parametrize("text", REQUESTS)
def test_a_request_has_exactly_the_published_bytes(text: str) -> None:
    assert encode_request(REQUESTS[text]) == bytes.fromhex(text)
    assert decode_request(bytes.fromhex(text)) == REQUESTS[text]


@pytest.mark.parametrize("text", REPLIES)
def test_a_reply_has_exactly_the_published_bytes(text: str) -> None:
    assert encode_reply(REPLIES[text]) == bytes.fromhex(text)
    assert decode_reply(bytes.fromhex(text)) == REPLIES[text]


def test_integers_wider_than_needed_are_read() -> None:
    assert decode_request(bytes.fromhex("00 01000000  00 0000000000000000  02 10000000  01 04 0050")) == (
        FaultRequest(1, 0, 16, 0x5000)
    )
    assert decode_request(bytes.fromhex("02 0100  04 0000  00 1000000000000000  00")) == FaultRequest(
        1, 0, 16
    )


@given(REQUEST)
def test_what_is_written_of_a_request_is_read_again(request: FaultRequest) -> None:
    assert decode_request(encode_request(request)) == request


@given(REPLY)
def test_what_is_written_of_a_reply_is_read_again(reply: FaultReply) -> None:
    payload = encode_reply(reply)
    assert decode_reply(payload) == reply
    assert len(payload) <= MAX_BITCODE_BYTES


@given(st.builds(FaultRequest, U32, U64, U64, st.none(), st.none() | U32))
def test_what_is_written_of_a_json_request_is_read_again(request: FaultRequest) -> None:
    assert decode_json_request(encode_json_request(request)) == request


@given(st.lists(REQUEST, max_size=5), st.lists(st.integers(1, 40)))
def test_requests_are_read_in_whatever_pieces_they_come(
    requests: list[FaultRequest], cuts: list[int]
) -> None:
    stream = b"".join(
        encode_json_request(request) if request.gpa is None else framed(encode_request(request))
        for request in requests
    )
    reader = RequestReader()
    received = []
    for cut in cuts:
        received += reader.feed(stream[:cut])
        stream = stream[cut:]
    received += reader.feed(stream)
    assert [one.request for one in received] == requests
    assert [one.form for one in received] == [
        Form.JSON if request.gpa is None else Form.BITCODE for request in requests
    ]
    assert reader.partial == b""


@given(st.binary(max_size=80))
def test_any_payload_is_read_or_refused_by_name(payload: bytes) -> None:
    codes = set()
    for decode in (decode_request, decode_reply, RequestReader().feed):
        try:
            decode(payload)
        except HandoffError as error:
            codes.add(error.code)
    assert codes <= {Code.EXIT_SOCKET_BROKEN, Code.HANDOFF_NOT_JSON}


BAD_PAYLOADS = {
    "empty": "",
    "cut": "04 01 06 00 06 10 01 02 00 50 34",
    "longer than its fields": "04 00 06 00 06 00 00 00",
    "a tag of u64 where a u32 is": "06 01 06 00 06 10 00",
    "a tag that does not exist": "04 01 07 00 06 10 00",
    "an option that is neither": "04 01 06 00 06 10 02",
}


@pytest.mark.parametrize("text", BAD_PAYLOADS.values(), ids=list(BAD_PAYLOADS))
def test_a_payload_that_is_no_request_is_refused(text: str) -> None:
    with refused_with(Code.EXIT_SOCKET_BROKEN):
        decode_request(bytes.fromhex(text))


def test_a_reply_whose_bool_is_neither_is_refused() -> None:
    with refused_with(Code.EXIT_SOCKET_BROKEN):
        decode_reply(bytes.fromhex("01 04 03 06 00 04 00 10 06 30 00 02"))


def test_a_length_that_no_request_has_is_refused_before_its_bytes_come() -> None:
    with refused_with(Code.EXIT_SOCKET_BROKEN):
        RequestReader().feed(struct.pack("<I", MAX_BITCODE_BYTES + 1))


def test_a_json_request_without_an_end_is_refused_at_its_bound() -> None:
    reader = RequestReader()
    assert reader.feed(b'{"vcpu":"' + b"x" * (MAX_JSON_BYTES - 10)) == []
    with refused_with(Code.EXIT_SOCKET_BROKEN):
        reader.feed(b"x")


@pytest.mark.parametrize(
    "text",
    [
        '{"vcpu":-1,"offset":0,"flags":0,"token":null}',
        '{"vcpu":4294967296,"offset":0,"flags":0,"token":null}',
        '{"vcpu":true,"offset":0,"flags":0,"token":null}',
        '{"vcpu":0,"flags":0,"token":null}',
        '{"vcpu":0,"offset":0.5,"flags":0}',
        '{"vcpu":0,"offset":0,"flags":0,"token":4294967296}',
        "{no}",
    ],
)
def test_json_that_is_no_request_is_refused(text: str) -> None:
    with refused_with(Code.HANDOFF_NOT_JSON):
        RequestReader().feed(text.encode())


def test_the_older_form_is_answered_with_its_token() -> None:
    reply = FaultReply(2, 8192, 4096, 16, None, zero=False, token=7)
    assert (
        encode_json_reply(reply)
        == frame_reply(reply, Form.JSON)
        == b'{"vcpu":2,"offset":8192,"len":4096,"flags":16,"token":7,"zero":false}'
    )


def test_a_bitcode_reply_is_framed_by_its_length() -> None:
    reply = REPLIES["01 04 03 06 00 04 00 10 06 30 00 00"]
    assert frame_reply(reply, Form.BITCODE) == framed(encode_reply(reply))
