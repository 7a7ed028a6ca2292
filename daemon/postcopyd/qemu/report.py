"""What a migration of a QEMU cost its guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..status import MigrationStatus
    from .plan import Plan


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Of all RAM files together.

    downtime_ms: from the source's last instruction to the destination's first, 0 if the guest was paused. total_s: from
    QEMU's `migrate` to the last page. blocktime_ms: of all vCPUs; other_blocktime_ms: of QEMU's other threads.
    """

    migrations: list[str]
    memory_bytes: int
    downtime_ms: float
    total_s: float
    faults: int
    blocktime_ms: float
    other_blocktime_ms: float
    mean_wait_us: float
    p99_wait_us: float
    pages_total: int
    pages_demand: int
    pages_pushed: int
    pages_zero: int
    reconnects: int


def make_report(
    plan: Plan,
    statuses: Sequence[MigrationStatus],
    *,
    stopped_at: float | None,
    resumed_at: float | None,
    began_at: float,
    connected_at: Mapping[str, float],
) -> Report:
    """Add up. Times are of time.monotonic; when a migration ended, the daemon says."""
    threads = [thread for status in statuses for thread in status.blocktime]
    vcpus = [thread for thread in threads if thread.tid in plan.vcpu_tids]
    waits = sum(thread.faults for thread in threads)
    blocked_us = sum(thread.blocktime_us for thread in threads)
    vcpu_us = sum(thread.blocktime_us for thread in vcpus)
    ends = [connected_at[status.id] + status.elapsed_s for status in statuses]
    paused = stopped_at is None or resumed_at is None
    return Report(
        migrations=[status.id for status in statuses],
        memory_bytes=plan.memory_bytes,
        downtime_ms=0.0 if paused else round(((resumed_at or 0.0) - (stopped_at or 0.0)) * 1000, 1),
        total_s=round(max(ends) - began_at, 3),
        faults=sum(status.faults for status in statuses),
        blocktime_ms=round(vcpu_us / 1000, 1),
        other_blocktime_ms=round((blocked_us - vcpu_us) / 1000, 1),
        mean_wait_us=round(blocked_us / waits, 1) if waits else 0.0,
        p99_wait_us=max(status.fault_latency_us.p99 for status in statuses),
        pages_total=sum(status.pages_total for status in statuses),
        pages_demand=sum(status.pages_demand for status in statuses),
        pages_pushed=sum(status.pages_pushed for status in statuses),
        pages_zero=sum(status.pages_zero for status in statuses),
        reconnects=sum(status.reconnects for status in statuses),
    )
