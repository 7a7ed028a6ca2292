"""The pager on a real userfaultfd: another process faults, gives memory back, moves and splits it, and dies."""

from __future__ import annotations

import hashlib
import mmap
import select
from typing import TYPE_CHECKING

import pytest

import uffd_target as t
from harness import huge_pages
from postcopyd.errors import KernelError
from postcopyd.handoff.regions import MemoryRegion
from postcopyd.pager import Lane, Signal, probe_registered
from postcopyd.units import Hva, Offset
from served import PATIENCE_S, Served, image_of
from support import require_uffd
from uffd_target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
SIZE = 2 << 20
EVENTS = t.EVENT_REMOVE | t.EVENT_REMAP | t.EVENT_UNMAP | t.THREAD_ID


@pytest.fixture(autouse=True)
def _uffd() -> None:
    require_uffd()


@pytest.fixture(params=["anon", "shmem", "hugetlb"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "hugetlb":
        yield request.param
        return
    # One more than the memory has: a replaced page is taken before the old one is back.
    with huge_pages(5):
        yield "hugetlb"


def size_of(kind: str) -> int:
    return 4 * t.HUGE if kind == "hugetlb" else SIZE


def test_every_page_arrives_with_its_content_while_threads_fault(kind: str) -> None:
    size = size_of(kind)
    image = image_of(size)
    with Target(kind, size) as target, Served(target, image) as served:
        parts = [target.start("digest", target.base + i * size // 4, size // 4) for i in range(4)]
        served.until(lambda: served.pager.stats().demand > 0)
        digests = served.finish(*parts, push=True)
        assert digests == [
            hashlib.sha256(image[i * size // 4 : (i + 1) * size // 4]).hexdigest() for i in range(4)
        ]
        served.complete()
        stats = served.pager.stats()
        assert stats.present + stats.zero == stats.pages
        assert stats.waiting == 0
        assert stats.faults > 0


def test_after_release_the_guest_needs_nobody(kind: str) -> None:
    size = size_of(kind)
    image = image_of(size - size // 4) + bytes(size // 4)
    with Target(kind, size) as target, Served(target, image) as served:
        served.complete()
        assert served.pager.stats().zero >= size // 4 // target.page_size
        served.pager.release()
        whole = target.start("digest", target.base, size)
        # Nobody drains any more: what is zero is the kernel's to fill.
        wait_without_serving(target, whole)
        assert target.result(whole) == hashlib.sha256(image).hexdigest()


def wait_without_serving(target: Target, *numbers: int) -> None:
    for _ in range(int(PATIENCE_S * 10)):
        target.collect()
        if target.is_done(*numbers):
            return
        select.select([target.control], [], [], 0.1)
    pytest.fail("a thread stands still although nothing is registered any more")


@pytest.mark.parametrize("advice", [t.MADV_DONTNEED, t.MADV_REMOVE])
def test_what_the_guest_gives_back_is_zero_in_every_order(kind: str, advice: int) -> None:
    if kind == "anon" and advice == t.MADV_REMOVE:
        advice = t.MADV_DONTNEED  # anonymous memory has no hole to punch
    if kind != "anon" and advice == t.MADV_DONTNEED:
        pytest.skip("of shared memory MADV_DONTNEED drops the mapping alone; the content stays")
    size = size_of(kind)
    image = image_of(size)
    half, step = size // 2, target_step(kind)
    with Target(kind, size) as target, Served(target, image) as served:
        # Two threads give the lower half back over and over, while two read the upper half.
        rounds = 2 if kind == "hugetlb" else 6
        quarter = half // 2
        storms = [
            target.start("storm", target.base + i * quarter, quarter, step, rounds, advice) for i in range(2)
        ]
        readers = [target.start("digest", target.base + half, half) for _ in range(2)]
        *wrong, first, second = served.finish(*storms, *readers, push=True)
        assert wrong == [0, 0]
        assert first == second == hashlib.sha256(image[half:]).hexdigest()
        served.complete()
        lower = target.start("touch", target.base, half, PAGE)
        (bytes_seen,) = served.finish(lower)
        assert set(bytes.fromhex(bytes_seen)) == {0}
        # Written again, it is ordinary memory.
        served.finish(target.start("fill", target.base, half, 0x5A))
        (digest,) = served.finish(target.start("digest", target.base, half))
        assert digest == hashlib.sha256(b"\x5a" * half).hexdigest()
        assert served.pager.stats().removed > 0


def target_step(kind: str) -> int:
    return t.HUGE if kind == "hugetlb" else 16 * PAGE


def test_a_removal_while_its_page_is_on_the_way_discards_the_reply() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        reader = target.start("read", target.base + 8 * PAGE, PAGE)
        while not served.source.outstanding[Lane.DEMAND]:
            served.step(answer=False)
        given_back = target.start("madvise", target.base + 8 * PAGE, PAGE, t.MADV_DONTNEED)
        while served.pager.stats().removed == 0:
            served.step(answer=False)
        content, _ = served.finish(reader, given_back)
        assert bytes.fromhex(content) == bytes(PAGE)
        served.complete()
        assert served.pager.stats().duplicates >= 1


def test_memory_that_moves_is_served_at_its_new_place() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE, features=EVENTS) as target, Served(target, image) as served:
        (place,) = served.finish(target.start("reserve", SIZE))
        served.finish(target.start("mremap", target.base + SIZE // 2, SIZE // 4, place))
        moved, rest = served.finish(
            target.start("digest", place, SIZE // 4), target.start("digest", target.base, SIZE // 2)
        )
        assert moved == hashlib.sha256(image[SIZE // 2 : SIZE * 3 // 4]).hexdigest()
        assert rest == hashlib.sha256(image[: SIZE // 2]).hexdigest()
        served.complete()
        served.pager.release()
        assert served.pager.stats().removed == 0


def test_memory_that_is_unmapped_is_owed_no_more() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE, features=EVENTS) as target, Served(target, image) as served:
        served.finish(target.start("munmap", target.base + SIZE // 4, SIZE // 2))
        served.complete()
        stats = served.pager.stats()
        assert stats.removed == SIZE // 2 // PAGE
        (digest,) = served.finish(target.start("digest", target.base, SIZE // 4))
        assert digest == hashlib.sha256(image[: SIZE // 4]).hexdigest()


def test_memory_unmapped_without_an_event_is_found_out() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE, features=0) as target, Served(target, image) as served:
        served.finish(target.start("munmap", target.base + SIZE // 4, 3 * PAGE))
        served.complete()
        assert served.pager.stats().zero >= 3
        (digest,) = served.finish(target.start("digest", target.base + SIZE // 2, SIZE // 2))
        assert digest == hashlib.sha256(image[SIZE // 2 :]).hexdigest()


def test_a_mapping_split_by_the_vmm_is_installed_right() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        for page in (5, 100, 101, 300):
            served.finish(target.start("mprotect", target.base + page * PAGE, PAGE, mmap.PROT_READ))
        served.complete()
        (digest,) = served.finish(target.start("digest", target.base, SIZE))
        assert digest == hashlib.sha256(image).hexdigest()
        assert served.pager.stats().removed == 0


def test_a_vmm_that_is_killed_is_noticed() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        target.start("read", target.base, PAGE)
        while not served.source.outstanding[Lane.DEMAND]:
            served.step(answer=False)
        target.kill()
        served.step()
        assert Signal.GONE in served.signals


def test_memory_with_content_of_its_own_keeps_it() -> None:
    """MINOR: the page cache has the page, the mapping has not. What is there wins over the source."""
    image = image_of(SIZE)
    with (
        Target(
            "shmem", SIZE, features=t.EVENT_REMOVE | t.THREAD_ID | t.MINOR_SHMEM, mode=t.MISSING | t.MINOR
        ) as target,
        Served(target, image) as served,
    ):
        served.finish(target.start("pwrite", 3 * PAGE, 0x77, 2 * PAGE))
        page, next_page, other = served.finish(
            target.start("read", target.base + 3 * PAGE, PAGE),
            target.start("read", target.base + 4 * PAGE, PAGE),
            target.start("read", target.base + 5 * PAGE, PAGE),
        )
        assert bytes.fromhex(page) == bytes.fromhex(next_page) == b"\x77" * PAGE
        assert bytes.fromhex(other) == image[5 * PAGE : 6 * PAGE]
        served.complete()


def test_messages_that_a_dead_process_had_read_are_answered_by_the_next() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        readers = [target.start("read", target.base + page * PAGE, PAGE) for page in range(8)]
        while served.pager.stats().waiting < 8:
            served.step(answer=False)
        assert target.blocked_threads() == 8
        served.die_and_adopt()
        contents = served.finish(*readers)
        assert [bytes.fromhex(c) for c in contents] == [image[p * PAGE : (p + 1) * PAGE] for p in range(8)]


def test_nobody_reads_zeros_while_no_process_serves() -> None:
    image = b"".join(bytes([1 + page % 250]) * PAGE for page in range(SIZE // PAGE))
    with Target("anon", SIZE) as target, Served(target, image) as served:
        touches = [target.start("touch", target.base + i * SIZE // 4, SIZE // 4, PAGE) for i in range(4)]
        for _ in range(10):
            served.step()
            served.die_and_adopt()
        seen = b"".join(bytes.fromhex(text) for text in served.finish(*touches))
        assert seen == image[::PAGE]
        served.complete()


def test_a_removal_read_by_a_dead_process_is_not_forgotten() -> None:
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        given_back = target.start("madvise", target.base, 16 * PAGE, t.MADV_DONTNEED)
        while served.pager.stats().removed == 0:
            served.step(push=False)
        served.die_and_adopt()
        served.finish(given_back)
        served.complete()
        (content,) = served.finish(target.start("read", target.base, 16 * PAGE))
        assert bytes.fromhex(content) == bytes(16 * PAGE)


def test_probing_tells_what_is_registered_and_changes_nothing(kind: str) -> None:
    size = size_of(kind)
    with Target(kind, size) as target:
        whole = region(target.base, size, target.page_size)
        assert probe_registered(target.uffd, whole)
        with Served(target, image_of(size)) as served:
            (place,) = served.finish(target.start("reserve", size + t.HUGE))
            aligned = (place + t.HUGE - 1) & ~(t.HUGE - 1)
            assert not probe_registered(target.uffd, region(aligned, size, target.page_size))
            # Had the probe put a page there, this would not be the source's.
            (digest,) = served.finish(target.start("digest", target.base, size))
            assert digest == hashlib.sha256(image_of(size)).hexdigest()


def test_probing_says_when_the_vmm_is_gone() -> None:
    with Target("anon", SIZE) as target:
        target.kill()
        with pytest.raises(KernelError) as error:
            probe_registered(target.uffd, region(target.base, SIZE, PAGE))
        assert error.value.errno == 3  # ESRCH


def region(start: int, size: int, page_size: int) -> MemoryRegion:
    return MemoryRegion(host_addr=Hva(start), size_bytes=size, image_offset=Offset(0), page_size=page_size)


def test_regions_of_different_page_sizes_are_served_by_one_pager() -> None:
    """Huge pages from ordinary memory: an install of 2 MiB is one call, whatever lies behind."""
    size = 6 * t.HUGE
    image = image_of(size)
    with Target("anon", size) as target:
        edge = (target.base + t.HUGE - 1) & ~(t.HUGE - 1)
        middle, end = edge + 2 * t.HUGE, edge + 4 * t.HUGE
        regions = [
            MemoryRegion(host_addr=Hva(edge), size_bytes=2 * t.HUGE, image_offset=Offset(0), page_size=PAGE),
            MemoryRegion(
                host_addr=Hva(middle),
                size_bytes=end - middle,
                image_offset=Offset(2 * t.HUGE),
                page_size=t.HUGE,
            ),
        ]
        with Served(target, image, regions) as served:
            small, large = served.finish(
                target.start("digest", edge, 2 * t.HUGE), target.start("digest", middle, 2 * t.HUGE)
            )
            assert small == hashlib.sha256(image[: 2 * t.HUGE]).hexdigest()
            assert large == hashlib.sha256(image[2 * t.HUGE : 4 * t.HUGE]).hexdigest()
            served.complete()


def test_poisoned_memory_ends_the_wait() -> None:
    """The guest sees a machine check: here SIGBUS, which ends the target."""
    image = image_of(SIZE)
    with Target("anon", SIZE) as target, Served(target, image) as served:
        target.start("read", target.base, PAGE)
        while not served.source.outstanding[Lane.DEMAND]:
            served.step(answer=False)
        if not poison_is_supported(served):
            pytest.skip("this kernel has no UFFDIO_POISON (6.6)")
        assert target.process.wait(PATIENCE_S) == -7


def poison_is_supported(served: Served) -> bool:
    return served.pager.poison_missing()
