"""The pictures of docs/performance.md, drawn from one result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from report import LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

Result = dict[str, Any]
SIZE_INCHES = (7.0, 3.6)
# So that the same result gives the same bytes, and text stays text.
STABLE = {"svg.hashsalt": "postcopyd", "svg.fonttype": "none"}


def draw_all(result: Result, folder: Path) -> None:
    """Write latency.svg, depth.svg and residency.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("latency", _latency), ("depth", _depth), ("residency", _residency)):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, result)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)
        with mpl.rc_context(STABLE):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _latency(axes: Axes, result: Result) -> None:
    for name, values in result["cdf_us"].items():
        axes.plot(values, [i / (len(values) - 1) for i in range(len(values))], label=LABELS[name])
    axes.axvline(result["floor_us"]["p50"], color="grey", linestyle=":", label="floor, p50")
    axes.set(xscale="log", xlabel="fault to resumed, µs", ylabel="share of faults", ylim=(0, 1))


def _depth(axes: Axes, result: Result) -> None:
    by_threads = result["demand_pages_s_by_threads"]
    for name in ("local_c", "floor", "native", "native_tls", "grpcio"):
        axes.plot(
            list(by_threads), [rates[name] for rates in by_threads.values()], marker="o", label=LABELS[name]
        )
    axes.set(yscale="log", xlabel="threads that fault", ylabel="pages/s")


def _residency(axes: Axes, result: Result) -> None:
    seconds, shares = zip(*result["timeline"], strict=True)
    axes.plot(
        [s * 1000 for s in seconds], [share * 100 for share in shares], label="native, one thread touching"
    )
    axes.set(xlabel="since the push began, ms", ylabel="pages in place, %", ylim=(0, 101))
