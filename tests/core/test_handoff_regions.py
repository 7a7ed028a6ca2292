"""What a VMM says about its memory is used only if it can be true."""

from __future__ import annotations

import pytest

from postcopyd.errors import Code
from postcopyd.handoff import MemoryRegion, check_regions
from postcopyd.units import GIB, MIB, Gpa, Hva, Offset
from support_handoff import refused_with

TOP = 1 << 64
BASE = 0x7F0000000000


def region(
    host_addr: int = BASE,
    size_bytes: int = MIB,
    image_offset: int = 0,
    page_size: int = 4096,
    guest_phys_addr: int | None = None,
) -> MemoryRegion:
    gpa = None if guest_phys_addr is None else Gpa(guest_phys_addr)
    return MemoryRegion(Hva(host_addr), size_bytes, Offset(image_offset), page_size, gpa)


GOOD = {
    "one": [region()],
    "neighbours in any order": [region(BASE + MIB, MIB, MIB), region()],
    "up to the last byte of the address space": [region(TOP - MIB)],
    "2 MiB pages": [region(size_bytes=4 * MIB, page_size=2 * MIB)],
    "1 GiB pages": [region(BASE & ~(GIB - 1), GIB, 0, GIB)],
    "both kinds of pages": [
        region(size_bytes=2 * MIB, page_size=2 * MIB),
        region(BASE + 2 * MIB, MIB, 2 * MIB),
    ],
    "guest addresses for some only": [region(guest_phys_addr=0), region(BASE + MIB, MIB, MIB)],
    "as many as there may be": [region(BASE + i * 4096, 4096, i * 4096) for i in range(4096)],
}

BAD = {
    "none": ([], Code.HANDOFF_BAD_REGION, "no memory region"),
    "too many": (
        [region(BASE + i * 4096, 4096, i * 4096) for i in range(4097)],
        Code.HANDOFF_BAD_REGION,
        "4097",
    ),
    "empty": ([region(), region(BASE + MIB, 0, MIB)], Code.HANDOFF_BAD_REGION, "region 1 .* is empty"),
    "unaligned address": ([region(BASE + 1)], Code.HANDOFF_BAD_REGION, "region 0 .* host address"),
    "unaligned size": ([region(size_bytes=4097)], Code.HANDOFF_BAD_REGION, "region 0 .* size"),
    "unaligned offset": ([region(image_offset=512)], Code.HANDOFF_BAD_REGION, "region 0 .* image offset"),
    "unaligned guest address": (
        [region(guest_phys_addr=1)],
        Code.HANDOFF_BAD_REGION,
        "guest physical address",
    ),
    "not aligned to its huge pages": (
        [region(BASE + 4096, 2 * MIB, 0, 2 * MIB)],
        Code.HANDOFF_BAD_REGION,
        "multiple of 2097152",
    ),
    "offset not aligned to its huge pages": (
        [region(BASE, 2 * MIB, MIB, 2 * MIB)],
        Code.HANDOFF_BAD_REGION,
        "image offset",
    ),
    "address overflows": (
        [region(TOP - MIB, 2 * MIB)],
        Code.HANDOFF_BAD_REGION,
        "host address .* beyond 2\\^64",
    ),
    "offset overflows": (
        [region(image_offset=TOP - 4096)],
        Code.HANDOFF_BAD_REGION,
        "image offset .* beyond",
    ),
    "guest address overflows": (
        [region(guest_phys_addr=TOP - 4096)],
        Code.HANDOFF_BAD_REGION,
        "guest .* beyond",
    ),
    "addresses overlap": (
        [region(), region(BASE + MIB - 4096, MIB, MIB)],
        Code.HANDOFF_BAD_REGION,
        "region 1 .* overlaps region 0 .* host addresses",
    ),
    "one inside another, far apart in the list": (
        [
            region(size_bytes=8 * MIB),
            region(BASE + 16 * MIB, MIB, 16 * MIB),
            region(BASE + 4 * MIB, 4096, 32 * MIB),
        ],
        Code.HANDOFF_BAD_REGION,
        "region 2 .* overlaps region 0",
    ),
    "the same twice": ([region(), region(image_offset=MIB)], Code.HANDOFF_BAD_REGION, "host addresses"),
    "offsets overlap": ([region(), region(BASE + MIB, MIB, 4096)], Code.HANDOFF_BAD_REGION, "image offsets"),
    "guest addresses overlap": (
        [region(guest_phys_addr=0), region(BASE + MIB, MIB, MIB, guest_phys_addr=4096)],
        Code.HANDOFF_BAD_REGION,
        "guest physical addresses",
    ),
    "page size zero": ([region(page_size=0)], Code.HANDOFF_PAGE_SIZE, "region 0"),
    "page size in KiB": ([region(page_size=4)], Code.HANDOFF_PAGE_SIZE, "4 bytes"),
    "page size 64 KiB": ([region(page_size=65536)], Code.HANDOFF_PAGE_SIZE, "65536 bytes"),
}


@pytest.mark.parametrize("regions", GOOD.values(), ids=GOOD.keys())
def test_regions_that_can_be_true_pass(regions: list[MemoryRegion]) -> None:
    check_regions(regions, None)


@pytest.mark.parametrize(("regions", "code", "says"), BAD.values(), ids=BAD.keys())
def test_regions_that_cannot_be_true_are_refused_by_name(
    regions: list[MemoryRegion], code: Code, says: str
) -> None:
    with refused_with(code) as caught:
        check_regions(regions, None)
    assert caught.match(says)


def test_memory_may_fill_the_image_to_its_last_byte() -> None:
    check_regions([region(), region(BASE + MIB, MIB, MIB)], 2 * MIB)


def test_memory_that_the_image_does_not_have_is_refused() -> None:
    with refused_with(Code.HANDOFF_BEYOND_IMAGE) as caught:
        check_regions([region(), region(BASE + MIB, MIB, MIB)], 2 * MIB - 1)
    assert caught.match("region 1")
