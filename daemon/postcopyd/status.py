"""What a migration looks like from outside: one value for control, metrics, the CLI and the demo."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class State(StrEnum):
    """PREPARED → CONNECTED → RUNNING ⇄ RECOVERING → COMPLETE | FAILED | CANCELLED."""

    PREPARED = "prepared"
    CONNECTED = "connected"
    RUNNING = "running"
    RECOVERING = "recovering"
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (State.COMPLETE, State.FAILED, State.CANCELLED)


NEXT_STATES: dict[State, frozenset[State]] = {
    State.PREPARED: frozenset({State.CONNECTED, State.CANCELLED, State.FAILED}),
    State.CONNECTED: frozenset(
        {State.RUNNING, State.RECOVERING, State.COMPLETE, State.FAILED, State.CANCELLED}
    ),
    State.RUNNING: frozenset({State.RECOVERING, State.COMPLETE, State.FAILED, State.CANCELLED}),
    State.RECOVERING: frozenset({State.RUNNING, State.COMPLETE, State.FAILED, State.CANCELLED}),
    State.COMPLETE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""Which state may follow which; the picture in docs/architecture.md is drawn from it."""


class Limits(msgspec.Struct, frozen=True):
    """push_rate: bytes a second for the background push, 0 unlimited. weight: 1 to 1000."""

    push_rate: int = 0
    weight: int = 100


class OnLoss(StrEnum):
    """What becomes of a guest whose source did not come back in time: it waits on; its missing pages are poisoned, so
    that it sees memory errors instead of hanging; its VMM is killed."""

    HOLD = "hold"
    POISON = "poison"
    KILL = "kill"


class MigrationSpec(msgspec.Struct, frozen=True):
    """What `prepare` is given.

    `sources` are HOST:PORT, tried in order; `image_id`, if empty, is `id`. retry_for_s: how long a lost source is waited
    for before `on_loss` happens; 0: for ever.
    """

    id: str
    sources: tuple[str, ...]
    socket_path: str = ""
    limits: Limits = Limits()
    epoch: int | None = None
    image_id: str = ""
    retry_for_s: float = 0.0
    on_loss: OnLoss = OnLoss.HOLD


class Latency(msgspec.Struct, frozen=True):
    """Microseconds, from the reading of the fault message to the wake."""

    count: int = 0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class ThreadBlocktime(msgspec.Struct, frozen=True):
    """How long one thread of the VMM stood still.

    tid: as the kernel's fault message gives it; if is_vcpu, the number of a vCPU that reported by exits.
    """

    tid: int
    faults: int
    blocktime_us: int
    is_vcpu: bool = False


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Counts are pages of `page_size` bytes unless their name says otherwise."""

    id: str
    state: State
    socket_path: str
    sources: tuple[str, ...]
    source_in_use: str = ""
    limits: Limits = Limits()
    epoch: int = 0
    vmm_pid: int = 0
    handoff_format: str = ""
    transport: str = ""

    page_size: int = 0
    memory_bytes: int = 0
    pages_total: int = 0
    pages_installed: int = 0
    pages_demand: int = 0
    pages_pushed: int = 0
    pages_zero: int = 0
    pages_removed: int = 0
    pages_requested: int = 0
    faults: int = 0
    exits: int = 0
    waiting: int = 0
    oldest_wait_us: int = 0
    bytes_received: int = 0
    bad_replies: int = 0
    duplicates: int = 0
    retries: int = 0
    reconnects: int = 0
    memory_short: bool = False
    fault_latency_us: Latency = Latency()
    latency_log2_us: tuple[int, ...] = ()
    """Count of fault latencies in [2^i, 2^(i+1)) µs; index 0 also holds those below 1 µs."""
    latency_sum_us: int = 0
    blocktime: tuple[ThreadBlocktime, ...] = ()
    elapsed_s: float = 0.0
    source_released: bool = False

    error_code: str = ""
    error: str = ""
