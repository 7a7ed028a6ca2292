"""The serving end of a page stream, without a network, against reference protobuf and an independent XXH3."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from postcopyd._native.image import MESSAGE_OVERHEAD, OutputBuffer, StreamLimits
from postcopyd.v1 import page_source_pb2 as pb
from source_support import (
    DEMAND,
    IMAGE_ID,
    LIMITS,
    PAGE,
    PREFETCH,
    Bench,
    Collector,
    asking,
    mixed_content,
    opening,
    range_of,
)

if TYPE_CHECKING:
    from pathlib import Path

OK, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED = 0, 3, 5, 8
FAILED_PRECONDITION, OUT_OF_RANGE, INTERNAL, DATA_LOSS = 9, 11, 13, 15
HUGE = 2 << 20


@pytest.fixture(params=["memory", "disk"])
def content_and_bench(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bytes, Bench]:
    """The same image in memory and on a disk, where reads go through the page cache or another thread."""
    content = mixed_content(1536)
    if request.param == "memory":
        fd = os.memfd_create("image")
        os.write(fd, content)
        bench = Bench(f"/proc/self/fd/{fd}")
        os.close(fd)
    else:
        path = tmp_path / "image"
        path.write_bytes(content)
        bench = Bench(path)
    return content, bench


def memory_bench(content: bytes, limits: StreamLimits = LIMITS) -> tuple[Bench, int]:
    fd = os.memfd_create("image")
    os.write(fd, content)
    return Bench(f"/proc/self/fd/{fd}", limits), fd


@pytest.mark.parametrize("run_align", [PAGE, 64 << 10, HUGE])
@pytest.mark.parametrize("max_data", [0, 100_000, 1 << 20, 8 << 20])
def test_every_byte_of_an_image_comes_once_with_its_checksum(
    content_and_bench: tuple[bytes, Bench], run_align: int, max_data: int
) -> None:
    content, bench = content_and_bench
    max_data = max(max_data, run_align)
    whole = range_of(7, 0, len(content))
    stream = bench.opened(whole, run_align=run_align, max_data=max_data)
    collector = Collector([whole], run_align)
    for reply in bench.replies(stream):
        data_bytes = sum(len(run.data) for run in reply.runs)
        assert data_bytes <= max(min(max_data, LIMITS.max_data_bytes), run_align)
        assert reply.ByteSize() <= data_bytes + MESSAGE_OVERHEAD
        collector.feed(reply)
    assert collector.is_complete
    assert collector.memory[7] == content


def test_zero_pages_carry_no_data(content_and_bench: tuple[bytes, Bench]) -> None:
    content, bench = content_and_bench
    whole = range_of(1, 0, len(content))
    collector = Collector([whole]).feed_all(bench.replies(bench.opened(whole)))
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    assert collector.data_bytes == PAGE * sum(any(page) for page in pages)


def test_adjacent_pages_of_a_kind_are_one_run() -> None:
    kinds = [1] * 5 + [0] * 3 + [1] + [0] * 2
    bench, fd = memory_bench(b"".join(bytes([kind]) * PAGE for kind in kinds))
    whole = range_of(1, 0, len(kinds) * PAGE)
    replies = list(bench.replies(bench.opened(whole)))
    os.close(fd)
    assert [(run.length // PAGE, bool(run.data)) for reply in replies for run in reply.runs] == [
        (5, True),
        (3, False),
        (1, True),
        (2, False),
    ]


def test_a_hole_and_the_zero_pages_behind_it_are_one_run() -> None:
    fd = os.memfd_create("image")
    os.truncate(fd, 2 << 20)
    os.pwrite(fd, bytes(1 << 20), 1 << 20)
    bench = Bench(f"/proc/self/fd/{fd}")
    os.close(fd)
    replies = list(bench.replies(bench.opened(range_of(1, 0, 2 << 20))))
    assert [(run.offset, run.length) for reply in replies for run in reply.runs] == [(0, 2 << 20)]


def test_a_huge_page_with_one_byte_is_one_run_of_data() -> None:
    content = bytearray(2 * HUGE)
    content[HUGE + 12345] = 1
    bench, fd = memory_bench(bytes(content))
    whole = range_of(1, 0, len(content))
    replies = list(bench.replies(bench.opened(whole, run_align=HUGE, max_data=HUGE)))
    os.close(fd)
    runs = [(run.offset, run.length, len(run.data)) for reply in replies for run in reply.runs]
    assert runs == [(0, HUGE, 0), (HUGE, HUGE, HUGE)]


def test_a_hole_of_a_terabyte_is_answered_without_reading_it() -> None:
    size = 1 << 40
    fd = os.memfd_create("image")
    os.truncate(fd, size)
    os.pwrite(fd, b"x" * PAGE, size // 2)
    bench = Bench(f"/proc/self/fd/{fd}")
    whole = range_of(1, 0, size)
    replies = list(bench.replies(bench.opened(whole)))
    os.close(fd)
    runs = [(run.offset, run.length, len(run.data)) for reply in replies for run in reply.runs]
    # Three, but that a run may end with a message. Read at 1 MiB a message it would be a million.
    assert len(runs) <= 4
    assert sum(length for _, length, _ in runs) == size
    assert [run for run in runs if run[2]] == [(size // 2, PAGE, PAGE)]


def test_demand_overtakes_prefetch_and_prefetch_overtakes_bulk() -> None:
    content = bytes([1]) * (8 << 20)
    bench, fd = memory_bench(content)
    bulk = range_of(1, 0, 8 << 20)
    stream = bench.opened(bulk)
    first = bench.reply(stream)
    assert {run.request_id for run in first.runs} == {1}
    ranges = [
        range_of(2, 0, PAGE, PREFETCH),
        range_of(3, PAGE, PAGE, DEMAND),
        range_of(4, 2 * PAGE, PAGE, DEMAND),
        range_of(5, 3 * PAGE, PAGE, PREFETCH),
    ]
    assert stream.request(asking(*ranges)) == OK
    messages = [[run.request_id for run in bench.reply(stream).runs] for _ in range(3)]
    os.close(fd)
    assert messages == [[3, 4], [2, 5], [1]]


def test_a_bulk_range_goes_on_where_demand_interrupted_it() -> None:
    content = mixed_content(1024, seed=3)
    bench, fd = memory_bench(content)
    ranges = [range_of(1, 0, len(content))]
    stream = bench.opened(*ranges, max_data=4 * PAGE)
    collector = Collector([*ranges, *(range_of(n, n * PAGE, PAGE) for n in range(2, 100))])
    for n in range(2, 100):
        collector.feed(bench.reply(stream))
        assert stream.request(asking(range_of(n, n * PAGE, PAGE, DEMAND))) == OK
        collector.feed(bench.reply(stream))
        assert collector.order[-1] == n
    collector.feed_all(bench.replies(stream))
    os.close(fd)
    assert collector.is_complete
    assert collector.memory[1] == content


def test_a_demand_message_is_short_however_many_are_asked() -> None:
    bench, fd = memory_bench(bytes([1]) * (4 << 20))
    ranges = [range_of(n, n * PAGE, PAGE, DEMAND) for n in range(1024)]
    stream = bench.opened(*ranges)
    sizes = [reply.ByteSize() for reply in bench.replies(stream)]
    os.close(fd)
    assert max(sizes) <= (64 << 10) + 4096


def test_a_priority_that_is_not_known_is_bulk() -> None:
    bench, fd = memory_bench(bytes([1]) * (16 * PAGE))
    unknown = pb.Range(request_id=1, offset=0, length=PAGE, priority=17)  # type: ignore[arg-type]
    stream = bench.opened(unknown, range_of(2, PAGE, PAGE, PREFETCH))
    order = [run.request_id for reply in bench.replies(stream) for run in reply.runs]
    os.close(fd)
    assert order == [2, 1]


@pytest.mark.parametrize(
    ("ranges", "status"),
    [
        ([range_of(1, 1, PAGE)], INVALID_ARGUMENT),
        ([range_of(1, 0, PAGE + 1)], INVALID_ARGUMENT),
        ([range_of(1, 0, 0)], INVALID_ARGUMENT),
        ([range_of(1, PAGE // 2, PAGE)], INVALID_ARGUMENT),
        ([range_of(1, 16 * PAGE, PAGE)], OUT_OF_RANGE),
        ([range_of(1, 0, 17 * PAGE)], OUT_OF_RANGE),
        ([range_of(1, (1 << 64) - PAGE, PAGE)], OUT_OF_RANGE),
        ([range_of(1, PAGE, 1 << 40)], OUT_OF_RANGE),
        ([range_of(1, 0, (1 << 64) - PAGE)], INVALID_ARGUMENT),
        ([range_of(n, 0, PAGE) for n in range(4097)], RESOURCE_EXHAUSTED),
    ],
)
def test_ranges_that_cannot_be_answered_end_the_stream(ranges: list[pb.Range], status: int) -> None:
    bench, fd = memory_bench(bytes([1]) * (16 * PAGE))
    stream = bench.opened()
    assert stream.request(asking(*ranges)) == status
    assert stream.error
    assert stream.produce(bench.output) == -status, "nothing is served any more"
    assert stream.request(asking()) == status
    os.close(fd)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"image_id": "other"}, NOT_FOUND),
        ({"image_id": ""}, NOT_FOUND),
        ({"image_id": "vm\0"}, NOT_FOUND),
        ({"epoch": 1}, FAILED_PRECONDITION),
        ({"run_align": 0}, INVALID_ARGUMENT),
        ({"run_align": 2048}, INVALID_ARGUMENT),
        ({"run_align": 12288}, INVALID_ARGUMENT),
        ({"run_align": 1 << 30, "max_data_bytes": 1 << 30}, INVALID_ARGUMENT),
        ({"max_data_bytes": 4095}, INVALID_ARGUMENT),
    ],
)
def test_an_open_that_does_not_fit_ends_the_stream(change: dict[str, int | str], status: int) -> None:
    bench, fd = memory_bench(bytes([1]) * PAGE)
    request = pb.PageRequest.FromString(opening(bench.file.epoch))
    for name, value in change.items():
        setattr(request.open, name, value)
    stream = bench.stream()
    assert stream.request(request.SerializeToString()) == status
    os.close(fd)


def test_messages_out_of_order_end_the_stream() -> None:
    bench, fd = memory_bench(bytes([1]) * PAGE)
    without_open = bench.stream()
    assert without_open.request(asking(range_of(1, 0, PAGE))) == INVALID_ARGUMENT
    opened_twice = bench.opened()
    assert opened_twice.request(opening(bench.file.epoch)) == INVALID_ARGUMENT
    empty_first = bench.stream()
    assert empty_first.request(b"") == INVALID_ARGUMENT
    os.close(fd)


def test_ranges_before_open_in_one_message_are_served() -> None:
    bench, fd = memory_bench(bytes([1]) * PAGE)
    first_open = opening(bench.file.epoch)
    stream = bench.stream()
    assert stream.request(asking(range_of(9, 0, PAGE)) + first_open) == OK
    assert [run.request_id for run in bench.reply(stream).runs] == [9]
    os.close(fd)


def test_answered_ranges_make_room_for_others() -> None:
    limits = StreamLimits(max_ranges=4, max_data_bytes=PAGE, max_range_bytes=PAGE)
    bench, fd = memory_bench(bytes([1]) * (8 * PAGE), limits)
    stream = bench.opened(*(range_of(n, n * PAGE, PAGE) for n in range(4)))
    for n in range(4, 100):
        bench.reply(stream)
        assert stream.request(asking(range_of(n, 0, PAGE))) == OK
    assert stream.outstanding == 4
    assert stream.request(asking(range_of(100, 0, PAGE))) == RESOURCE_EXHAUSTED
    os.close(fd)


def test_an_overlong_request_is_refused_unparsed() -> None:
    bench, fd = memory_bench(bytes([1]) * PAGE)
    stream = bench.opened()
    assert stream.request(bytes(1 << 20)) == RESOURCE_EXHAUSTED
    os.close(fd)


@pytest.mark.parametrize("size_left", [0, PAGE, 4 * PAGE + 100])
@pytest.mark.parametrize("length", [PAGE, 256 * PAGE])
def test_a_truncated_image_is_data_loss_and_never_zeros(size_left: int, length: int) -> None:
    bench, fd = memory_bench(bytes([1]) * (512 * PAGE))
    stream = bench.opened(range_of(1, 256 * PAGE, length))
    os.truncate(fd, size_left)
    assert stream.produce(bench.output) == -DATA_LOSS
    assert "shorter" in stream.error
    os.close(fd)


def test_a_truncated_hole_is_data_loss_and_never_zeros() -> None:
    fd = os.memfd_create("image")
    os.truncate(fd, 1 << 30)
    bench = Bench(f"/proc/self/fd/{fd}")
    stream = bench.opened(range_of(1, 0, 1 << 30))
    os.truncate(fd, 1 << 20)
    answer = stream.produce(bench.output)
    os.close(fd)
    assert answer == -DATA_LOSS


def test_a_released_image_is_not_found() -> None:
    bench, fd = memory_bench(bytes([1]) * (16 * PAGE))
    asked = bench.opened(range_of(1, 0, PAGE))
    idle = bench.opened()
    bench.file.release()
    assert asked.produce(bench.output) == -NOT_FOUND
    assert idle.request(asking(range_of(1, 0, PAGE))) == NOT_FOUND
    assert bench.stream().request(opening(bench.file.epoch)) == NOT_FOUND
    os.close(fd)


def test_a_buffer_that_holds_no_run_is_an_error_and_a_small_one_makes_small_messages() -> None:
    content = mixed_content(64, seed=5)
    bench, fd = memory_bench(content)
    whole = range_of(1, 0, len(content))
    assert bench.opened(whole).produce(OutputBuffer(PAGE)) == -INTERNAL
    small = bench.opened(whole)
    bench.output = OutputBuffer(PAGE + 64)
    collector = Collector([whole]).feed_all(bench.replies(small))
    assert collector.memory[1] == content
    os.close(fd)


def test_a_hole_on_a_disk_is_answered_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "image"
    size = 1 << 40
    with path.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"x" * PAGE, size - PAGE)
    bench = Bench(path)
    replies = list(bench.replies(bench.opened(range_of(1, 0, size))))
    runs = [run for reply in replies for run in reply.runs]
    assert sum(run.length for run in runs) == size
    assert sum(len(run.data) for run in runs) == PAGE
    # Some zeros are read before the question is worth it; the terabyte would take a million messages.
    assert len(replies) <= 8


def test_names_are_exact() -> None:
    bench, fd = memory_bench(bytes([1]) * PAGE)
    prefix = opening(bench.file.epoch).replace(b"\x02" + IMAGE_ID.encode(), b"\x01v")
    assert bench.stream().request(prefix) != OK
    os.close(fd)
