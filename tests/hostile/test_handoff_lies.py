"""Messages that lie, and noise: the parsers answer with a named error, and with nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopyd.errors import Code, HandoffError
from postcopyd.handoff import HandoffMessage, Incomplete
from postcopyd.handoff.detect import FormatDetector
from postcopyd.handoff.framed import FrameReader, parse_event
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

WRONG_NUMBERS = [
    "-1",
    "1.0",
    "1e3",
    "true",
    "null",
    '"4096"',
    "[]",
    "{}",
    str(1 << 64),
    "9" * 300,
    "NaN",
    "Infinity",
]
FRAMED_REGION = json.loads(FRAMED_BODY)["regions"][0]
NAMED = {"uffd", "ledger"}

BAD_MESSAGES = {
    "http": (b"GET / HTTP/1.1\r\n", Code.HANDOFF_UNKNOWN_FORMAT),
    "object without a length": (b'{"type":"handoff"}', Code.HANDOFF_UNKNOWN_FORMAT),
    "frame of something else": (struct.pack("<I", 9) + b"[1, 2, 3]", Code.HANDOFF_UNKNOWN_FORMAT),
    "blanks without end": (b" " * 65, Code.HANDOFF_UNKNOWN_FORMAT),
    "array of nothing": (b"[]  ", Code.HANDOFF_BAD_REGION),
    "array that is not JSON": (b"[regions]", Code.HANDOFF_NOT_JSON),
    "array that closes wrongly": (b"[1, 2}", Code.HANDOFF_NOT_JSON),
    "array of numbers": (b"[1, 2]", Code.HANDOFF_NOT_JSON),
    "array that is not UTF-8": (b'["\xff\xfe"]', Code.HANDOFF_NOT_JSON),
    "array that nests": (b"[" * 5000, Code.HANDOFF_NOT_JSON),
    "array of 64 KiB and a byte": (b"[" + b" " * (64 << 10), Code.HANDOFF_TOO_LARGE),
    "more after the array": (FIRECRACKER_1_12 + b"no_exitless_apf", Code.HANDOFF_UNEXPECTED),
    "frame of 10 MB": (struct.pack("<I", 10_000_000) + b"{", Code.HANDOFF_TOO_LARGE),
    "frame of 4 GiB": (b"\xff\xff\xff\xff{", Code.HANDOFF_TOO_LARGE),
    "frame that is not JSON": (framed(b"{type}"), Code.HANDOFF_NOT_JSON),
    "frame with more than one value": (framed(FRAMED_BODY + b"{}"), Code.HANDOFF_NOT_JSON),
    "frame in UTF-16": (framed(b"{\0\"\0a\0\"\0:\x001\0}\0"), Code.HANDOFF_NOT_JSON),
    "frame that nests": (framed(b'{"a":' * 6000), Code.HANDOFF_NOT_JSON),
    "number of 5000 digits": (framed(b'{"a":' + b"1" * 5000 + b"}"), Code.HANDOFF_NOT_JSON),
    "no type": (framed(b"{}"), Code.HANDOFF_NOT_JSON),
    "another type": (framed(ADD_REGION_BODY), Code.HANDOFF_UNEXPECTED),
    "another version": (framed_with(version=1), Code.HANDOFF_VERSION),
    "version as text": (framed_with(version="0"), Code.HANDOFF_NOT_JSON),
    "pid of 33 bits": (framed_with(vmm_pid=1 << 32), Code.HANDOFF_NOT_JSON),
    "no regions": (framed_with(regions=[]), Code.HANDOFF_BAD_REGION),
    "regions as an object": (framed_with(regions={}), Code.HANDOFF_NOT_JSON),
    "unknown mode": (framed_with(mode="MISSING|RWP"), Code.HANDOFF_NOT_JSON),
    "no mode": (framed_with(mode=""), Code.HANDOFF_NOT_JSON),
    "mode without absent pages": (framed_with(mode="WP"), Code.HANDOFF_NOT_JSON),
    "mode as a number": (framed_with(mode=1), Code.HANDOFF_NOT_JSON),
    "descriptors without a uffd": (framed_with(descriptors=["ledger"]), Code.HANDOFF_NO_DESCRIPTOR),
    "no descriptors at all": (framed_with(descriptors=[]), Code.HANDOFF_NO_DESCRIPTOR),
    "the same descriptor twice": (framed_with(descriptors=["uffd", "uffd"]), Code.HANDOFF_NOT_JSON),
    "descriptors as numbers": (framed_with(descriptors=[0]), Code.HANDOFF_NOT_JSON),
    "page size in KiB": (framed_with(regions=[{**FRAMED_REGION, "page_size": 4}]), Code.HANDOFF_PAGE_SIZE),
    "page size in true KiB": (FIRECRACKER_1_7.replace(b"2097152", b"2048"), Code.HANDOFF_PAGE_SIZE),
    "the same region twice": (framed_with(regions=[FRAMED_REGION] * 2), Code.HANDOFF_BAD_REGION),
    "a region of nothing": (FIRECRACKER_1_12.replace(b"268435456", b"0"), Code.HANDOFF_BAD_REGION),
    "too large": (FIRECRACKER_1_12.replace(b"268435456", b"18446744073709547520"), Code.HANDOFF_BAD_REGION),
}  # fmt: skip


@pytest.mark.parametrize(("data", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_bad_message_is_refused_with_its_own_code(data: bytes, code: Code) -> None:
    with refused_with(code):
        FormatDetector(NAMED).feed(data, 1)


@pytest.mark.parametrize("number", WRONG_NUMBERS, ids=lambda text: text[:20])
@pytest.mark.parametrize(
    ("good", "field"),
    [(FIRECRACKER_1_12, name) for name in ("base_host_virt_addr", "size", "offset", "page_size")]
    + [(FIRECRACKER_1_7, "page_size_kib")]
    + [
        (FRAMED, name)
        for name in ("guest_phys_addr", "host_virt_addr", "size", "backing_file_offset", "vmm_pid")
    ],
)
def test_a_number_that_is_no_u64_is_refused_by_the_fields_name(good: bytes, field: str, number: str) -> None:
    body = good[4:] if good is FRAMED else good
    changed = re.sub(rf'"{field}":\d+'.encode(), f'"{field}":{number}'.encode(), body)
    with refused_with(Code.HANDOFF_NOT_JSON) as caught:
        FormatDetector().feed(framed(changed) if good is FRAMED else changed, 1)
    assert field in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("field", ["base_host_virt_addr", "size", "offset"])
def test_an_absent_field_is_named(field: str) -> None:
    with refused_with(Code.HANDOFF_NOT_JSON) as caught:
        FormatDetector().feed(FIRECRACKER_1_12.replace(field.encode(), b"other"), 1)
    assert caught.match(f"lacks regions\\[0\\].{field}")


@pytest.mark.parametrize(
    ("data", "count"), [(FIRECRACKER_1_1, 3), (FRAMED, 2), (b"[", 17)], ids=["array", "framed", "unknown yet"]
)
def test_more_descriptors_than_the_format_has_are_refused(data: bytes, count: int) -> None:
    with refused_with(Code.HANDOFF_EXTRA_DESCRIPTORS):
        FormatDetector().feed(data, count)


def test_fewer_descriptors_than_were_named_are_waited_for_within_bounds() -> None:
    parser = FormatDetector(NAMED)
    assert isinstance(parser.feed(framed_with(descriptors=["uffd", "ledger"]), 1), Incomplete)
    with refused_with(Code.HANDOFF_NO_DESCRIPTOR):
        parser.feed(bytes((64 << 10) + 1), 1)


BAD_EVENTS = {
    "a second hand-off": (FRAMED_BODY, Code.HANDOFF_UNEXPECTED),
    "a new type": (b'{"type":"remove_region"}', Code.HANDOFF_UNEXPECTED),
    "no region": (b'{"type":"add_region"}', Code.HANDOFF_NOT_JSON),
    "an unsound region": (ADD_REGION_BODY.replace(b"134217728", b"1"), Code.HANDOFF_BAD_REGION),
    "an array": (b"[]", Code.HANDOFF_NOT_JSON),
}


@pytest.mark.parametrize(("body", "code"), BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_a_bad_event_is_refused_with_its_own_code(body: bytes, code: Code) -> None:
    with refused_with(code):
        parse_event(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = (
    st.integers(-(1 << 66), 1 << 66) | st.sampled_from([0, 1, 4096, 1 << 21, (1 << 64) - 4096]) | JSON_VALUES
)
FIRECRACKER_NAMES = ("base_host_virt_addr", "size", "offset", "page_size", "page_size_kib")
FRAMED_NAMES = ("guest_phys_addr", "host_virt_addr", "size", "backing_file_offset", "page_size")


def regions_of(names: tuple[str, ...]) -> st.SearchStrategy[object]:
    return st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(names, NUMBERS)) | JSON_VALUES, max_size=4
    )


ALMOST_FRAMED = st.fixed_dictionaries(
    {"type": st.sampled_from(["handoff", "add_region"]) | JSON_VALUES},
    optional={
        "version": st.just(0) | NUMBERS,
        "vmm_pid": NUMBERS,
        "mode": st.sampled_from(["MISSING", "MISSING|WP", "|", "WP"]) | JSON_VALUES,
        "regions": regions_of(FRAMED_NAMES) | JSON_VALUES,
        "region": regions_of(FRAMED_NAMES) | JSON_VALUES,
        "descriptors": st.lists(st.sampled_from(["uffd", "ledger", ""]) | JSON_VALUES, max_size=3)
        | JSON_VALUES,
    },
)


def as_frame(value: object) -> bytes:
    return framed(json.dumps(value).encode())


MUTATED = st.builds(
    lambda good, at, new: good[: at % len(good)] + new + good[at % len(good) + len(new) :],
    st.sampled_from([FIRECRACKER_1_1, FIRECRACKER_1_12, FRAMED]),
    st.integers(0, 400),
    st.binary(min_size=1, max_size=3) | st.sampled_from([b"[", b"]", b'"', b"\\", b"{", b"}", b"0"]),
)
ANYTHING = (
    st.binary(max_size=200)
    | st.binary(max_size=64).map(lambda tail: b"[" + tail)
    | MUTATED
    | regions_of(FIRECRACKER_NAMES).map(lambda value: json.dumps(value).encode())
    | ALMOST_FRAMED.map(as_frame)
)


def outcome(data: bytes, cuts: list[int], descriptors: int) -> object:
    """Feed `data` in pieces; return the first result that is not Incomplete, a refusal's code, or Incomplete."""
    parser = FormatDetector(NAMED)
    state: Incomplete | HandoffMessage | None = None
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    try:
        for start, end in itertools.pairwise(places):
            state = parser.feed(data[start:end], descriptors)
            if isinstance(state, HandoffMessage):
                return state.regions
    except HandoffError as error:
        return error.code
    return state


@settings(max_examples=400, deadline=None)
@given(ANYTHING, st.lists(st.integers(0, 500), max_size=5), st.integers(0, 3))
def test_no_input_has_another_outcome_than_a_handoff_more_please_or_a_named_error(
    data: bytes, cuts: list[int], descriptors: int
) -> None:
    outcome(data, cuts, descriptors)


@settings(max_examples=200, deadline=None)
@given(MUTATED | ALMOST_FRAMED.map(as_frame), st.lists(st.integers(0, 500), max_size=5))
def test_how_the_bytes_are_cut_changes_nothing(data: bytes, cuts: list[int]) -> None:
    whole = outcome(data, [], 1)
    cut = outcome(data, cuts, 1)
    # Bytes after the end of a hand-off may or may not come with it: both are right.
    assert whole == cut or Code.HANDOFF_UNEXPECTED in (whole, cut)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | ALMOST_FRAMED.map(lambda value: json.dumps(value).encode()))
def test_no_event_has_another_outcome_than_a_region_or_a_named_error(body: bytes) -> None:
    reader = FrameReader(framed(body))
    frame = reader.next()
    assert frame == body
    with contextlib.suppress(HandoffError):
        parse_event(frame)
