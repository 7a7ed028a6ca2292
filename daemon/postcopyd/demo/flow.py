"""The demo's story: a guest runs, stops, and goes on elsewhere before its memory is there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from ..control.client import ControlClient
from ..errors import Code, ConfigError, MigrationError
from ..status import Latency, Limits, State
from ..units import MIB, PAGE_SIZE, format_size
from .processes import Child, ReadySocket, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..status import MigrationStatus

ID = "demo"
MAX_VCPUS = 64
RUN_TIMEOUT_S = 600.0


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """memory_bytes: of the guest. push_rate: bytes a second, 0 unlimited."""

    memory_bytes: int
    vcpus: int
    guest: str
    order: str
    push_rate: int
    transport: str
    faults: str = "uffd"


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """What happened; the keys of `demo --json`."""

    guest: str
    faults: str
    transport: str
    memory_bytes: int
    page_size: int
    vcpus: int
    order: str
    pages_total: int
    pages_installed: int
    pages_demand: int
    pages_pushed: int
    pages_zero: int
    mismatched_pages: int
    guest_errors: int
    fault_latency_us: Latency
    vcpu_blocktime_us: list[int]
    other_blocktime_us: int
    faults_uffd: int
    faults_exits: int
    exits_by_shape: dict[str, int]
    total_s: float
    completed: bool
    source_released: bool

    @property
    def is_good(self) -> bool:
        return (
            self.completed
            and self.source_released
            and self.mismatched_pages == 0
            and self.guest_errors == 0
            and self.pages_installed == self.pages_total
        )


def check_options(options: DemoOptions) -> DemoOptions:
    """Return the options, with another guest where /dev/kvm is missing.

    Raises:
        ConfigError: a size that makes no sense, or more than this host has room for.
    """
    slice_bytes = PAGE_SIZE * options.vcpus
    if options.memory_bytes < slice_bytes or options.memory_bytes % PAGE_SIZE:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"--memory {options.memory_bytes}: must be a multiple of {PAGE_SIZE}, and at least a page a vCPU",
        )
    if options.memory_bytes > 1 << 40:
        raise ConfigError(Code.ARGUMENT_INVALID, "--memory: the demo moves 1T at most")
    if options.guest == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        options = msgspec.structs.replace(options, guest="process")
    if options.guest == "process" and options.faults == "exits":
        raise ConfigError(
            Code.ARGUMENT_INVALID, "--faults exits needs vCPUs: --guest kvm, on a host with /dev/kvm"
        )
    return options


def _folder_for(memory_bytes: int) -> str:
    """Where the source's memory file can lie: tmpfs if it has room for it."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if os.path.isdir(folder) and shutil.disk_usage(folder).free > memory_bytes + 64 * MIB:
            return folder
    raise ConfigError(
        Code.ARGUMENT_INVALID,
        f"neither /dev/shm nor {tempfile.gettempdir()} has room for {format_size(memory_bytes)}; use a smaller --memory",
    )


class Demo:
    """One run. `observe` gets the migration's status while it lasts, `say` a line for people at each step."""

    def __init__(
        self,
        options: DemoOptions,
        observe: Callable[[MigrationStatus], None],
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._observe = observe
        self._say = say
        self._folder = Path()

    async def run(self) -> DemoResult:
        """Move the guest and check it. Raises MigrationError: DEMO_FAILED, with the log of who failed."""
        async with AsyncExitStack() as stack:
            self._folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix="postcopyd-demo-", dir=_folder_for(self._options.memory_bytes)
                    )
                )
            )
            await self._source(stack)
            address = await self._page_server(stack)
            client = await self._daemon(stack)
            return await self._destination(stack, client, address)

    def _shape(self) -> list[str]:
        o = self._options
        return [
            *("--memory", str(o.memory_bytes)),
            *("--vcpus", str(o.vcpus)),
            *("--order", o.order),
            *("--guest", o.guest),
        ]

    async def _spawn(self, stack: AsyncExitStack, name: str, *argv: str, **env: str) -> Child:
        child = await Child.start(name, self._folder, *argv, env=env)
        stack.push_async_callback(child.end)
        return child

    async def _source(self, stack: AsyncExitStack) -> None:
        """A guest runs for a while, then is paused: its registers and memory are files now."""
        vmm = await self._spawn(
            stack, "source-vmm", "postcopyd.vmm", "source", *self._shape(), "--ram", str(self._ram)
        )
        await vmm.line(RUN_TIMEOUT_S)
        await vmm.command("start")
        # Part of a pass, so that counters differ within every slice.
        steps = max(1, self._options.memory_bytes // PAGE_SIZE // self._options.vcpus // 2)
        await vmm.command("wait", RUN_TIMEOUT_S, steps=steps, timeout_s=RUN_TIMEOUT_S / 2)
        await vmm.command("pause")
        await vmm.command("save", path=str(self._registers))
        self._say(f"source: a guest of {format_size(self._options.memory_bytes)} ran and is paused")

    @property
    def _ram(self) -> Path:
        return self._folder / "ram"

    @property
    def _registers(self) -> Path:
        return self._folder / "registers.json"

    async def _page_server(self, stack: AsyncExitStack) -> str:
        server = await self._spawn(
            stack,
            "page-server",
            "postcopyd",
            "serve",
            *("--image", f"{ID}={self._ram}"),
            *("--listen", "127.0.0.1:0"),
        )
        address = str(require(await server.line(), "address"))
        self._say(f"page server: {address}")
        return address

    async def _daemon(self, stack: AsyncExitStack) -> ControlClient:
        ready = ReadySocket(self._folder)
        stack.callback(ready.close)
        daemon = await self._spawn(
            stack,
            "daemon",
            *("postcopyd", "run", "--state-dir", str(self._folder / "state")),
            NOTIFY_SOCKET=str(ready.path),
            POSTCOPYD_HTTP="",
            POSTCOPYD_TRANSPORT=self._options.transport,
        )
        await ready.wait_ready(daemon)
        self._say(f"daemon: ready, transport {self._options.transport}")
        return await stack.enter_async_context(ControlClient(str(self._folder / "state" / "control.sock")))

    async def _destination(self, stack: AsyncExitStack, client: ControlClient, address: str) -> DemoResult:
        prepared = await client.prepare(ID, [address], limits=Limits(push_rate=self._options.push_rate))
        vmm = await self._spawn(
            stack,
            "destination-vmm",
            *("postcopyd.vmm", "destination", *self._shape()),
            *("--socket", prepared.socket_path, "--thread-id", "--faults", self._options.faults),
        )
        tids = cast("list[int]", require(await vmm.line(), "tids"))
        await vmm.command("load", path=str(self._registers))
        await vmm.command("start")
        self._say("destination: the guest runs, its memory is still at the source")
        status = await self._watch(client)
        # Some more life without us, then the judgement.
        await vmm.command("wait", RUN_TIMEOUT_S, steps=1000, timeout_s=RUN_TIMEOUT_S / 2)
        await vmm.command("pause", timeout_s=30.0)
        exits = cast("dict[str, dict[str, dict[str, int]]]", await vmm.command("status"))["status"]["exits"]
        check = await vmm.command("check", RUN_TIMEOUT_S, ram=str(self._ram), state=str(self._registers))
        return self._result(status, check, tids, exits)

    async def _watch(self, client: ControlClient) -> MigrationStatus:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        async for status in client.watch(ID, interval_s=0.1):
            self._observe(status)
            if status.state.is_final:
                return status
            if time.monotonic() > deadline:
                break
        raise MigrationError(Code.DEMO_FAILED, f"the memory was not complete after {RUN_TIMEOUT_S:g} s")

    def _result(
        self,
        status: MigrationStatus,
        check: dict[str, object],
        tids: list[int],
        exits: dict[str, int],
    ) -> DemoResult:
        # A vCPU that reports by exits is known by its number, one that sleeps in the kernel by its thread.
        waits = {(thread.is_vcpu, thread.tid): thread.blocktime_us for thread in status.blocktime}
        blocktime = [waits.pop((True, i), 0) + waits.pop((False, tid), 0) for i, tid in enumerate(tids)]
        source_bad = cast("int", require(check, "source_mismatched_pages"))
        return DemoResult(
            guest=self._options.guest,
            faults=self._options.faults,
            transport=status.transport,
            memory_bytes=status.memory_bytes,
            page_size=status.page_size,
            vcpus=self._options.vcpus,
            order=self._options.order,
            pages_total=status.pages_total,
            pages_installed=status.pages_installed,
            pages_demand=status.pages_demand,
            pages_pushed=status.pages_pushed,
            pages_zero=status.pages_zero,
            mismatched_pages=cast("int", require(check, "mismatched_pages")) + source_bad,
            guest_errors=cast("int", require(check, "guest_errors")),
            fault_latency_us=status.fault_latency_us,
            vcpu_blocktime_us=blocktime,
            other_blocktime_us=sum(waits.values()),
            faults_uffd=status.faults,
            faults_exits=status.exits,
            exits_by_shape={shape: exits[shape] for shape in ("annotated", "bare", "mmio", "emulation")},
            total_s=round(status.elapsed_s, 3),
            completed=status.state is State.COMPLETE,
            source_released=status.source_released,
        )
