"""The formats' parsers, without a socket: bytes and a count of descriptors in, a hand-off out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from postcopyd.errors import Code
from postcopyd.handoff import HandoffMessage, Incomplete, MemoryRegion, Missing, Mode, fields
from postcopyd.handoff.detect import FormatDetector
from postcopyd.handoff.framed import FrameReader, parse_event
from postcopyd.units import GIB, HUGE_PAGE_SIZE, MIB, Gpa, Hva, Offset
from support_handoff import (
    ADD_REGION_BODY,
    FIRECRACKER_1_1,
    FIRECRACKER_1_7,
    FIRECRACKER_1_12,
    FRAMED,
    FRAMED_BODY,
    framed,
    framed_with,
    refused_with,
)

if TYPE_CHECKING:
    from collections.abc import Set

LOW = Hva(139942411894784)
HIGH = Hva(139938116927488)


def parse(data: bytes, descriptors: int = 1, served: Set[str] = frozenset({"uffd"})) -> HandoffMessage:
    message = FormatDetector(served).feed(data, descriptors)
    assert isinstance(message, HandoffMessage), message
    return message


def missing(data: bytes, descriptors: int = 1) -> Missing:
    state = FormatDetector().feed(data, descriptors)
    assert isinstance(state, Incomplete), state
    return state.missing


def firecracker_with(**changes: object) -> bytes:
    entries = json.loads(FIRECRACKER_1_12)
    return json.dumps([{**entries[0], **changes}]).encode()


def test_firecracker_1_1_is_understood() -> None:
    assert parse(FIRECRACKER_1_1) == HandoffMessage(
        format_name="firecracker-1.1",
        regions=(
            MemoryRegion(LOW, 3489660928, Offset(0)),
            MemoryRegion(HIGH, 768 * MIB, Offset(3489660928)),
        ),
        mode=Mode.MISSING,
        descriptor_names=("uffd",),
        ignored=frozenset({"memfd"}),
        wants_ack=False,
        socket_is_liveness=False,
    )


def test_firecracker_1_7_gives_its_page_size_in_bytes_whatever_the_field_is_called() -> None:
    message = parse(FIRECRACKER_1_7)
    assert message.format_name == "firecracker-1.7"
    assert message.regions == (MemoryRegion(LOW, 256 * MIB, Offset(0), HUGE_PAGE_SIZE),)
    assert not message.socket_is_liveness


def test_firecracker_1_12_keeps_its_socket_open_for_as_long_as_it_lives() -> None:
    message = parse(FIRECRACKER_1_12)
    assert message.format_name == "firecracker-1.12"
    assert message.regions == (MemoryRegion(LOW, 256 * MIB, Offset(0)),)
    assert message.socket_is_liveness


def test_page_size_wins_over_its_deprecated_name() -> None:
    assert parse(firecracker_with(page_size=HUGE_PAGE_SIZE)).regions[0].page_size == HUGE_PAGE_SIZE


def test_one_region_without_page_size_makes_a_hangup_mean_nothing() -> None:
    old = {"base_host_virt_addr": HIGH, "size": 4096, "offset": GIB}
    assert not parse(json.dumps([*json.loads(FIRECRACKER_1_12), old]).encode()).socket_is_liveness


def test_a_memfd_beside_firecrackers_uffd_is_known_and_not_wanted() -> None:
    message = parse(FIRECRACKER_1_7, descriptors=2)
    assert message.descriptor_names == ("uffd", "memfd")
    assert message.ignored == {"memfd"}


def test_a_framed_handoff_is_understood() -> None:
    assert parse(FRAMED) == HandoffMessage(
        format_name="framed",
        regions=(MemoryRegion(LOW, 256 * MIB, Offset(0), guest_phys_addr=Gpa(0)),),
        mode=Mode.MISSING | Mode.WP | Mode.WP_ASYNC,
        descriptor_names=("uffd",),
        vmm_pid=4711,
        wants_ack=True,
        socket_is_liveness=True,
        sends_events=True,
    )


def test_a_framed_region_may_name_its_page_size() -> None:
    entry = {**json.loads(FRAMED_BODY)["regions"][0], "page_size": HUGE_PAGE_SIZE}
    assert parse(framed_with(regions=[entry])).regions[0].page_size == HUGE_PAGE_SIZE


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("MISSING", Mode.MISSING),
        ("MINOR", Mode.MINOR),
        ("MISSING|MINOR|WP", Mode.MISSING | Mode.MINOR | Mode.WP),
    ],
)
def test_a_framed_mode_is_a_set_of_flags(text: str, mode: Mode) -> None:
    assert parse(framed_with(mode=text)).mode == mode


def test_named_descriptors_are_known_by_their_order() -> None:
    data = framed_with(descriptors=["ledger", "uffd"])
    assert parse(data, 2, frozenset({"uffd", "ledger"})).descriptor_names == ("ledger", "uffd")


def test_a_descriptor_that_nobody_serves_is_refused_by_name() -> None:
    with refused_with(Code.HANDOFF_EXTRA_DESCRIPTORS) as caught:
        parse(framed_with(descriptors=["uffd", "exit_ring"]), 1)
    assert caught.match("exit_ring")


@pytest.mark.parametrize(
    "data", [FIRECRACKER_1_12, FRAMED, framed_with(session="s-1")], ids=["array", "frame", "session"]
)
def test_unknown_fields_are_ignored(data: bytes) -> None:
    added = data.replace(b'"size":', b'"colour":{"deep":[1.5,null,"]}"]},"size":').replace(
        b'"size": ', b'"x": 1,"size": '
    )
    if data[4:5] == b"{":
        added = framed(added[4:])
    assert parse(added).regions == parse(data).regions


@pytest.mark.parametrize("blanks", [b" ", b"\r\n\t  ", b" " * 60])
def test_blanks_around_the_array_are_skipped(blanks: bytes) -> None:
    assert parse(blanks + FIRECRACKER_1_1 + blanks) == parse(FIRECRACKER_1_1)


@pytest.mark.parametrize("length", [0x15B, 0x120, 0x10A, 0x10D, 0x109, 0x5B5B])
def test_a_frame_whose_length_looks_like_text_is_still_a_frame(length: int) -> None:
    body = FRAMED_BODY.ljust(length)
    assert parse(framed(body)).format_name == "framed"


@pytest.mark.parametrize("data", [FIRECRACKER_1_1, FIRECRACKER_1_12, FRAMED], ids=["1.1", "1.12", "framed"])
def test_every_way_to_cut_a_message_in_two_gives_the_same_handoff(data: bytes) -> None:
    for cut in range(1, len(data)):
        for first_count in (0, 1):
            parser = FormatDetector()
            assert isinstance(parser.feed(data[:cut], first_count), Incomplete)
            assert parser.feed(data[cut:], 1) == parse(data)


@pytest.mark.parametrize("data", [FIRECRACKER_1_1, FRAMED], ids=["array", "framed"])
def test_a_descriptor_may_come_after_the_message(data: bytes) -> None:
    parser = FormatDetector()
    assert parser.feed(data, 0) == Incomplete(Missing.DESCRIPTOR)
    message = parser.feed(b"\n", 1)
    assert isinstance(message, HandoffMessage)
    assert message.regions == parse(data).regions


def test_what_is_missing_is_named() -> None:
    assert missing(b"") is Missing.FIRST_BYTES
    assert missing(b"[]") is Missing.FIRST_BYTES
    assert missing(b"    ") is Missing.FIRST_BYTES
    assert missing(FRAMED[:4]) is Missing.FIRST_BYTES
    assert missing(FRAMED[:5]) is Missing.BODY
    assert missing(FIRECRACKER_1_1[:-1]) is Missing.BODY
    assert missing(FIRECRACKER_1_1, 0) is Missing.DESCRIPTOR
    assert missing(FRAMED, 0) is Missing.DESCRIPTOR


def test_brackets_and_quotes_inside_strings_do_not_end_the_array() -> None:
    data = firecracker_with(note='"]}\\"[{\\').replace(b'"note"', b'"no\\"]te"')
    for cut in range(1, len(data)):
        parser = FormatDetector()
        assert isinstance(parser.feed(data[:cut], 1), Incomplete)
        assert isinstance(parser.feed(data[cut:], 1), HandoffMessage)


def test_a_message_that_comes_byte_by_byte_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = fields.decode

    def counting(body: bytes) -> object:
        decoded.append(body)
        return decode(body)

    monkeypatch.setattr(fields, "decode", counting)
    data = firecracker_with(note="]" * 30000)
    parser = FormatDetector()
    states = [parser.feed(data[i : i + 1], 1) for i in range(len(data))]
    assert isinstance(states[-1], HandoffMessage)
    assert decoded == [data]


def test_frames_that_follow_the_handoff_are_left_for_the_session() -> None:
    message = parse(FRAMED + framed(ADD_REGION_BODY) + b"\x01")
    reader = FrameReader(message.leftover)
    assert reader.next() == ADD_REGION_BODY
    assert reader.next() is None
    assert reader.rest() == b"\x01"


def test_add_region_is_an_event() -> None:
    assert parse_event(ADD_REGION_BODY).region == MemoryRegion(
        HIGH, 128 * MIB, Offset(256 * MIB), guest_phys_addr=Gpa(4 * GIB)
    )
