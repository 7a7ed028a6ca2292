"""Memory images whose pages tell where they belong: the faulter checks the same pattern."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Pattern:
    """Of every `period` pages the first `data` are random and begin with their index + 1; the rest is zero.

    holes: zeros are not written, so that the file is sparse.
    """

    period: int
    data: int
    holes: bool = False


DATA = Pattern(1, 1)
HALF = Pattern(32, 16)
ZERO = Pattern(1, 0)
# 64 KiB in 64 MiB: a large guest that has used little.
SPARSE = Pattern(16384, 16, holes=True)


def write_image(path: Path, size_bytes: int, pattern: Pattern) -> None:
    """Write an image. size_bytes: a multiple of MIB."""
    noise = bytearray(os.urandom(MIB))
    with path.open("wb") as file:
        file.truncate(size_bytes)
        if pattern.holes:
            for first in range(0, size_bytes // PAGE, pattern.period):
                file.seek(first * PAGE)
                file.write(_block(noise, first, pattern.data, pattern))
            return
        for first in range(0, size_bytes // PAGE, MIB // PAGE):
            file.write(_block(noise, first, MIB // PAGE, pattern))


def _block(noise: bytearray, first: int, pages: int, pattern: Pattern) -> bytes:
    block = bytearray(noise[: pages * PAGE])
    for page in range(pages):
        if (first + page) % pattern.period < pattern.data:
            struct.pack_into("<Q", block, page * PAGE, first + page + 1)
        else:
            block[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    return bytes(block)
