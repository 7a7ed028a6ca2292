"""Whether new migrations are taken.

Ready means: stored sessions are adopted, the control socket answers, and nobody asked the daemon to stop. A
migration that is RECOVERING does not make it unready: its source is gone, not this daemon, which can take
other guests; and an orchestrator that restarts what is not ready would only add a restart to the outage.
Such migrations are listed in the answer, and metrics alarm.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from postcopyd.status import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from postcopyd.status import MigrationStatus


class Readiness:
    """Reasons not to be ready, by name; ready when there is none."""

    def __init__(self, **reasons: str) -> None:
        self._reasons = dict(reasons) or {"starting": "stored sessions are not adopted yet"}
        self.changed = asyncio.Event()
        """Set by every change; whoever waits clears it first."""

    @property
    def reasons(self) -> dict[str, str]:
        return dict(self._reasons)

    @property
    def is_ready(self) -> bool:
        return not self._reasons

    def report(self, migrations: Sequence[MigrationStatus]) -> dict[str, object]:
        """Return what /readyz answers."""
        recovering = [status.id for status in migrations if status.state is State.RECOVERING]
        return {"ready": self.is_ready, "reasons": self.reasons, "recovering": recovering}

    def hold(self, name: str, reason: str) -> None:
        """Not ready for `reason` until `release(name)`."""
        self._reasons[name] = reason
        self.changed.set()

    def release(self, name: str) -> None:
        """Drop a reason; nothing if it was not held."""
        self._reasons.pop(name, None)
        self.changed.set()
