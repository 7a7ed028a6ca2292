"""Moves the same guests by QEMU's own post-copy and by postcopyd, on this host: `make demo-qemu`.

The last line of output is one JSON object: medians of down time, total time, faults, block time and mean wait for each
way, over pairs of both walkers without a limit, and `guest_consistent`. The medians of each series stand in it under
`series`. Exit status 0 if every guest found its memory right.

    python bench/qemu_demo.py [--quick] [--accel tcg|kvm] [--pairs N] [--memory SIZE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from postcopyd.demo.processes import Child, ReadySocket
from postcopyd.errors import PostcopyError
from postcopyd.qemu.guests.linux import make_linux
from postcopyd.qemu.guests.vm import QEMU as QEMU_PROGRAM
from postcopyd.qemu.guests.vm import Guest
from postcopyd.qemu.guests.walker import Order, Walker
from postcopyd.units import format_size, parse_size
from qemu_moves import POSTCOPYD, WAYS, Moved, Mover

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LINUX_FOLDER = Path(__file__).resolve().parents[1] / "build" / "qemu"
PACKAGES = ("qemu-system-x86", "binutils")
LIMIT = 10 * 1000 * 1000
"""Of the background stream where it is limited, bytes a second."""

KEYS = (
    "downtime_ms",
    "total_s",
    "faults",
    "blocktime_ms",
    "mean_wait_us",
    "lost_ms",
    "p99_wait_us",
    "cpu_s",
)
LAST_LINE_KEYS = KEYS[:5]
Moves = dict[str, list[Moved]]


def install() -> None:
    """Have QEMU installed, where that is possible. Raises SystemExit: it is not."""
    if shutil.which(QEMU_PROGRAM) and shutil.which("as"):
        return
    command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"no {QEMU_PROGRAM} here; run: sudo {' '.join(command)}")
    quiet = {"stdout": sys.stderr, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-q"], check=True, **quiet)  # type: ignore[call-overload]
    subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]


async def start_daemon(stack: AsyncExitStack, folder: Path) -> tuple[str, int]:
    """The daemon for all of postcopyd's moves: its control socket and its process."""
    ready = ReadySocket(folder)
    stack.callback(ready.close)
    state = folder / "state"
    env = {"NOTIFY_SOCKET": str(ready.path), "POSTCOPYD_HTTP": "", "POSTCOPYD_TRANSPORT": "native"}
    daemon = await Child.start("daemon", folder, "postcopyd", "run", "--state-dir", str(state), env=env)
    stack.push_async_callback(daemon.end)
    await ready.wait_ready(daemon)
    return str(state / "control.sock"), daemon.process.pid


@dataclass(frozen=True)
class Series:
    """A guest that is moved every way, `count` times in turn, so that the host's moods touch all ways alike."""

    title: str
    guest: Guest
    count: int
    push_rate: int = 0

    async def run(self, mover: Mover, say: Callable[[str], None]) -> Moves:
        """Raises PostcopyError: it could not be moved."""
        moves: Moves = {way: [] for way in WAYS}
        for number in range(self.count):
            for way in WAYS:
                moved = await mover.move(self.guest, way, self.push_rate)
                moves[way].append(moved)
                say(
                    f"{self.title}, {number + 1}/{self.count} {way}: {moved.total_s:.2f} s, {moved.faults} faults"
                )
        return moves


def medians(moved: Sequence[Moved], keys: Sequence[str] = KEYS) -> dict[str, float | None]:
    """The median of each key; None where it is not counted."""
    found: dict[str, float | None] = {}
    for key in keys:
        values = [value for move in moved if (value := getattr(move, key)) is not None]
        found[key] = round(statistics.median(values), 4) if values else None
    return found


def show(title: str, moves: Moves) -> None:
    table = Table("", *WAYS, "postcopyd / qemu", title=title, title_justify="left", box=None)
    every = {way: medians(moved) for way, moved in moves.items() if moved}
    for key in KEYS:
        ours, theirs = every[POSTCOPYD][key], every[WAYS[0]][key]
        ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else ""
        table.add_row(key, *("" if every[w][key] is None else f"{every[w][key]:.5g}" for w in WAYS), ratio)
    Console(highlight=False, width=100 if not sys.stdout.isatty() else None).print(table, "")


def series(options: argparse.Namespace) -> dict[str, Series]:
    """What is measured, by its key in the result. Raises ConfigError: the Linux guest cannot be had."""
    size = parse_size(options.memory)
    made = {
        order.value: Series(f"{order} walker over {format_size(size)}", Walker(size, order), options.pairs)
        for order in Order
    }
    small = size // 4
    made["limited"] = Series(
        f"random walker over {format_size(small)}, background stream limited to 10 MB/s",
        Walker(small, Order.RANDOM),
        1,
        LIMIT,
    )
    if not options.no_linux:
        made["linux"] = Series("Linux that hashes its memory", make_linux(LINUX_FOLDER), 1)
    return made


async def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises PostcopyError: a guest could not be moved."""
    wanted = series(options)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pc-qemu-", dir="/dev/shm")))
        mover = Mover(folder, *await start_daemon(stack, folder), accel=options.accel)
        done = {key: await one.run(mover, say) for key, one in wanted.items()}
    for key, moves in done.items():
        show(f"{wanted[key].title}; medians of {wanted[key].count}", moves)
    unlimited = {way: [move for order in Order for move in done[order.value][way]] for way in WAYS}
    moved = [move for moves in done.values() for way in moves.values() for move in way]
    return {
        **{way: medians(unlimited[way], LAST_LINE_KEYS) for way in WAYS},
        "guest_consistent": all(move.wrong_pages == 0 for move in moved),
        "series": {key: {way: medians(moves[way]) for way in WAYS} for key, moves in done.items()},
    }


def main() -> int:
    """Exit status 0: every guest was moved every way and found its memory right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one pair over 64 MiB, no Linux")
    parser.add_argument(
        "--no-linux", action="store_true", help="without the Linux guest, which takes a minute"
    )
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", default="256M", help="what the guests walk over, a power of two")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.memory, options.no_linux = 1, "64M", True
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    install()
    try:
        result = asyncio.run(measure(options, say))
    except PostcopyError as error:
        print(f"demo-qemu: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0 if result["guest_consistent"] else 1


if __name__ == "__main__":
    sys.exit(main())
