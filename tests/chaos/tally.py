"""What happened, what was lost, and whether that is good enough."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """So often at least."""

    kills: int
    restarts: int
    partitions: int


LONG = Goal(kills=200, restarts=50, partitions=20)
NOTICED_WITHIN_S = 5.0


@dataclass
class Tally:
    """outages_s: the longest that a vCPU stood still around one SIGKILL of the daemon. noticed_s: from a cut of the
    network to the state RECOVERING."""

    kills: int = 0
    restarts: int = 0
    hangs: int = 0
    partitions: int = 0
    source_kills: int = 0
    other_images: int = 0
    other_images_taken: int = 0
    full_tables: int = 0
    full_disks: int = 0
    short_pools: int = 0
    removed_pages: int = 0
    migrations: int = 0
    lost_bytes: int = 0
    wrong_counts: int = 0
    stuck_vcpus: int = 0
    leaked_fds: int = 0
    zombie_sessions: int = 0
    outages_s: list[float] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)

    @property
    def losses(self) -> int:
        return (
            self.lost_bytes
            + self.wrong_counts
            + self.stuck_vcpus
            + self.leaked_fds
            + self.zombie_sessions
            + self.other_images_taken
        )

    def is_good(self, goal: Goal) -> bool:
        enough = (
            self.kills >= goal.kills
            and self.restarts >= goal.restarts
            and self.partitions >= goal.partitions
            and self.migrations > 0
        )
        return enough and self.losses == 0 and max(self.noticed_s, default=0.0) <= NOTICED_WITHIN_S

    def to_json(self) -> str:
        values = {name: value for name, value in vars(self).items() if not name.endswith("_s")}
        return json.dumps(
            {
                **values,
                "outage_ms": _quantiles_ms(self.outages_s),
                "noticed_ms": _quantiles_ms(self.noticed_s),
            }
        )


def _quantiles_ms(values_s: list[float]) -> dict[str, float]:
    if not values_s:
        return {"p50": 0.0, "max": 0.0}
    return {"p50": round(statistics.median(values_s) * 1000, 1), "max": round(max(values_s) * 1000, 1)}
