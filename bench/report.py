"""Puts a result into docs/performance.md and draws its pictures: `python bench/report.py [RESULT.json]`.

A measured part stands between `<!-- measured: NAME -->` and `<!-- end: NAME -->`; the rest of the page is prose.
Without an argument the newest full result is taken.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
_PART = re.compile(r"<!-- measured: (\S+) -->\n.*?<!-- end: \1 -->", re.DOTALL)

LABELS = {
    "floor": "floor: the same in C, no gRPC",
    "native": "native",
    "native_busy": "native, push at full rate",
    "native_tls": "native, mTLS",
    "grpcio": "grpcio",
    "local_c": "local C, no network",
}

Result = dict[str, Any]
Table = tuple[Any, ...]
"""Rows, a title, and the names of the columns."""


def tables(result: Result) -> Iterator[Table]:
    """Yield all tables, for the console and for the page."""
    yield _targets(result)
    yield _latency(result)
    yield _depth(result)
    yield _bulk(result)
    yield _growth(result)


def _targets(result: Result) -> Table:
    rows = [
        (t["name"], t["wanted"], f"{t['value']:g}", "met" if t["met"] else "missed")
        for t in result["targets"]
    ]
    return rows, "targets", "ratio", "wanted", "measured", ""


def _latency(result: Result) -> Table:
    names = ("floor", "native", "native_busy", "native_tls", "grpcio")
    rows = []
    for name in names:
        apart, together = result[f"{name}_us"], result["one_cpu_us"].get(name)
        rows.append(
            (
                LABELS[name],
                *(f"{apart[p]:.0f}" for p in ("p50", "p90", "p99")),
                *(f"{together[p]:.0f}" if together else "" for p in ("p50", "p99")),
            )
        )
    title = "fault to resumed, µs: the guest on a CPU of its own; all on one CPU"
    return rows, title, "", "p50", "p90", "p99", "one CPU: p50", "p99"


def _depth(result: Result) -> Table:
    by_threads = result["demand_pages_s_by_threads"]
    names = ("floor", "native", "native_tls", "grpcio", "local_c")
    rows = [(LABELS[name], *(f"{rates[name]:,}" for rates in by_threads.values())) for name in names]
    return rows, "demand, pages/s, by threads", "", *by_threads


def _bulk(result: Result) -> Table:
    kinds = ("bulk_mib_s", "bulk_half_mib_s", "bulk_zero_mib_s")
    rows = []
    for name in ("native", "native_tls", "grpcio", "local_c"):
        cpu = result["cpu_s_per_gib_by_side"].get(name)
        rss = result["rss_mib"].get(name)
        rows.append(
            (
                LABELS[name],
                *(f"{result[kind][name]:,}" if name in result[kind] else "" for kind in kinds),
                f"{cpu['daemon']:.2f} + {cpu['page_server']:.2f}" if cpu else "",
                f"{rss['daemon_peak']} + {rss['page_server_anonymous']}" if rss else "",
            )
        )
    title = f"bulk of {result['bulk_mib']} MiB, MiB/s; CPU and memory of daemon + page server"
    return rows, title, "", "random", "half zero", "all zero", "CPU s/GiB", "memory, MiB"


def _growth(result: Result) -> Table:
    growth = result["growth"]
    rows = [
        (f"{n} migrations at once", f"{rate:,} MiB/s in all")
        for n, rate in growth["mib_s_by_migrations"].items()
    ]
    rows.append(("fairness of 16, half-way (Jain)", f"{growth['jain_16']:.3f}"))
    rows += [
        (f"{gib} GiB, nearly all holes", f"{s * 1000:.0f} ms") for gib, s in growth["sparse_s_by_gib"].items()
    ]
    return rows, "growth", "", ""


def figures(result: Result) -> str:
    """All tables as Markdown."""
    m = result["machine"]
    parts = [
        f"Measured {result['at'][:10]}, {'quick' if result['quick'] else 'full'} run, medians of "
        f"{result['repetitions']}: {m['cpus']} CPUs ({m['architecture']}), Linux {m['kernel']}, Python {m['python']}."
    ]
    for rows, title, *header in tables(result):
        parts.append(f"**{title[0].upper()}{title[1:]}**\n")
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        parts[-1] += "\n" + "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
    return "\n\n".join(parts)


def render(page: str, result: Result) -> str:
    """Return `page` with its measured parts made anew. Raises KeyError: a part that nobody makes."""
    makers = {"figures": figures}
    return _PART.sub(
        lambda m: f"<!-- measured: {m[1]} -->\n{makers[m[1]](result)}\n<!-- end: {m[1]} -->", page
    )


def newest() -> Path | None:
    """The newest full result."""
    return max(RESULTS.glob("*-full.json"), default=None)


def publish(path: Path) -> str:
    """Write the page and the pictures; return what was done."""
    result: Result = json.loads(path.read_text())
    PAGE.write_text(render(PAGE.read_text(), result))
    try:
        import pictures
    except ImportError as error:
        return f"docs/performance.md written; no pictures: {error} (pip install '.[bench]')"
    pictures.draw_all(result, ROOT / "docs" / "img")
    return "docs/performance.md and its pictures written"


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    if path is None or not path.exists():
        print("no full result in bench/results: run make bench", file=sys.stderr)
        return 1
    print(publish(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
