"""One move of a QEMU's guest, by QEMU's own post-copy or by postcopyd, and what it cost.

Both are timed by the same events and by the same clock: down time from the source's STOP to the destination's RESUME,
total from `migrate` until the destination has every page.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from postcopyd.qemu.guests.vm import Guest, GuestVm, VmOptions
from postcopyd.qemu.migrate import MigrateOptions, QemuMigration
from postcopyd.qemu.preload import environment
from postcopyd.qemu.qmp import Machine
from postcopyd.status import MigrationStatus, State

if TYPE_CHECKING:
    from collections.abc import Iterable

MOVE_TIMEOUT_S = 180.0
ROUNDS_BEFORE, ROUNDS_AFTER = 1, 2
PRECOPY_BANDWIDTH, ANY_BANDWIDTH = 100_000, 1 << 40
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

QEMU, PREEMPT, POSTCOPYD = "qemu", "qemu_preempt", "postcopyd"
WAYS = (QEMU, PREEMPT, POSTCOPYD)


@dataclass(frozen=True)
class Moved:
    """What the guest and the host paid.

    blocktime_ms: of the vCPUs, as each way counts it, from when its own thread hears of a fault. lost_ms: from RESUME to
    the end, how long the vCPUs did not run, by the kernel's scheduler, which counts alike for all. p99_wait_us: None
    where it is not counted. cpu_s: from `migrate` to the end, of all processes of both sides but the vCPUs' threads.
    """

    downtime_ms: float
    total_s: float
    faults: int
    blocktime_ms: float
    lost_ms: float
    mean_wait_us: float
    p99_wait_us: float | None
    cpu_s: float
    wrong_pages: int


class Mover:
    """Moves guests; control and daemon_pid: of the daemon that postcopyd's moves use."""

    def __init__(self, folder: Path, control: str, daemon_pid: int, accel: str = "tcg") -> None:
        self._folder = folder
        self._control = control
        self._daemon_pid = daemon_pid
        self._accel = accel
        self._count = 0

    async def move(self, guest: Guest, way: str, push_rate: int = 0) -> Moved:
        """push_rate: bytes a second, 0 unlimited. Raises PostcopyError: it was not moved."""
        self._count += 1
        folder = self._folder / f"m{self._count}"
        folder.mkdir()
        async with AsyncExitStack() as stack:
            if way == POSTCOPYD:
                return await self._by_postcopyd(stack, folder, guest, push_rate)
            return await self._by_qemu(stack, folder, guest, push_rate, preempt=way == PREEMPT)

    async def _vm(self, stack: AsyncExitStack, folder: Path, guest: Guest, options: VmOptions) -> GuestVm:
        vm = await GuestVm.start(guest, folder, options)
        stack.push_async_callback(vm.end)
        return vm

    async def _by_qemu(
        self, stack: AsyncExitStack, folder: Path, guest: Guest, rate: int, *, preempt: bool
    ) -> Moved:
        source_vm = await self._vm(stack, folder, guest, VmOptions(name="source", accel=self._accel))
        arriving = VmOptions(name="destination", accel=self._accel, incoming="defer")
        destination_vm = await self._vm(stack, folder, guest, arriving)
        await source_vm.until_rounds(ROUNDS_BEFORE)
        source = await stack.enter_async_context(await Machine.connect("source", source_vm.qmp))
        destination = await stack.enter_async_context(
            await Machine.connect("destination", destination_vm.qmp)
        )
        for machine in (source, destination):
            wanted = ["events", "postcopy-ram", *(["postcopy-preempt"] if preempt else [])]
            wanted += ["postcopy-blocktime"] if machine is destination else []
            states = [{"capability": name, "state": True} for name in wanted]
            await machine.execute("migrate-set-capabilities", capabilities=states)
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        address = cast("dict[str, list[dict[str, str]]]", await destination.execute("query-migrate"))
        uri = f"tcp:127.0.0.1:{address['socket-address'][0]['port']}"
        # As little as possible is sent before the switch-over, so that all of memory is post-copied.
        limits = {"max-bandwidth": PRECOPY_BANDWIDTH, "max-postcopy-bandwidth": rate}
        await source.execute("migrate-set-parameters", **limits)  # type: ignore[arg-type]
        cpu = Cpu([source_vm.process.pid, destination_vm.process.pid], await _vcpus(source, destination))
        lost = Lost(await _vcpus(destination))
        began = time.monotonic()
        await source.execute("migrate", uri=uri)
        await source.execute("migrate-start-postcopy")
        await source.execute("migrate-set-parameters", **{"max-bandwidth": ANY_BANDWIDTH})
        for machine in (source, destination):
            await machine.until(lambda m: m.migration in ("completed", "failed"), MOVE_TIMEOUT_S, "is done")
        total_s, cpu_s, lost_ms = (
            time.monotonic() - began,
            cpu.spent_s(),
            lost.since_ms(destination),
        )
        ram = cast("dict[str, dict[str, int]]", await source.execute("query-migrate"))["ram"]
        blocked = cast("dict[str, list[int]]", await destination.execute("query-migrate"))
        blocktime_ms = float(sum(blocked["postcopy-vcpu-blocktime"]))
        await self._live_on(destination_vm)
        faults = ram["postcopy-requests"]
        return Moved(
            downtime_ms=_downtime_ms(source, destination),
            total_s=total_s,
            faults=faults,
            blocktime_ms=blocktime_ms,
            lost_ms=lost_ms,
            mean_wait_us=blocktime_ms * 1000 / max(faults, 1),
            p99_wait_us=None,
            cpu_s=cpu_s,
            wrong_pages=source_vm.wrong + destination_vm.wrong,
        )

    async def _by_postcopyd(self, stack: AsyncExitStack, folder: Path, guest: Guest, rate: int) -> Moved:
        here, there, socket = folder / "source-ram", folder / "destination-ram", folder / "gate.sock"
        source_vm = await self._vm(
            stack, folder, guest, VmOptions(name="source", accel=self._accel, ram=here)
        )
        arriving = VmOptions(
            name="destination",
            accel=self._accel,
            ram=there,
            incoming="defer",
            variables=environment(str(there), str(socket), wait=True),
        )
        destination_vm = await self._vm(stack, folder, guest, arriving)
        await source_vm.until_rounds(ROUNDS_BEFORE)
        options = MigrateOptions(
            source_qmp=source_vm.qmp,
            destination_qmp=destination_vm.qmp,
            control=self._control,
            id=f"move-{self._count}",
            push_rate=rate,
            keep_source=True,
        )
        ended: list[tuple[float, float]] = []

        def observe(status: MigrationStatus) -> None:
            if status.state is State.COMPLETE:
                ended.append((cpu.spent_s(), lost.since_ms(migration.destination)))

        def say(line: str) -> None:
            if line.startswith("page server"):
                cpu.add(migration.page_server_pid)

        async with QemuMigration(options, say, observe) as migration:
            plan = await migration.plan()
            vcpus = {*plan.vcpu_tids, *migration.source_vcpu_tids}
            cpu = Cpu([source_vm.process.pid, destination_vm.process.pid, self._daemon_pid], vcpus)
            lost = Lost(plan.vcpu_tids)
            report = await migration.run(plan)
        cpu_s, lost_ms = ended[-1]
        await self._live_on(destination_vm)
        for path in (here, there):
            await asyncio.to_thread(path.unlink)
        return Moved(
            downtime_ms=report.downtime_ms,
            total_s=report.total_s,
            faults=report.faults,
            blocktime_ms=report.blocktime_ms,
            lost_ms=lost_ms,
            mean_wait_us=report.mean_wait_us,
            p99_wait_us=report.p99_wait_us,
            cpu_s=cpu_s,
            wrong_pages=source_vm.wrong + destination_vm.wrong,
        )

    @staticmethod
    async def _live_on(vm: GuestVm) -> None:
        """Two rounds that began after the move have seen every page."""
        await vm.until_rounds(vm.rounds + ROUNDS_AFTER)


async def _vcpus(*machines: Machine) -> set[int]:
    answers = [await machine.execute("query-cpus-fast") for machine in machines]
    return {cpu["thread-id"] for answer in answers for cpu in cast("list[dict[str, int]]", answer)}


def _downtime_ms(source: Machine, destination: Machine) -> float:
    assert source.stopped_at is not None
    assert destination.resumed_at is not None
    return (destination.resumed_at - source.stopped_at) * 1000


class Lost:
    """How long threads do not run: they wait for a page, or for a processor that others have.

    Waiting for a processor counts because post-copy itself is who takes it away: a fault that is noticed late, as its
    handler waits for a processor, is no shorter for the guest. Source: proc(5), schedstat.
    """

    def __init__(self, tids: Iterable[int]) -> None:
        self._before = {tid: self._ran_s(tid) for tid in tids}

    def since_ms(self, machine: Machine) -> float:
        """Of all threads together, since the machine's guest went on."""
        assert machine.resumed_at is not None
        wall_s = time.monotonic() - machine.resumed_at
        return (
            sum(max(0.0, wall_s - (self._ran_s(tid) - before)) for tid, before in self._before.items()) * 1000
        )

    @staticmethod
    def _ran_s(tid: int) -> float:
        return int(Path(f"/proc/{tid}/schedstat").read_text().split()[0]) / 1e9


class Cpu:
    """Processor time from now on: of processes but for the threads `without`, and of this one."""

    def __init__(self, pids: Iterable[int], without: Iterable[int]) -> None:
        self._pids, self._without = [*pids, os.getpid()], set(without)
        self._before = self._ticks()

    def add(self, pid: int) -> None:
        """Another process, from now on."""
        self._before += _ticks_of(Path(f"/proc/{pid}"))
        self._pids.append(pid)

    def spent_s(self) -> float:
        return (self._ticks() - self._before) / TICKS_PER_S

    def _ticks(self) -> int:
        """A process's own count has its ended threads too, so the vCPUs' are taken off."""
        tasks = [task for pid in self._pids for task in Path(f"/proc/{pid}/task").iterdir()]
        vcpus = [task for task in tasks if int(task.name) in self._without]
        return sum(_ticks_of(Path(f"/proc/{pid}")) for pid in self._pids) - sum(
            _ticks_of(task) for task in vcpus
        )


def _ticks_of(task: Path) -> int:
    """Source: proc(5), stat: utime and stime."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
