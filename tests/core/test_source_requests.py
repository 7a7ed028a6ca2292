"""Whatever bytes a client sends as requests: an answer or a named end, and the parser agrees with protobuf's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopyd.v1 import page_source_pb2 as pb
from source_support import IMAGE_ID, PAGE, Bench, opening

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 64
NAMED_ENDS = {3, 5, 8, 9, 11}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    fd = os.memfd_create("image")
    os.write(fd, bytes([1]) * (PAGES * PAGE))
    bench = Bench(f"/proc/self/fd/{fd}")
    os.close(fd)
    yield bench
    bench.file.release()


numbers = st.one_of(
    st.integers(0, 80).map(lambda n: n * PAGE),
    st.sampled_from([0, 1, 4095, (1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - 1, (1 << 64) - PAGE]),
    st.integers(0, (1 << 64) - 1),
)
ranges = st.builds(
    pb.Range,
    request_id=numbers,
    offset=numbers,
    length=numbers,
    priority=st.integers(-3, 5),  # type: ignore[arg-type]
)
opens = st.builds(
    pb.Open,
    image_id=st.one_of(st.just(IMAGE_ID), st.text(max_size=200)),
    epoch=st.integers(0, (1 << 64) - 1),
    run_align=st.one_of(st.just(PAGE), st.integers(0, (1 << 32) - 1)),
    max_data_bytes=st.one_of(st.just(1 << 20), st.integers(0, (1 << 32) - 1)),
)
requests = st.builds(pb.PageRequest, open=st.none() | opens, ranges=st.lists(ranges, max_size=20))


def drain(bench: Bench, message: bytes, *, opened: bool) -> None:
    """Feed one message to an open or a new stream, and serve whatever it asks for."""
    stream = bench.opened() if opened else bench.stream()
    status = stream.request(message)
    assert status == 0 or status in NAMED_ENDS
    assert bool(stream.error) == (status != 0)
    for _ in range(1 + PAGES * 20):
        answer = stream.produce(bench.output)
        if not isinstance(answer, bytes):
            break
    assert answer in {0, -status}


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_end_in_a_named_way(bench: Bench, message: bytes, opened: bool) -> None:
    drain(bench, message, opened=opened)


@settings(deadline=None, max_examples=300)
@given(requests, st.booleans())
def test_arbitrary_requests_end_in_a_named_way(bench: Bench, request: pb.PageRequest, opened: bool) -> None:
    drain(bench, request.SerializeToString(), opened=opened)


@settings(deadline=None, max_examples=300)
@given(requests, st.data())
def test_damaged_requests_end_in_a_named_way(
    bench: Bench, request: pb.PageRequest, data: st.DataObject
) -> None:
    message = bytearray(opening(bench.file.epoch) + request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] = data.draw(st.integers(0, 255))
    drain(bench, bytes(message[: data.draw(st.integers(0, len(message)))]), opened=False)


@settings(deadline=None, max_examples=500)
@given(st.one_of(st.binary(max_size=60), requests.map(pb.PageRequest.SerializeToString)))
def test_what_protobuf_refuses_is_refused(bench: Bench, message: bytes) -> None:
    try:
        pb.PageRequest.FromString(message)
    except DecodeError:
        assert bench.opened().request(message) != 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4), st.integers(1, 3)), max_size=50))
def test_valid_ranges_are_answered_exactly(bench: Bench, asked: list[tuple[int, int, int]]) -> None:
    valid = [
        pb.Range(
            request_id=number,
            offset=page * PAGE,
            length=min(count, PAGES - page) * PAGE,
            priority=priority,  # type: ignore[arg-type]
        )
        for number, (page, count, priority) in enumerate(asked)
    ]
    stream = bench.opened(*valid)
    answered = dict.fromkeys(range(len(valid)), 0)
    priorities = []
    for reply in bench.replies(stream):
        kinds = {valid[run.request_id].priority for run in reply.runs}
        assert len(kinds) == 1, "a message is of one priority"
        priorities.append(kinds.pop())
        for run in reply.runs:
            answered[run.request_id] += run.length
    assert answered == {number: asked_for.length for number, asked_for in enumerate(valid)}
    assert priorities == sorted(priorities)
