"""The C codec against the protobuf library, through the pager that uses it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_kernel import FakeKernel, Page
from fake_source import reply, run_of
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Lane, Pager, StateMemory
from postcopyd.units import Hva, Offset
from postcopyd.v1 import page_source_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
BASE = 0x7F0000000000
PAGES = 16
FAR = (1 << 40) + 7 * PAGE
"""An image offset that takes several bytes on the wire."""


class Setup:
    """Sixteen pages behind a fake kernel."""

    def __init__(self) -> None:
        self.kernel = FakeKernel(
            {BASE + i * PAGE: Page(i, PAGE, bytes([i + 1]) * PAGE) for i in range(PAGES)}
        )
        region = MemoryRegion(host_addr=Hva(BASE), size_bytes=PAGES * PAGE, image_offset=Offset(FAR))
        self.state = StateMemory.fresh("wire", PAGES)
        self.pager = Pager.create(self.state, [region], 0, edge=self.kernel.edge)

    def close(self) -> None:
        self.pager.close()
        self.state.close()

    def ask(self) -> pb.Range:
        """One range over all pages."""
        body, _ = self.pager.encode_bulk(PAGES * PAGE, PAGES * PAGE)
        (asked,) = pb.PageRequest.FromString(body).ranges
        return asked


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.close()


def content() -> bytes:
    return b"".join(bytes([i + 1]) * PAGE for i in range(PAGES))


def test_requests_are_what_protobuf_reads(setup: Setup) -> None:
    asked = setup.ask()
    assert (asked.offset, asked.length, asked.priority) == (FAR, PAGES * PAGE, pb.PRIORITY_BULK)
    body = pb.PageRequest(ranges=[asked]).SerializeToString()
    setup.pager.reset_lane(Lane.BULK)
    again, _ = setup.pager.encode_bulk(PAGES * PAGE, PAGES * PAGE)
    # Byte for byte but for the id, which is never used twice at a time.
    (asked_again,) = pb.PageRequest.FromString(again).ranges
    assert asked_again.request_id != asked.request_id
    asked_again.request_id = asked.request_id
    assert pb.PageRequest(ranges=[asked_again]).SerializeToString() == body
    assert not pb.PageRequest.FromString(again).HasField("open")


def test_several_requests_after_an_opening_are_one_message(setup: Setup) -> None:
    """The transport may send what the pager wrote behind an Open: protobuf messages concatenate."""
    opening = pb.PageRequest(open=pb.Open(image_id="i", epoch=1, run_align=PAGE, max_data_bytes=PAGE))
    bodies = [setup.pager.encode_bulk(2 * PAGE, PAGE)[0] for _ in range(3)]
    message = pb.PageRequest.FromString(opening.SerializeToString() + b"".join(bodies))
    assert message.open.image_id == "i"
    assert [r.offset for r in message.ranges] == [FAR + i * PAGE for i in range(6)]


@given(cuts=st.sets(st.integers(1, PAGES - 1)), together=st.booleans())
@settings(max_examples=40, deadline=None)
def test_replies_that_protobuf_writes_are_taken_however_they_are_cut(cuts: set[int], together: bool) -> None:
    setup = Setup()
    try:
        asked = setup.ask()
        edges = [0, *sorted(cuts), PAGES]
        data = content()
        runs = [
            run_of(asked.request_id, FAR + a * PAGE, data[a * PAGE : b * PAGE])
            for a, b in itertools.pairwise(edges)
        ]
        messages = [reply(*runs)] if together else [reply(run) for run in runs]
        assert all(setup.pager.feed(message) for message in messages)
        assert setup.pager.is_complete()
        assert not setup.kernel.breaches
    finally:
        setup.close()


def test_fields_of_a_later_version_are_passed_over(setup: Setup) -> None:
    asked = setup.ask()
    run = run_of(asked.request_id, FAR, content()).SerializeToString()
    later = b"\x58\x07" + b"\x62\x03abc"  # fields 11 and 12
    body = later + run
    message = b"\x7a\x02hi" + b"\x0a" + varint(len(body)) + body
    assert setup.pager.feed(message)
    assert setup.pager.is_complete()


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@given(cut=st.integers(0, 200), noise=st.binary(max_size=60), at=st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_refused_and_install_nothing_wrong(cut: int, noise: bytes, at: int) -> None:
    setup = Setup()
    try:
        asked = setup.ask()
        honest = reply(run_of(asked.request_id, FAR, content()[:PAGE]))
        head, body = honest[:40], honest[40:]
        setup.pager.feed(noise)
        setup.pager.feed(honest[:cut])
        setup.pager.feed(head[:at] + noise + head[at:] + body)
        assert not setup.kernel.breaches
        stats = setup.pager.stats()
        assert stats.missing + stats.requested + stats.present + stats.zero == PAGES
    finally:
        setup.close()


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "request_id": st.integers(0, 2**64 - 1),
            "offset": st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([FAR, FAR + PAGE])),
            "length": st.one_of(
                st.integers(0, 2**64 - 1), st.sampled_from([PAGE, PAGES * PAGE, PAGES * PAGE + PAGE])
            ),
            "xxh3_64": st.integers(0, 2**64 - 1),
            "data": st.binary(max_size=16),
        },
    ),
    right_id=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_well_formed_lies_are_refused(fields: dict[str, object], right_id: bool) -> None:
    setup = Setup()
    try:
        asked = setup.ask()
        run = pb.Run(**fields)  # type: ignore[arg-type]
        if right_id:
            run.request_id = asked.request_id
        assert setup.pager.feed(reply(run))
        stats = setup.pager.stats()
        honest_zero = (
            run.request_id == asked.request_id
            and run.offset == FAR
            and not run.data
            and 0 < run.length <= PAGES * PAGE
            and run.length % PAGE == 0
        )
        assert stats.zero == (run.length // PAGE if honest_zero else 0)
        assert stats.present == 0
        assert stats.bad_replies == (0 if honest_zero else 1)
    finally:
        setup.close()
