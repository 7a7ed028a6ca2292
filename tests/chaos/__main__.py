"""`python -m chaos [--short] [--seed N]`; the last line of output is what happened, as JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from chaos.runner import LONG, SHORT, Chaos
from chaos.tally import LONG as LONG_GOAL
from chaos.tally import Goal


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos")
    parser.add_argument("--short", action="store_true", help="a few of each, two minutes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    plan = SHORT if options.short else LONG
    goal = Goal(plan.kills, plan.restarts, len(plan.cuts)) if options.short else LONG_GOAL
    with tempfile.TemporaryDirectory(prefix="postcopyd-chaos-") as folder:
        chaos = Chaos(plan, options.seed, Path(folder), lambda line: print(line, flush=True))
        tally = asyncio.run(chaos.run())
    print(tally.to_json(), flush=True)
    return 0 if tally.is_good(goal) else 1


if __name__ == "__main__":
    sys.exit(main())
