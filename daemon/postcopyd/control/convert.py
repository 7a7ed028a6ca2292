"""Between the protocol's messages and the program's values. What a client sends is checked here."""

from __future__ import annotations

from postcopyd.arguments import check_id, check_socket_path, parse_endpoint
from postcopyd.errors import Code, ConfigError
from postcopyd.status import Latency, Limits, MigrationSpec, MigrationStatus, OnLoss, State, ThreadBlocktime
from postcopyd.v1 import control_pb2 as pb

MAX_SOURCES = 16
MAX_PUSH_RATE = 1 << 50
MAX_WEIGHT = 1000
MAX_RETRY_S = 1e7

# Every state by name, so that a new one on either side fails at import and not in the field.
_TO_PB = {state: pb.State.Value(f"STATE_{state.name}") for state in State}
_FROM_PB = {number: state for state, number in _TO_PB.items()}

# Fields of the same name and type on both sides.
_SAME = (
    "id", "socket_path", "source_in_use", "epoch", "vmm_pid", "handoff_format", "transport",
    "page_size", "memory_bytes", "pages_total", "pages_installed", "pages_demand", "pages_pushed",
    "pages_zero", "pages_removed",
    "faults", "exits", "waiting", "oldest_wait_us", "bytes_received", "bad_replies", "duplicates",
    "retries", "reconnects", "memory_short", "elapsed_s", "source_released", "error_code", "error",
)  # fmt: skip

NOT_CARRIED = frozenset({"pages_requested", "latency_log2_us", "latency_sum_us"})
"""Fields of MigrationStatus that only metrics need and the protocol does not have."""


_ON_LOSS_TO_PB = {policy: pb.OnLoss.Value(f"ON_LOSS_{policy.name}") for policy in OnLoss}
_ON_LOSS_FROM_PB = {number: policy for policy, number in _ON_LOSS_TO_PB.items()}


def _check_retry(seconds: float) -> float:
    if not 0 <= seconds <= MAX_RETRY_S:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"retry_for_s {seconds} is out of bounds: 0 (for ever) to {MAX_RETRY_S:.0f}",
        )
    return seconds


def limits_to_pb(limits: Limits) -> pb.Limits:
    return pb.Limits(push_rate=limits.push_rate, weight=limits.weight)


def limits_from_pb(message: pb.Limits) -> Limits:
    """Return checked limits; a weight of 0 means it was not given.

    Raises:
        ConfigError: out of bounds.
    """
    weight = message.weight or Limits().weight
    if message.push_rate > MAX_PUSH_RATE or weight > MAX_WEIGHT:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"push_rate {message.push_rate} or weight {weight} is out of bounds; "
            f"at most {MAX_PUSH_RATE} bytes a second, weight 1 to {MAX_WEIGHT}",
        )
    return Limits(push_rate=message.push_rate, weight=weight)


def spec_to_pb(spec: MigrationSpec, limits: Limits | None, present: bytes = b"") -> pb.PrepareRequest:
    """`limits` None: the daemon's defaults, whatever `spec` says."""
    return pb.PrepareRequest(
        id=spec.id,
        sources=spec.sources,
        socket_path=spec.socket_path,
        limits=None if limits is None else limits_to_pb(limits),
        epoch=spec.epoch,
        retry_for_s=spec.retry_for_s,
        on_loss=_ON_LOSS_TO_PB[spec.on_loss],
        present=present,
    )


def spec_from_pb(message: pb.PrepareRequest, default_limits: Limits) -> MigrationSpec:
    """Return what `prepare` takes.

    Raises:
        ConfigError: ARGUMENT_INVALID, naming what is wrong.
    """
    if not 1 <= len(message.sources) <= MAX_SOURCES:
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"{len(message.sources)} sources given; name 1 to {MAX_SOURCES}"
        )
    for source in message.sources:
        parse_endpoint(source)
    return MigrationSpec(
        id=check_id(message.id),
        sources=tuple(message.sources),
        socket_path=check_socket_path(message.socket_path) if message.socket_path else "",
        limits=limits_from_pb(message.limits) if message.HasField("limits") else default_limits,
        epoch=message.epoch if message.HasField("epoch") else None,
        retry_for_s=_check_retry(message.retry_for_s),
        on_loss=_ON_LOSS_FROM_PB.get(message.on_loss, OnLoss.HOLD),
    )


def status_to_pb(status: MigrationStatus) -> pb.Migration:
    latency = status.fault_latency_us
    return pb.Migration(
        **{name: getattr(status, name) for name in _SAME},
        state=_TO_PB[status.state],
        sources=status.sources,
        limits=limits_to_pb(status.limits),
        fault_latency=pb.Latency(
            count=latency.count,
            p50_us=latency.p50,
            p90_us=latency.p90,
            p99_us=latency.p99,
            max_us=latency.max,
        ),
        blocktime=[
            pb.ThreadBlocktime(
                tid=thread.tid, faults=thread.faults, blocktime_us=thread.blocktime_us, is_vcpu=thread.is_vcpu
            )
            for thread in status.blocktime
        ],
    )


def status_from_pb(message: pb.Migration) -> MigrationStatus:
    """Return the status; the fields in `NOT_CARRIED` keep their defaults.

    Raises:
        ConfigError: CONTROL_UNREACHABLE, the daemon knows states that this client does not.
    """
    if message.state not in _FROM_PB:
        raise ConfigError(
            Code.CONTROL_UNREACHABLE,
            f"the daemon reports state {message.state}, unknown here; use the client of its version",
        )
    latency = message.fault_latency
    return MigrationStatus(
        **{name: getattr(message, name) for name in _SAME},
        state=_FROM_PB[message.state],
        sources=tuple(message.sources),
        limits=Limits(push_rate=message.limits.push_rate, weight=message.limits.weight),
        fault_latency_us=Latency(
            latency.count, latency.p50_us, latency.p90_us, latency.p99_us, latency.max_us
        ),
        blocktime=tuple(
            ThreadBlocktime(thread.tid, thread.faults, thread.blocktime_us, thread.is_vcpu)
            for thread in message.blocktime
        ),
    )
