"""One machine over one piece of guest memory: run, pause, save, load, check."""

from __future__ import annotations

import errno
import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Self

import msgspec
import structlog

from .._native import vmm as native
from ..errors import Code, ConfigError, HandoffError, InvariantError, KernelError, MigrationError
from .state import GuestKind, MachineState, Shape, check_memory

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from .guestmem import GuestMemory
    from .uffd_client import Uffd

_log = structlog.get_logger(__name__)

_POLL_S = 0.001
_WRONG = {1: "id", 2: "counter"}
_NO_KVM = {errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EACCES, errno.EPERM, errno.ENOSYS}


class Phase(StrEnum):
    PARKED = "parked"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class VcpuStatus(msgspec.Struct, frozen=True):
    """`tid` is the thread that fault messages name. `failure`: what KVM answered, where phase is FAILED."""

    id: int
    tid: int
    phase: Phase
    passes: int
    steps: int
    guest_errors: int = 0
    failure: str = ""


class GuestError(msgspec.Struct, frozen=True):
    """What the guest itself found wrong with a page: it expected another id, or another counter."""

    page: int
    wrong: str


class MachineStatus(msgspec.Struct, frozen=True):
    """`phase` is FAILED, RUNNING, PARKED or DONE where any vCPU is, in that order."""

    guest: GuestKind
    phase: Phase
    guest_errors: int
    first_guest_error: GuestError | None
    vcpus: tuple[VcpuStatus, ...]
    exits: native.ExitsStatus = native.ExitsStatus()


def _phase_of(vcpus: tuple[VcpuStatus, ...]) -> Phase:
    phases = {vcpu.phase for vcpu in vcpus}
    return next(p for p in (Phase.FAILED, Phase.RUNNING, Phase.PARKED, Phase.DONE) if p in phases)


def _failure_of(raw: native.RawVcpuStatus) -> str:
    if raw.phase is not native.PhaseCode.FAILED:
        return ""
    answer = errno.errorcode.get(raw.run_errno, str(raw.run_errno)) if raw.run_errno else "no error"
    return f"KVM_RUN: {answer}, exit reason {raw.exit_reason}, suberror {raw.suberror}, RIP {raw.rip:#x}"


class Machine:
    """A guest of `shape` in `memory`, not started. One thread at a time may call it, save for `status`.

    Raises:
        ConfigError: no such guest, or no KVM here.
        KernelError: KVM refused something else.
    """

    def __init__(self, shape: Shape, memory: GuestMemory, guest: GuestKind = GuestKind.KVM) -> None:
        if memory.len_bytes != shape.memory_bytes:
            raise ConfigError(
                Code.ARGUMENT_INVALID,
                f"the guest has {shape.memory_bytes} bytes, and its memory {memory.len_bytes}",
            )
        self.shape = shape
        self.memory = memory
        self.guest = guest
        self.removed: list[tuple[int, int]] = []
        self._steps_at_start = [0] * shape.vcpus
        try:
            self._native = native.NativeMachine(shape.raw(), memory.address, guest.code)
        except KernelError as err:
            if guest is GuestKind.KVM and "/dev/kvm" in err.op and err.errno in _NO_KVM:
                raise ConfigError(
                    Code.GUEST_NO_KVM,
                    f"no KVM here ({os.strerror(err.errno)}); --guest process runs without it",
                ) from err
            raise
        _log.info("machine.created", guest=guest, vcpus=shape.vcpus, memory_bytes=shape.memory_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the guest, running or waiting; idempotent. The memory stays."""
        self._native.destroy()

    @property
    def tids(self) -> tuple[int, ...]:
        """The vCPUs' thread ids, which do not change."""
        return tuple(self._native.status(vcpu).tid for vcpu in range(self.shape.vcpus))

    def fill(self) -> None:
        """Write the memory of a guest that has not run. Memory must be fresh: zero pages are not touched."""
        native.fill(self.shape.raw(), self.memory.address)

    def start(self) -> None:
        """Let every parked vCPU run."""
        self._steps_at_start = [vcpu.steps for vcpu in self.status().vcpus]
        self._native.start()

    def use_exits(self, path: Path, uffd: Uffd) -> None:
        """Have absent pages come as exits, and hand memory over to the daemon at `path` with an exit ring.

        Before the first start. `uffd` has memory registered and was made with user_mode_only.

        Raises:
            HandoffError: nobody listens, or the daemon refused.
            ConfigError: this guest has no exits.
        """
        if self.guest is not GuestKind.KVM:
            raise ConfigError(Code.ARGUMENT_INVALID, "only a KVM guest has exits; use --guest kvm")
        error = self._native.use_exits(str(path), uffd.fileno(), self.memory.page_size)
        if error:
            raise HandoffError(
                Code.VMM_HANDOFF_UNANSWERED,
                f"the hand-off with an exit ring to the daemon at {path} failed: {os.strerror(error)}",
            )
        _log.info("handoff.sent", format="framed", path=str(path), exits=True)
        self._native.start_device()

    def pause(self, timeout_s: float = 5.0) -> None:
        """Take every vCPU out of the guest, also those that wait for a page.

        Raises:
            MigrationError: some vCPU did not leave in time; it parks when its page comes. Linux before 6.2
                cannot interrupt a vCPU that waits for a page.
        """
        running = self._native.pause(_milliseconds(timeout_s))
        if running:
            raise MigrationError(
                Code.GUEST_STATE, f"{running} of {self.shape.vcpus} vCPUs did not pause within {timeout_s} s"
            )

    def wait_stopped(self, timeout_s: float) -> bool:
        """Return whether no vCPU runs: all are parked, done or failed. Waits for it up to `timeout_s`."""
        return self._native.wait(_milliseconds(timeout_s)) == 0

    def wait_steps(self, steps: int, timeout_s: float) -> bool:
        """Return whether every vCPU made `steps` steps since `start`, waiting `timeout_s` for it.

        The guest does not tell when it passes a step, so this looks every millisecond. False also when a vCPU
        ends before.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            vcpus = zip(self.status().vcpus, self._steps_at_start, strict=True)
            behind = [vcpu for vcpu, start in vcpus if vcpu.steps - start < steps]
            if not behind:
                return True
            if time.monotonic() > deadline or any(vcpu.phase is not Phase.RUNNING for vcpu in behind):
                return False
            time.sleep(_POLL_S)

    def save(self) -> MachineState:
        """Return the registers of the paused guest.

        Raises:
            MigrationError: a vCPU runs, or failed.
            KernelError: KVM refused.
        """
        self._require_stopped("saved")
        return MachineState(
            guest=self.guest,
            program_id=native.program_id(self.guest.code),
            shape=self.shape,
            registers=tuple(self._native.save(vcpu) for vcpu in range(self.shape.vcpus)),
            removed=tuple(self.removed),
        )

    def load(self, state: MachineState) -> None:
        """Continue where `state` was saved. Memory must be, or become, what it was then.

        Raises:
            ConfigError: the state is of another guest.
            MigrationError: a vCPU runs.
            KernelError: KVM refused.
        """
        if state.guest is not self.guest or state.shape != self.shape:
            raise ConfigError(
                Code.GUEST_STATE_FILE,
                f"the saved state is of a {state.guest} guest of {state.shape};"
                f" this is a {self.guest} guest of {self.shape}",
            )
        state.validate()
        self._require_stopped("loaded")
        for vcpu, registers in enumerate(state.registers):
            self._native.load(vcpu, registers)
        self.removed = list(state.removed)

    def balloon(self, offset: int, len_bytes: int) -> None:
        """Take a range from the guest as a balloon does: it reads zero from now on. See GuestMemory.discard.

        The guest reports pages that it walks and finds empty; the last `shape.spare_bytes` it never walks.
        """
        self.memory.discard(offset, len_bytes)
        self.removed.append((offset, len_bytes))

    def check(self) -> native.CheckResult:
        """Compare every byte of memory with what the stopped guest must have made of it.

        Blocks while pages are absent.

        Raises:
            MigrationError: a vCPU runs, or failed.
        """
        return check_memory(self.save(), self.memory.address, self.removed)

    def steps(self) -> tuple[int | None, ...]:
        """How many steps each vCPU made; None while it does not run. Any thread may ask at any time before `close`."""
        raws = (self._native.status(vcpu) for vcpu in range(self.shape.vcpus))
        return tuple(raw.tick if raw.phase is native.PhaseCode.RUNNING else None for raw in raws)

    def status(self) -> MachineStatus:
        """Return a snapshot; any thread may ask at any time before `close`."""
        raws = [self._native.status(vcpu) for vcpu in range(self.shape.vcpus)]
        vcpus = tuple(
            VcpuStatus(
                id=index,
                tid=raw.tid,
                phase=Phase[raw.phase.name],
                passes=raw.passes,
                steps=raw.tick,
                guest_errors=raw.guest_errors,
                failure=_failure_of(raw),
            )
            for index, raw in enumerate(raws)
        )
        wrong = next((raw for raw in raws if raw.guest_errors), None)
        first = None
        if wrong is not None:
            first = GuestError(wrong.first_error_page, _WRONG[wrong.first_error_kind])
        return MachineStatus(
            guest=self.guest,
            phase=_phase_of(vcpus),
            guest_errors=sum(raw.guest_errors for raw in raws),
            first_guest_error=first,
            vcpus=vcpus,
            exits=self._native.exits_status(),
        )

    def _require_stopped(self, what: str) -> None:
        for vcpu in self.status().vcpus:
            if vcpu.phase is Phase.RUNNING:
                raise MigrationError(
                    Code.GUEST_STATE, f"vCPU {vcpu.id} runs; pause the guest before it is {what}"
                )
            if vcpu.phase is Phase.FAILED:
                raise MigrationError(
                    Code.GUEST_STATE, f"vCPU {vcpu.id} failed and cannot be {what} ({vcpu.failure})"
                )


def _milliseconds(timeout_s: float) -> int:
    if not 0 <= timeout_s <= 86400:
        raise InvariantError(f"a time-out of {timeout_s} s")
    return int(timeout_s * 1000)
