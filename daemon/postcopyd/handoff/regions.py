"""Guest memory as a VMM describes it, and the checks it must pass before anything is done with it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, HandoffError
from ..units import GIB, HUGE_PAGE_SIZE, PAGE_SIZE, Gpa, Hva, Offset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_REGIONS = 4096
PAGE_SIZES = (PAGE_SIZE, HUGE_PAGE_SIZE, GIB)
U64_LIMIT = 1 << 64


class MemoryRegion(msgspec.Struct, frozen=True):
    """A run of guest memory in the VMM's address space, and where its content lies in the image. Bytes.

    Nothing is checked here: `check_regions` is where a VMM's numbers become trustworthy.
    """

    host_addr: Hva
    size_bytes: int
    image_offset: Offset
    page_size: int = PAGE_SIZE
    guest_phys_addr: Gpa | None = None

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes at {self.host_addr:#x}, image offset {self.image_offset:#x}"


def check_regions(regions: Sequence[MemoryRegion], image_size: int | None) -> None:
    """Check what a VMM says about its memory.

    Every region is a whole number of its pages; its addresses and its image offset are aligned to its page
    size, as a huge page is installed from one aligned run of the image. No two regions share an address, an
    image byte or a guest physical address.

    Args:
        regions: in any order; addresses and sizes below 2^64, as the parsers guarantee.
        image_size: length of the image in bytes, None as long as it is not known.
    Raises:
        HandoffError: HANDOFF_BAD_REGION, HANDOFF_PAGE_SIZE or HANDOFF_BEYOND_IMAGE; it names the region.
    """
    if not regions:
        raise HandoffError(Code.HANDOFF_BAD_REGION, "the VMM handed over no memory region at all")
    if len(regions) > MAX_REGIONS:
        raise HandoffError(
            Code.HANDOFF_BAD_REGION,
            f"the VMM handed over {len(regions)} regions; at most {MAX_REGIONS} make sense",
        )
    for index, region in enumerate(regions):
        _check_region(index, region)
    _check_overlap(regions, "host addresses", lambda region: region.host_addr)
    _check_overlap(regions, "image offsets", lambda region: region.image_offset)
    _check_overlap(regions, "guest physical addresses", lambda region: region.guest_phys_addr)
    if image_size is not None:
        _check_within_image(regions, image_size)


def _check_region(index: int, region: MemoryRegion) -> None:
    if region.page_size not in PAGE_SIZES:
        raise HandoffError(
            Code.HANDOFF_PAGE_SIZE,
            f"region {index} ({region}) has pages of {region.page_size} bytes, not 4 KiB, 2 MiB or 1 GiB",
        )
    if region.size_bytes == 0:
        raise _bad(index, region, "is empty")
    places = {"host address": region.host_addr, "image offset": region.image_offset}
    if region.guest_phys_addr is not None:
        places["guest physical address"] = region.guest_phys_addr
    for name, start in places.items():
        if start % region.page_size:
            raise _bad(index, region, f"has a {name} {start:#x} that is not a multiple of {region.page_size}")
        if start + region.size_bytes > U64_LIMIT:
            raise _bad(index, region, f"has a {name} {start:#x} from which it runs beyond 2^64")
    if region.size_bytes % region.page_size:
        raise _bad(index, region, f"has a size that is not a multiple of {region.page_size}")


def _check_overlap(
    regions: Sequence[MemoryRegion], what: str, start_of: Callable[[MemoryRegion], int | None]
) -> None:
    """Sort by start: then only neighbours can be the first pair that overlaps."""
    placed = sorted(
        (start, index) for index, region in enumerate(regions) if (start := start_of(region)) is not None
    )
    for (start, index), (next_start, next_index) in itertools.pairwise(placed):
        if start + regions[index].size_bytes > next_start:
            raise _bad(
                next_index, regions[next_index], f"overlaps region {index} ({regions[index]}) in {what}"
            )


def _check_within_image(regions: Sequence[MemoryRegion], image_size: int) -> None:
    for index, region in enumerate(regions):
        if region.image_offset + region.size_bytes > image_size:
            raise HandoffError(
                Code.HANDOFF_BEYOND_IMAGE,
                f"region {index} ({region}) reaches beyond the image, which has {image_size} bytes",
            )


def _bad(index: int, region: MemoryRegion, what: str) -> HandoffError:
    return HandoffError(Code.HANDOFF_BAD_REGION, f"region {index} ({region}) {what}")
