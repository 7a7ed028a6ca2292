"""From status snapshots to Prometheus metric families.

Nothing here runs on the way of a fault: the counters are those the sessions keep anyway. Labels are
bounded: the manager forgets final migrations and limits the others; states and codes are enumerations.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from postcopyd import __version__
from postcopyd.errors import Code
from postcopyd.status import MigrationStatus, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric


# 2^27 µs are 134 s; what took longer is in +Inf.
MAX_BUCKETS = 27


class Snapshot(msgspec.Struct, frozen=True):
    """What one scrape reports."""

    migrations: Sequence[MigrationStatus]
    handoff_errors: Mapping[Code, int]


class SnapshotCollector:
    """A prometheus_client collector of one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from _daemon(self._snapshot)
        yield from _gauges(self._snapshot.migrations)
        yield from _counters(self._snapshot.migrations)
        yield _latency(self._snapshot.migrations)


def build_info() -> Metric:
    """What runs; of every process that is scraped."""
    info = GaugeMetricFamily("postcopyd_build_info", "Always 1.", labels=["version", "python"])
    info.add_metric([__version__, platform.python_version()], 1)
    return info


def _daemon(snapshot: Snapshot) -> Iterator[Metric]:
    yield build_info()
    by_state = GaugeMetricFamily("postcopyd_migrations", "Migrations by state.", labels=["state"])
    for state in State:
        by_state.add_metric([state], sum(status.state is state for status in snapshot.migrations))
    yield by_state
    errors = CounterMetricFamily(
        "postcopyd_handoff_errors", "Hand-offs refused, by error code.", labels=["code"]
    )
    for code, count in snapshot.handoff_errors.items():
        errors.add_metric([code], count)
    yield errors


def _gauges(migrations: Sequence[MigrationStatus]) -> Iterator[Metric]:
    pages = GaugeMetricFamily(
        "postcopyd_pages",
        "Pages: installed (in place or known to be zero), requested, missing; together all.",
        labels=["migration", "state"],
    )
    for status in migrations:
        requested = min(status.pages_requested, status.pages_total - status.pages_installed)
        pages.add_metric([status.id, "installed"], status.pages_installed)
        pages.add_metric([status.id, "requested"], requested)
        pages.add_metric([status.id, "missing"], status.pages_total - status.pages_installed - requested)
    yield pages
    for name, help_text, field, scale in (
        ("memory_bytes", "Guest memory.", "memory_bytes", 1.0),
        ("waiting_faults", "Faults that are not answered yet.", "waiting", 1.0),
        ("oldest_unanswered_fault_seconds", "Age of the oldest of them; 0: none.", "oldest_wait_us", 1e-6),
        ("memory_short", "1 while no memory or huge page is free to install pages.", "memory_short", 1.0),
    ):
        gauge = GaugeMetricFamily(f"postcopyd_{name}", help_text, labels=["migration"])
        for status in migrations:
            gauge.add_metric([status.id], getattr(status, field) * scale)
        yield gauge
    recovering = GaugeMetricFamily(
        "postcopyd_recovering",
        "1 while no page source answers; vCPUs that touch absent pages stand still.",
        labels=["migration"],
    )
    for status in migrations:
        recovering.add_metric([status.id], status.state is State.RECOVERING)
    yield recovering


def _counters(migrations: Sequence[MigrationStatus]) -> Iterator[Metric]:
    arrived = CounterMetricFamily(
        "postcopyd_pages_arrived",
        "Pages by how they came: demand, push, zero (no data was sent), removed (by the guest).",
        labels=["migration", "how"],
    )
    for status in migrations:
        arrived.add_metric([status.id, "demand"], status.pages_demand)
        arrived.add_metric([status.id, "push"], status.pages_pushed)
        arrived.add_metric([status.id, "zero"], status.pages_zero)
        arrived.add_metric([status.id, "removed"], status.pages_removed)
    yield arrived
    for name, help_text, field in (
        ("faults", "Faults read, vCPU exits included.", "faults"),
        ("bytes_received", "Page data received.", "bytes_received"),
        (
            "bad_replies",
            "Replies dropped: unasked, of wrong length, or with a wrong checksum.",
            "bad_replies",
        ),
        ("duplicate_faults", "Faults on pages that were asked for already.", "duplicates"),
        ("retries", "Page requests sent again.", "retries"),
        ("reconnects", "Connections to a page source made again.", "reconnects"),
    ):
        counter = CounterMetricFamily(f"postcopyd_{name}", help_text, labels=["migration"])
        for status in migrations:
            counter.add_metric([status.id], getattr(status, field))
        yield counter


def _latency(migrations: Sequence[MigrationStatus]) -> Metric:
    histogram = HistogramMetricFamily(
        "postcopyd_fault_latency_seconds", "From the reading of a fault to the wake.", labels=["migration"]
    )
    for status in migrations:
        sums = list(accumulate(status.latency_log2_us))
        # Bucket i holds [2^i, 2^(i+1)) µs.
        buckets = [(repr(2 ** (i + 1) / 1e6), float(sums[i])) for i in range(min(len(sums), MAX_BUCKETS))]
        buckets.append(("+Inf", float(sums[-1] if sums else 0)))
        histogram.add_metric([status.id], buckets, status.latency_sum_us / 1e6)
    return histogram
