"""Images: what may be served, how it is named, and what identifies its content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from postcopyd._native.image import ImageFile, ImageFileError
from postcopyd.errors import Code, ConfigError, SourceError
from postcopyd.source.catalog import Catalog, read_holes
from postcopyd.source.image import ImageSpec, open_image, parse_image
from source_support import PAGE, Bench, Collector, mixed_content, range_of

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
HUGE = 2 << 20


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vm=/x", ImageSpec("vm", "/x")),
        ("vm=/x@7", ImageSpec("vm", "/x", 7)),
        ("vm=/x@0x10", ImageSpec("vm", "/x", 16)),
        ("vm=/x@18446744073709551615", ImageSpec("vm", "/x", (1 << 64) - 1)),
        ("vm=/a=b", ImageSpec("vm", "/a=b")),
        ("vm=/run/user@host/x", ImageSpec("vm", "/run/user@host/x")),
        ("vm=/run/user@host/x@007", ImageSpec("vm", "/run/user@host/x", 7)),
        ("vm=/x@1@2", ImageSpec("vm", "/x@1", 2)),
    ],
)
def test_an_image_argument_is_read(text: str, spec: ImageSpec) -> None:
    assert parse_image(text) == spec


@pytest.mark.parametrize(
    "text", ["", "vm", "vm=", "=/x", "v m=/x", "vm=/x@0", "vm=/x@18446744073709551616", "a/b=/x", "é=/x"]
)
def test_an_image_argument_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_image(text)
    assert caught.value.code is Code.ARGUMENT_INVALID


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "empty", "unaligned", "device"])
def test_a_file_that_is_no_image_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "unaligned":
            path.write_bytes(bytes(PAGE + 1))
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError) as caught:
        open_image(ImageSpec("vm", str(path)))
    assert caught.value.code is Code.IMAGE_UNREADABLE
    assert str(path) in caught.value.message


def test_an_id_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ConfigError, match="vm is named twice"):
        Catalog([ImageSpec("vm", str(path)), ImageSpec("vm", str(path))])


def test_the_same_file_keeps_its_epoch_and_changed_content_gets_another(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    epoch = ImageFile(str(path)).epoch
    assert epoch != 0
    assert ImageFile(str(path)).epoch == epoch
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert ImageFile(str(path)).epoch != epoch
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(PAGE))
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    assert ImageFile(str(copy)).epoch != ImageFile(str(path)).epoch


def test_a_given_epoch_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    assert open_image(ImageSpec("vm", str(path), 42)).file.epoch == 42


def all_holes(catalog: Catalog) -> list[tuple[int, int]]:
    image = catalog.get("vm")
    holes: list[tuple[int, int]] = []
    cursor = 0
    while cursor < image.file.size_bytes:
        cursor, some = read_holes(image, cursor)
        holes += some
    return holes


def test_holes_are_found_between_data_and_at_both_ends() -> None:
    fd = os.memfd_create("image")
    os.truncate(fd, 1 << 40)
    for at in (3, 4, 9):
        os.pwrite(fd, b"x", at * PAGE + 100)
    catalog = Catalog([ImageSpec("vm", f"/proc/{os.getpid()}/fd/{fd}")])
    os.close(fd)
    assert all_holes(catalog) == [(0, 3 * PAGE), (5 * PAGE, 4 * PAGE), (10 * PAGE, (1 << 40) - 10 * PAGE)]


def test_more_holes_than_fit_a_batch_are_all_found() -> None:
    fd = os.memfd_create("image")
    os.truncate(fd, 20_000 * PAGE)
    for page in range(0, 20_000, 2):
        os.pwrite(fd, b"x", page * PAGE)
    catalog = Catalog([ImageSpec("vm", f"/proc/{os.getpid()}/fd/{fd}")])
    os.close(fd)
    assert all_holes(catalog) == [(page * PAGE, PAGE) for page in range(1, 20_000, 2)]


def test_holes_of_a_file_that_shrank_are_an_error() -> None:
    fd = os.memfd_create("image")
    os.truncate(fd, 1 << 30)
    catalog = Catalog([ImageSpec("vm", f"/proc/{os.getpid()}/fd/{fd}")])
    os.truncate(fd, PAGE)
    os.close(fd)
    with pytest.raises(SourceError) as caught:
        all_holes(catalog)
    assert caught.value.code is Code.IMAGE_SHRANK


def test_release_closes_the_file_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))

    def is_open() -> bool:
        links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return str(path) in links

    catalog = Catalog([ImageSpec("vm", str(path))])
    epoch = catalog.get("vm").file.epoch
    assert is_open()
    assert catalog.complete("vm", epoch)
    assert not is_open()
    assert catalog.complete("vm", epoch), "a repeated Complete has the same answer"
    assert catalog.all_released.is_set()
    with pytest.raises(SourceError) as caught:
        catalog.get("vm")
    assert caught.value.code is Code.SOURCE_UNKNOWN_IMAGE
    with pytest.raises(SourceError) as caught:
        catalog.complete("vm", epoch + 1)
    assert caught.value.code is Code.SOURCE_OTHER_EPOCH


def test_a_kept_image_is_not_released(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    catalog = Catalog([ImageSpec("vm", str(path))], keep=True)
    assert not catalog.complete("vm", catalog.get("vm").file.epoch)
    assert catalog.get("vm").id == "vm"


def test_opened_images_that_fail_leave_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(ImageFileError):
            ImageFile(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def huge_page_file() -> Iterator[tuple[int, bytes]]:
    """A hugetlbfs memfd of two pages, the second a hole; the pages are reserved and given back."""
    reserved = int(HUGE_PAGES.read_text()) if HUGE_PAGES.exists() else -1
    if reserved < 0:
        pytest.skip("this kernel has no 2 MiB huge pages")
    try:
        HUGE_PAGES.write_text(str(reserved + 2))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error}")
    try:
        if int(HUGE_PAGES.read_text()) < reserved + 2:
            pytest.skip("no two huge pages are free")
        fd = os.memfd_create("image", os.MFD_HUGETLB)
        try:
            os.truncate(fd, 2 * HUGE)
            yield fd, _fill_huge_page(fd)
        finally:
            os.close(fd)
    finally:
        HUGE_PAGES.write_text(str(reserved))


def _fill_huge_page(fd: int) -> bytes:
    import mmap

    content = mixed_content(HUGE // PAGE, seed=9)
    # hugetlbfs has no write(2).
    with mmap.mmap(fd, 2 * HUGE) as memory:
        memory[:HUGE] = content
    return content + bytes(HUGE)


def test_a_file_of_huge_pages_is_served(huge_page_file: tuple[int, bytes]) -> None:
    fd, content = huge_page_file
    bench = Bench(f"/proc/{os.getpid()}/fd/{fd}")
    assert bench.file.page_size == HUGE
    assert bench.file.in_memory
    for run_align in (PAGE, HUGE):
        whole = range_of(1, 0, len(content))
        stream = bench.opened(whole, run_align=run_align, max_data=HUGE)
        collector = Collector([whole], run_align).feed_all(bench.replies(stream))
        assert collector.memory[1] == content
    bench.file.release()
