"""Measures how absent pages of vCPUs are reported: as messages of one userfaultfd, or as exits. `make bench-exits`.

Real KVM guests that touch one page after the other. `local`: one thread of the same process answers from its own
memory, so that the delivery is what is measured; `network`: a page server and a daemon over loopback, the push held.
Both ways take turns, the order changing; every figure is the median of the rounds, every ratio that of the rounds'
ratios. The last line of output is one JSON object. What it shows: docs/performance.md, "Exits against messages".

    python bench/exits.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table

from images import DATA, write_image
from postcopyd.demo.processes import Child
from postcopyd.errors import PostcopyError
from postcopyd.status import State
from programs import BUILD, CFLAGS, ROOT, SOURCES, BenchError, Percentiles
from rig import IDLE, Rig, Variant, image_folder, pages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

VCPUS = (1, 2, 4, 8, 16, 32, 64)
RUN_TIMEOUT_S = 120.0
IMAGE = "exits"
IMAGE_MIB = 16
GUEST = "guest"
GUEST_SHAPE = ("--memory", "16M", "--vcpus", "4", "--order", "random")
PAUSES = 9


class Plan(msgspec.Struct, frozen=True):
    """pages: of a round, with pages of their own for the vCPUs.

    overlapping: touches of a round in which every vCPU touches every page.
    """

    rounds: int
    local_pages: int
    network_pages: int
    overlapping: int

    def pages(self, most: int, vcpus: int, overlap: bool) -> int:
        return min(most, max(self.overlapping // vcpus, 64)) if overlap else most


FULL = Plan(rounds=5, local_pages=4096, network_pages=2048, overlapping=16384)
QUICK = Plan(rounds=3, local_pages=512, network_pages=256, overlapping=2048)


class Round(msgspec.Struct, frozen=True):
    """cpu_us: of the guest's process (and whoever answers inside it), a page. us: of a touch."""

    pages_s: float
    cpu_us: float
    exits: int
    us: Percentiles


class Rounds(msgspec.Struct, frozen=True):
    """The same round by messages and by exits. exit_us: processor time of one exit for nothing.

    ring: by exits that are answered over the exit ring, where `exits` are those that vCPUs answer from the image.
    """

    uffd: list[Round]
    exits: list[Round]
    ring: list[Round] = []
    exit_us: float = 0.0

    def figures(self) -> dict[str, float]:
        """Medians. ratio: exits to messages."""
        figures = {
            "uffd_pages_s": _median(r.pages_s for r in self.uffd),
            "exits_pages_s": _median(r.pages_s for r in self.exits),
            "ratio": _ratio(self.exits, self.uffd),
            "uffd_p50_us": _median(r.us.p50 for r in self.uffd),
            "exits_p50_us": _median(r.us.p50 for r in self.exits),
            "uffd_p99_us": _median(r.us.p99 for r in self.uffd),
            "exits_p99_us": _median(r.us.p99 for r in self.exits),
            "uffd_cpu_us": _median(r.cpu_us for r in self.uffd),
            "exits_cpu_us": _median(r.cpu_us for r in self.exits),
        }
        if self.ring:
            figures["exit_us"] = self.exit_us
            figures["ring_pages_s"] = _median(r.pages_s for r in self.ring)
            figures["ring_cpu_us"] = _median(r.cpu_us for r in self.ring)
            figures["ring_ratio"] = _ratio(self.ring, self.uffd)
        return {name: round(value, 3 if name.endswith("ratio") else 1) for name, value in figures.items()}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _ratio(rounds: Sequence[Round], base: Sequence[Round]) -> float:
    return _median(r.pages_s / b.pages_s for r, b in zip(rounds, base, strict=True))


def compile_program(name: str) -> Path:
    """Return the guest program `name`, compiled with libpostcopy. Raises BenchError: the compiler refused."""
    native, library = ROOT / "daemon" / "native", ROOT / "daemon" / "libpostcopy"
    sources = [
        SOURCES / f"{name}.c",
        SOURCES / "exits_vm.c",
        *(native / part for part in ("exit_ring.c", "exit_ring_map.c", "exit_ring_vmm.c")),
        # The preload shim is a program's whole VMM side, not part of the library.
        *(path for path in sorted(library.glob("*.c")) if not path.name.startswith("preload")),
    ]
    program = BUILD / name
    inputs = [*sources, *SOURCES.glob("*.h"), *native.glob("exit_ring*.h"), *library.glob("*.h")]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return program
    BUILD.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        "gcc",
        *CFLAGS,
        f"-I{native}",
        f"-I{library}",
        "-o",
        program,
        *sources,
        "-lcapstone",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{name} does not compile:\n{done.stderr}")
    return program


async def _run(program: Path, *arguments: object) -> bytes:
    process = await asyncio.create_subprocess_exec(
        str(program), *map(str, arguments), stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise BenchError(f"{program.name} {arguments} did not end within {RUN_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        why = err.decode(errors="replace").strip() or f"it ended with {process.returncode}"
        raise BenchError(f"{program.name} {arguments}: {why}")
    return out


def _kind(overlap: bool) -> str:
    return "overlap" if overlap else "own"


async def measure_local(plan: Plan, vcpus: int, overlap: bool) -> Rounds:
    program = await asyncio.to_thread(compile_program, "exits_local")
    pages = plan.pages(plan.local_pages, vcpus, overlap)
    return msgspec.json.decode(await _run(program, vcpus, pages, plan.rounds, _kind(overlap)), type=Rounds)


async def _remote_round(variant: Variant, faults: str, vcpus: int, pages: int, overlap: bool) -> Round:
    program = await asyncio.to_thread(compile_program, "exits_remote")
    path = await variant.prepare(IMAGE, IDLE)
    answer = await _run(program, faults, vcpus, pages, _kind(overlap), path)
    # Complete, or its guest is gone: the next round may begin.
    await variant.until(IMAGE, lambda status: status.state.is_final, 0.01)
    return msgspec.json.decode(answer, type=Round)


async def measure_network(plan: Plan, variant: Variant, vcpus: int, overlap: bool) -> Rounds:
    pages = plan.pages(plan.network_pages, vcpus, overlap)
    found: dict[str, list[Round]] = {"uffd": [], "exits": []}
    for number in range(plan.rounds):
        order: Sequence[str] = ("uffd", "exits") if number % 2 == 0 else ("exits", "uffd")
        for faults in order:
            found[faults].append(await _remote_round(variant, faults, vcpus, pages, overlap))
    return Rounds(found["uffd"], found["exits"])


async def _make_guest(folder: Path) -> tuple[Path, Path]:
    """Run a guest for a while; return the files of its memory and of its registers."""
    ram, registers = folder / GUEST, folder / "registers.json"
    vmm = await Child.start("source", folder, "postcopyd.vmm", "source", *GUEST_SHAPE, "--ram", str(ram))
    try:
        await vmm.line()
        await vmm.command("start")
        await vmm.command("wait", steps=500, timeout_s=RUN_TIMEOUT_S)
        await vmm.command("pause")
        await vmm.command("save", path=str(registers))
    finally:
        await vmm.end()
    return ram, registers


async def measure_pause(variant: Variant, folder: Path, registers: Path) -> dict[str, float]:
    """How long a guest takes to pause whose vCPUs all wait for pages of a source that stands still, milliseconds."""
    path = await variant.prepare(GUEST, IDLE)
    vmm = await Child.start(
        *("destination", folder, "postcopyd.vmm", "destination", *GUEST_SHAPE),
        *("--faults", "exits", "--socket", path),
    )
    took_ms = []
    try:
        await vmm.line()
        await vmm.command("load", path=str(registers))
        await variant.until_state(GUEST, State.RUNNING, 0.01)
        with variant.source_stopped():
            await vmm.command("start")
            # Every vCPU, and the device.
            await variant.until(GUEST, lambda status: status.exits >= 4 and status.waiting >= 5, 0.01)
            for _ in range(PAUSES):
                # Back to sleep, all of them.
                await asyncio.sleep(0.02)
                began = time.monotonic()
                await vmm.command("pause")
                took_ms.append((time.monotonic() - began) * 1000)
                await vmm.command("start")
    finally:
        await vmm.end()
    return {"median_ms": round(_median(took_ms), 1), "max_ms": round(max(took_ms), 1)}


class Result(msgspec.Struct, frozen=True):
    """Figures by number of vCPUs, for each scenario; pause: of a guest whose source stands still."""

    vcpus: dict[str, dict[str, float]]
    overlap: dict[str, dict[str, float]]
    network: dict[str, dict[str, float]]
    network_overlap: dict[str, dict[str, float]]
    pause: dict[str, float]


async def measure(plan: Plan, say: Callable[[str], None]) -> Result:
    """Raises BenchError, PostcopyError."""
    assert plan.network_pages <= pages_of(IMAGE_MIB)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, overlap in (("vcpus", False), ("overlap", True)):
        found[name] = {str(n): (await measure_local(plan, n, overlap)).figures() for n in VCPUS}
        say(f"{name}: done")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(image_folder()))
        image = folder / IMAGE
        await asyncio.to_thread(write_image, image, IMAGE_MIB << 20, DATA)
        ram, registers = await _make_guest(folder)
        rig = await Rig({IMAGE: (image, DATA), GUEST: (ram, DATA)}, folder, stack).start(["native"])
        variant = rig.variants["native"]
        pause = await measure_pause(variant, folder, registers)
        for name, overlap in (("network", False), ("network_overlap", True)):
            found[name] = {
                str(n): (await measure_network(plan, variant, n, overlap)).figures() for n in VCPUS
            }
            say(f"{name}: done")
    return Result(**found, pause=pause)


TITLES = {
    "vcpus": "Content at hand, every vCPU its own pages",
    "overlap": "Content at hand, all vCPUs the same pages",
    "network": "Over the network, every vCPU its own pages",
    "network_overlap": "Over the network, all vCPUs the same pages",
}


def show(result: Result) -> None:
    """Print a table for each scenario. CPU is that of the guest's process, and locally of who answers too."""
    console = Console(highlight=False, width=110 if not sys.stdout.isatty() else None)
    header = (
        "vCPUs",
        "messages/s",
        "exits/s",
        "ratio",
        "p50 µs",
        "exits",
        "CPU µs a page",
        "exits",
        "an exit",
        "by ring/s",
        "ratio",
    )
    for name, title in TITLES.items():
        table = Table(title=title, title_justify="left", box=None)
        for column in header:
            table.add_column(column, justify="right")
        for vcpus, f in getattr(result, name).items():
            table.add_row(
                vcpus,
                f"{f['uffd_pages_s']:.0f}",
                f"{f['exits_pages_s']:.0f}",
                f"{f['ratio']:.2f}",
                f"{f['uffd_p50_us']:.0f}",
                f"{f['exits_p50_us']:.0f}",
                f"{f['uffd_cpu_us']:.0f}",
                f"{f['exits_cpu_us']:.0f}",
                *(
                    [f"{f['exit_us']:.0f}", f"{f['ring_pages_s']:.0f}", f"{f['ring_ratio']:.2f}"]
                    if "exit_us" in f
                    else []
                ),
            )
        console.print(table, "")
    pause = result.pause
    console.print(
        f"Pause of a guest that waits for a source that stands still: {pause['median_ms']} ms,", end=" "
    )
    console.print(f"at most {pause['max_ms']} ms\n")


def main() -> int:
    """Exit status 0 also where exits are slower: that is judged by who reads; 1: not measured, or a wrong page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="at most 60 s: three rounds, fewer pages")
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        result = asyncio.run(measure(QUICK if options.quick else FULL, say))
    except (BenchError, PostcopyError, TimeoutError) as error:
        print(f"bench-exits: error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    show(result)
    print(json.dumps({"quick": options.quick, **msgspec.to_builtins(result)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
