"""The secret-hiding generation's hand-off, without a socket."""

from __future__ import annotations

import json

import pytest

from postcopyd.errors import Code
from postcopyd.handoff import HandoffMessage, Incomplete, Missing, Mode
from postcopyd.handoff.detect import FormatDetector
from postcopyd.handoff.firecracker_exits import split_word
from postcopyd.units import HUGE_PAGE_SIZE, MIB, Gpa
from support_handoff import refused_with

ENTRY = {
    "base_host_virt_addr": 139942411894784,
    "size": 256 * MIB,
    "offset": 0,
    "page_size": 4096,
    "page_size_kib": 4096,
    "gpa_start": 4 << 30,
    "is_guest_memfd": True,
}


def array(*changes: dict[str, object]) -> bytes:
    return json.dumps([{**ENTRY, **change} for change in changes or ({},)]).encode()


def parse(data: bytes, descriptors: int) -> HandoffMessage:
    message = FormatDetector().feed(data, descriptors)
    assert isinstance(message, HandoffMessage), message
    return message


def test_guest_memfd_comes_with_its_file_and_its_bitmap() -> None:
    message = parse(array(), 3)
    assert message.descriptor_names == ("uffd", "guest_memfd", "bitmap")
    assert message.mode == Mode.MISSING | Mode.MINOR
    assert message.regions[0].guest_phys_addr == Gpa(4 << 30)
    assert message.exit_socket
    assert message.socket_is_liveness
    assert not message.wants_ack


def test_ordinary_memory_comes_with_its_userfaultfd_alone() -> None:
    message = parse(array({"is_guest_memfd": False}), 1)
    assert message.descriptor_names == ("uffd",)
    assert message.mode is Mode.MISSING
    assert message.exit_socket


def test_what_follows_the_array_is_left_over_to_its_last_byte() -> None:
    assert parse(array() + b"no_exitless_apf\x09\x00\x0a ", 3).leftover == b"no_exitless_apf\x09\x00\x0a "


def test_fewer_descriptors_than_the_array_says_are_waited_for() -> None:
    assert FormatDetector().feed(array(), 2) == Incomplete(Missing.DESCRIPTOR)


def test_more_descriptors_than_the_array_says_are_refused() -> None:
    with refused_with(Code.HANDOFF_EXTRA_DESCRIPTORS):
        parse(array({"is_guest_memfd": False}), 3)


def test_regions_of_two_kinds_are_refused() -> None:
    high = {"offset": 256 * MIB, "gpa_start": 8 << 30, "base_host_virt_addr": 139938116927488}
    with refused_with(Code.HANDOFF_BAD_REGION):
        parse(array({}, {**high, "is_guest_memfd": False}), 3)


def test_guest_memfd_in_huge_pages_is_refused() -> None:
    with refused_with(Code.HANDOFF_PAGE_SIZE):
        parse(array({"page_size": HUGE_PAGE_SIZE, "base_host_virt_addr": 1 << 40}), 3)


def test_an_entry_without_a_place_in_the_guest_is_refused() -> None:
    entries = json.loads(array())
    del entries[0]["gpa_start"]
    with refused_with(Code.HANDOFF_NOT_JSON):
        parse(json.dumps(entries).encode(), 3)


@pytest.mark.parametrize("value", [1, "true", None])
def test_a_kind_that_is_neither_true_nor_false_is_refused(value: object) -> None:
    with refused_with(Code.HANDOFF_NOT_JSON):
        parse(array({"is_guest_memfd": value}), 3)


def test_the_word_about_exits_may_come_byte_by_byte_and_has_no_end() -> None:
    word = b"no_exitless_apf"
    assert [split_word(word[:length]) for length in range(len(word))] == [None] * len(word)
    assert split_word(word) == b""
    assert split_word(word + b"\x0c\0\0\0") == b"\x0c\0\0\0"
    assert split_word(b"exitless_apf:") is None
