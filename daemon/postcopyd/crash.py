"""Dying on purpose: the tests' proof that dying anywhere loses nothing.

`POSTCOPYD_CRASH_AT=NAME` or `NAME:N` kills the process with SIGKILL at the first (or Nth) time it passes the point.
The C has the same points (daemon/native/crash.h). The tests find all of them in the code, so a new one is tested
or fails.
"""

from __future__ import annotations

import os
import signal

from ._native.core import arm_crash

VARIABLE = "POSTCOPYD_CRASH_AT"

_name = ""
_left = 0


def arm(setting: str) -> None:
    """Take NAME or NAME:N; an empty one disarms."""
    global _name, _left
    name, _, count = setting.partition(":")
    _name, _left = name, int(count or 1)
    arm_crash(_name, _left)


def crash_point(name: str) -> None:
    """Die here if that was asked for."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE, ""))
