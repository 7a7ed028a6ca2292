"""Which CPU runs what while a latency is measured.

Left to the scheduler, guest, daemon and page server sometimes share one CPU and sometimes do not, for a whole run.
Waking an idle CPU costs several times what everything else together costs, so a figure would tell where processes
happened to be. Here both are measured by name. With one CPU there is one placement.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Placement = Literal["apart", "together", "between"]
"""Of guest, daemon and page server: the guest has a CPU for itself; all share one; the daemon has one for itself, and
the guest goes before the page server on the other, as if it had a third."""

CPUS = frozenset(os.sched_getaffinity(0))
GUEST_CPU = min(CPUS)
HOST_CPU = max(CPUS)


def server_cpu(placement: Placement) -> int:
    return HOST_CPU if placement == "apart" else GUEST_CPU


@contextlib.contextmanager
def placed(placement: Placement, guest: int, daemon: int, server: int) -> Iterator[None]:
    """Keep these processes in their places until the end."""
    _place(guest, {GUEST_CPU}, first=placement == "between")
    _place(daemon, {GUEST_CPU if placement == "together" else HOST_CPU})
    _place(server, {server_cpu(placement)})
    try:
        yield
    finally:
        for pid in (guest, daemon, server):
            _place(pid, set(CPUS))


def _place(pid: int, cpus: set[int], *, first: bool = False) -> None:
    """first: before everybody else there."""
    policy, priority = (os.SCHED_FIFO, 1) if first else (os.SCHED_OTHER, 0)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))
