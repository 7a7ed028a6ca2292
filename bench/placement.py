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

Placement = Literal["apart", "together"]
CPUS = frozenset(os.sched_getaffinity(0))
GUEST_CPU = min(CPUS)
HOST_CPU = max(CPUS)


@contextlib.contextmanager
def placed(placement: Placement, guest: int, *host: int) -> Iterator[None]:
    """Until the end: process `guest` on a CPU that the processes `host` do not use, or all on that one."""
    _place(guest, {GUEST_CPU})
    for pid in host:
        _place(pid, {HOST_CPU if placement == "apart" else GUEST_CPU})
    try:
        yield
    finally:
        for pid in (guest, *host):
            _place(pid, set(CPUS))


def _place(pid: int, cpus: set[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)
