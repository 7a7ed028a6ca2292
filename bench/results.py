"""What a run says: medians by name, and whether each target was met."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rig import VARIANTS
from scenarios import BULK_IMAGES, MIGRATIONS, PLACEMENTS, SPARSE_GIB, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scenarios import Measured, Plan

Result = dict[str, Any]
"""JSON. The keys stay: whoever compares runs reads them."""

PICTURE_KEYS = ("cdf_us", "timeline")


@dataclass(frozen=True)
class Target:
    """A ratio or a figure that is promised. bound: the most, or with `at_least` the least."""

    name: str
    bound: float
    of: Callable[[Result], float]
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


def _pages(name: str) -> Callable[[Result], float]:
    return lambda r: _ratio(r["demand_pages_s"]["native"], r["demand_pages_s"][name])


def _bulk(name: str) -> Callable[[Result], float]:
    return lambda r: _ratio(r["bulk_mib_s"]["native"], r["bulk_mib_s"][name])


def _ratio(value: float, base: float) -> float:
    return float(value / base) if base else float("inf")


TARGETS = (
    Target("p50: native / grpcio", 0.45, lambda r: _ratio(r["native_us"]["p50"], r["grpcio_us"]["p50"])),
    Target("p50: native / floor", 2.0, lambda r: _ratio(r["native_us"]["p50"], r["floor_us"]["p50"])),
    Target("p99: push busy / idle", 4.0, lambda r: _ratio(r["native_busy_us"]["p99"], r["native_us"]["p99"])),
    Target("p50: mTLS / plain", 1.5, lambda r: _ratio(r["native_tls_us"]["p50"], r["native_us"]["p50"])),
    Target("pages/s, 32 threads: native / grpcio", 15, _pages("grpcio"), at_least=True),
    Target("pages/s, 32 threads: native / local C", 0.4, _pages("local_c"), at_least=True),
    Target("bulk: native / grpcio", 2.5, _bulk("grpcio"), at_least=True),
    Target("bulk: native / local C", 0.35, _bulk("local_c"), at_least=True),
    Target("bulk: plain / mTLS", 2.0, _bulk("native_tls")),
    Target(
        "bulk: zeros / data",
        3.0,
        lambda r: _ratio(r["bulk_zero_mib_s"]["native"], r["bulk_mib_s"]["native"]),
        at_least=True,
    ),
    Target("CPU seconds a GiB, both sides", 1.6, lambda r: float(r["cpu_s_per_gib"])),
    Target("fairness of 16 (Jain)", 0.95, lambda r: float(r["growth"]["jain_16"]), at_least=True),
)


def collect(measured: Measured, plan: Plan, *, quick: bool, took_s: float) -> Result:
    """Return the medians by their public names."""
    m = measured
    result: Result = {
        "quick": quick,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "took_s": round(took_s, 1),
        "repetitions": plan.repetitions,
        "bulk_mib": plan.bulk_mib,
        "machine": machine(),
        **{f"{name}_us": m.median_us(f"{name}.apart") for name in ("floor", *VARIANTS)},
        "native_busy_us": m.median_us("native_busy"),
        "one_cpu_us": {name: m.median_us(f"{name}.together") for name in ("floor", *VARIANTS)},
        "floor_parts_us": {
            name: {placement: m.median_us(f"floor_{name}.{placement}") for placement in PLACEMENTS}
            for name in ("round_trip", "local_fault")
        },
        "busy_faults": m.median("busy_faults"),
        "demand_pages_s": _rates(m, 32),
        "demand_pages_s_by_threads": {str(threads): _rates(m, threads) for threads in THREADS},
    }
    for image in BULK_IMAGES:
        key = "bulk_mib_s" if image == "data" else f"bulk_{image}_mib_s"
        result[key] = {name: round(m.median(f"bulk.{image}.{name}")) for name in VARIANTS}
    result["bulk_mib_s"]["local_c"] = round(m.median("bulk.data.local_c"))
    sides = ("daemon", "page_server")
    cpu = {v: {side: round(m.median(f"cpu.{side}.{v}"), 2) for side in sides} for v in VARIANTS}
    result["cpu_s_per_gib"] = round(sum(cpu["native"].values()), 2)
    result["cpu_s_per_gib_by_side"] = cpu
    result["rss_mib"] = {
        v: {
            f"{side}_{what}": round(m.median(f"{what}.{side}.{v}"))
            for side in sides
            for what in ("rss", "peak", "anonymous")
        }
        for v in VARIANTS
    }
    result["growth"] = {
        "mib_s_by_migrations": {str(n): round(m.median(f"growth.{n}")) for n in MIGRATIONS},
        "jain_16": round(m.median("jain"), 3),
        "sparse_s_by_gib": {str(gib): round(m.median(f"sparse.{gib}"), 3) for gib in SPARSE_GIB},
    }
    result["targets"] = judge(result)
    result["cdf_us"] = m.cdf_us
    result["timeline"] = m.timeline
    return result


def _rates(m: Measured, threads: int) -> dict[str, int]:
    return {name: round(m.median(f"pages_s.{threads}.{name}")) for name in (*VARIANTS, "floor", "local_c")}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what it came to."""
    judged = []
    for target in TARGETS:
        value = target.of(dict(result))
        judged.append(
            {
                "name": target.name,
                "wanted": target.wanted,
                "value": round(value, 3),
                "met": target.is_met(value),
            }
        )
    return judged


def machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def for_last_line(result: Result) -> Result:
    """Without what only the pictures need."""
    return {key: value for key, value in result.items() if key not in PICTURE_KEYS}
