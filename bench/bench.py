"""Measures postcopyd next to a floor in C and next to grpcio, all in one run: `make bench`, `make bench-quick`.

Real processes on loopback: a page server, a daemon and a guest for each variant. Absolute figures are the machine's
and drift with its neighbours; the ratios within a run are what counts. What is measured how: docs/performance.md.
The last line of output is one JSON object; bench/results keeps it with the data of the pictures.

    python bench/bench.py [--quick] [--no-publish]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import report
from postcopyd.errors import PostcopyError
from programs import ROOT, BenchError, build, pool
from results import Result, collect, for_last_line
from rig import VARIANTS, Rig, image_folder
from scenarios import FULL, QUICK, Measured, Plan, Scenarios, make_images

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = ROOT / "bench" / "results"


async def measure(plan: Plan, say: Callable[[str], None]) -> Measured:
    """Raises BenchError, PostcopyError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(image_folder()))
        images = await asyncio.to_thread(make_images, folder, plan)
        say("images written")
        await stack.enter_async_context(pool(plan.pool_mib))
        say("memory warmed")
        rig = await Rig(images, folder, stack).start(VARIANTS)
        say("processes ready")
        return await Scenarios(rig, plan, say).run()


def show(result: Result) -> None:
    """Print the figures and the targets for people."""
    console = Console(highlight=False, width=100 if not sys.stdout.isatty() else None)
    for rows, title, *header in report.tables(result):
        table = Table(*header, title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


def save(result: Result) -> Path:
    RESULTS.mkdir(exist_ok=True)
    kind = "quick" if result["quick"] else "full"
    path = RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main() -> int:
    """Exit status 0 also where targets are missed: they are judged by who reads; 1: not measured, or a wrong page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="at most 90 s: fewer repetitions, smaller sizes")
    parser.add_argument("--no-publish", action="store_true", help="leave docs/ as it is after a full run")
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    plan = QUICK if options.quick else FULL
    try:
        for name in ("floor", "local", "remote", "faulter"):
            build(name)
        measured = asyncio.run(measure(plan, say))
    except (BenchError, PostcopyError, TimeoutError) as error:
        print(f"bench: error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    result = collect(measured, plan, quick=options.quick, took_s=time.monotonic() - began)
    path = save(result)
    show(result)
    say(f"kept in {os.path.relpath(path)}")
    if not options.quick and not options.no_publish:
        say(report.publish(path))
    print(json.dumps(for_last_line(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
