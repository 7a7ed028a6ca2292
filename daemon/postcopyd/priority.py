"""Scheduling priority: vCPUs that run must not keep those that wait from getting their pages."""

from __future__ import annotations

import os

import structlog

log = structlog.get_logger(__name__)

NICE = -10


def raise_priority(nice: int) -> None:
    """Take the nice value `nice` where that is permitted (CAP_SYS_NICE, or the unit's Nice=); else go on as it is.

    Source: setpriority(2).
    """
    if os.getpriority(os.PRIO_PROCESS, 0) <= nice:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except PermissionError:
        log.info("priority.unchanged", nice=os.getpriority(os.PRIO_PROCESS, 0), wanted=nice)
