"""Memory that is a guest_memfd with a userfault bitmap: daemon/native/edge_guest_memfd.h."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ._native.core import CData, ffi, lib
from .errors import Code, HandoffError
from .pager import region_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handoff.regions import MemoryRegion
    from .pager import Pager

_REASONS = {
    errno.ERANGE: "the bitmap has fewer bits than the memory has pages",
    errno.EPERM: "the bitmap is not sealed against shrinking, and cannot be",
}


class GuestMemfd:
    """How pages get into guest_memfd. All descriptors stay the caller's and must outlive it, as it must the pager.

    Args:
        file: the guest_memfd. bitmap: one bit for each 4 KiB of memory offset; set: a vCPU's access exits.
        regions: checked; pages of 4 KiB.
    Raises:
        HandoffError: EXIT_SOCKET_BROKEN: file or bitmap do not fit the regions.
    """

    edge: CData = lib.guest_memfd_edge()

    def __init__(self, uffd: int, file: int, bitmap: int, regions: Sequence[MemoryRegion]) -> None:
        _check_size(file, regions)
        error = ffi.new("int *")
        table = region_table(regions)
        self._memory = lib.guest_memfd_open(uffd, file, bitmap, table, len(regions), error)
        if self._memory == ffi.NULL:
            reason = _REASONS.get(error[0], os.strerror(error[0]))
            raise HandoffError(Code.EXIT_SOCKET_BROKEN, f"the VMM's guest_memfd cannot be served: {reason}")

    def arm(self, pager: Pager) -> None:
        """The VMM has filled its bitmap: bits may be cleared from now on, and those of pages that are here are."""
        pager.arm(self._memory)

    def close(self) -> None:
        """Forget it, after the pager; idempotent."""
        if self._memory is not None:
            lib.guest_memfd_close(self._memory)
        self._memory = None


def _check_size(file: int, regions: Sequence[MemoryRegion]) -> None:
    """Raises HandoffError: an ordinary memfd would grow where a page is written behind its end."""
    size = os.fstat(file).st_size
    end = max(region.image_offset + region.size_bytes for region in regions)
    if end > size:
        raise HandoffError(
            Code.HANDOFF_BAD_REGION, f"the regions reach to offset {end:#x} of a guest_memfd of {size} bytes"
        )
