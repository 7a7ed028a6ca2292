"""The boot-sector guest: made with the host's assembler when it is wanted. What it does, walker.S says."""

from __future__ import annotations

import shutil
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import msgspec

from ...errors import Code, ConfigError
from ...units import PAGE_SIZE

SOURCE = Path(__file__).with_name("walker.S")
LOADED_AT = 0x7C00
FIRST_PAGE = 1 << 20
"""The walk begins above the BIOS's memory."""


class Order(StrEnum):
    SEQUENTIAL = "sequential"
    RANDOM = "random"


class Walker(msgspec.Struct, frozen=True):
    """walked_bytes: a power of two. Every 'B' on the serial port is a round without, every 'E' a page with an error."""

    walked_bytes: int
    order: Order = Order.SEQUENTIAL

    says_round: ClassVar[bytes] = b"B"
    says_wrong: ClassVar[bytes] = b"E"

    @property
    def memory_bytes(self) -> int:
        """What QEMU must give it: the walk, and as much again, of which only the BIOS's part is touched."""
        return 2 * self.walked_bytes

    def arguments(self, folder: Path) -> list[str]:
        """QEMU's arguments for this guest; it is assembled in `folder`. Raises ConfigError."""
        disk = f"file={self.build(folder)},format=raw,if=floppy,read-only=on"
        return ["-drive", disk]

    def build(self, folder: Path) -> Path:
        """Assemble it; return the image of its disk.

        Raises:
            ConfigError: no assembler here, or a size that is no power of two.
        """
        pages = self.walked_bytes // PAGE_SIZE
        if pages < 4 or pages & (pages - 1) or self.walked_bytes % PAGE_SIZE:
            raise ConfigError(
                Code.ARGUMENT_INVALID, f"a walk of {self.walked_bytes} bytes is no power of two"
            )
        stride, step = (1, 1) if self.order is Order.SEQUENTIAL else (5 * 4 * 3001 + 1, 40503)
        image, made = folder / "walker.img", folder / "walker.o"
        symbols = {"PAGES": pages, "STRIDE": stride, "STEP": step}
        _run("as", "--32", *(f"--defsym={n}={v}" for n, v in symbols.items()), "-o", str(made), str(SOURCE))
        _run("ld", "-melf_i386", f"-Ttext={LOADED_AT:#x}", "--oformat=binary", "-o", str(image), str(made))
        return image


def _run(program: str, *arguments: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"the guest cannot be built: no {program} here; install binutils"
        )
    subprocess.run([program, *arguments], check=True)
