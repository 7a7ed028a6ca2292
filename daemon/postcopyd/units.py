"""The field's integers, and sizes as people write them."""

from __future__ import annotations

import re
from typing import NewType

from .errors import Code, ConfigError

Hva = NewType("Hva", int)
"""Host virtual address in the VMM's address space."""

Gpa = NewType("Gpa", int)
"""Guest physical address."""

Offset = NewType("Offset", int)
"""Byte offset in an image."""

VcpuId = NewType("VcpuId", int)

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 * MIB

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `256M`, `1GiB` or `4096` means; powers of two, whole numbers.

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(Code.ARGUMENT_INVALID, f"{text!r} is not a size; write 4096, 64K, 256M, 2G")
    return int(match[1]) * _FACTORS[match[2].upper()]


def format_size(len_bytes: float) -> str:
    """Return `len_bytes` for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(len_bytes) < 1024:
            return f"{len_bytes:.0f} {unit}" if unit == "B" else f"{len_bytes:.1f} {unit}"
        len_bytes /= 1024
    return f"{len_bytes:.1f} TiB"
