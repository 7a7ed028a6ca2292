"""QEMUs with small guests, a daemon, and the command that moves guests between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, DaemonProcess, Host
from postcopyd.qemu.guests.vm import QEMU, GuestVm, VmOptions
from postcopyd.qemu.guests.walker import Order, Walker
from postcopyd.qemu.migrate import MigrateOptions, QemuMigration
from postcopyd.qemu.preload import environment
from postcopyd.qemu.qmp import Machine
from postcopyd.units import MIB
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from postcopyd.qemu.report import Report

WALKED = 16 * MIB
SLOW = 256 * 1024
"""A push so slow that a test does something meanwhile."""


def require_qemu() -> None:
    """Skip where there is no QEMU; fail instead with REQUIRE_QEMU=1."""
    require_uffd()
    missing = [program for program in (QEMU, "as", "ld") if shutil.which(program) is None]
    if missing and os.environ.get("REQUIRE_QEMU") == "1":
        pytest.fail(f"REQUIRE_QEMU=1, but there is no {missing[0]}")
    if missing:
        pytest.skip(f"no {missing[0]} here")


class Pair:
    """A source that runs its guest, and a destination that waits for it."""

    def __init__(self, host: Host, postcopyd: DaemonProcess) -> None:
        self.host = host
        self.postcopyd = postcopyd
        self.folder = host.folder
        self.guest = Walker(WALKED, Order.RANDOM)
        self.lines: list[str] = []
        self.migration: QemuMigration

    async def vm(self, name: str, ram: Path | None = None, **options: object) -> GuestVm:
        folder = self.folder / name
        folder.mkdir()
        wanted = VmOptions(name=name, ram=ram, **options)  # type: ignore[arg-type] # named by the caller
        vm = await GuestVm.start(self.guest, folder, wanted)
        self.host._stack.push_async_callback(vm.end)
        return vm

    async def source(self, **options: object) -> GuestVm:
        """Its guest has been round once."""
        self.source_vm = await self.vm("source", self.folder / "source-ram", **options)
        await self.source_vm.until_rounds(1)
        return self.source_vm

    async def destination(self, *, shim: bool = True, **options: object) -> GuestVm:
        ram, socket = self.folder / "destination-ram", self.folder / "gate.sock"
        variables = environment(str(ram), str(socket), wait=True) if shim else {}
        wanted = {"incoming": "defer", "variables": variables, **options}
        self.destination_vm = await self.vm("destination", ram, **wanted)
        return self.destination_vm

    async def move(
        self,
        at: Callable[[str], object] = lambda line: None,
        push_rate: int = 0,
        keep_source: bool = False,
        id: str = "vm",
    ) -> Report:
        """Plan and run; `at` is called with each line for people."""

        def say(line: str) -> None:
            self.lines.append(line)
            at(line)

        wanted = MigrateOptions(
            source_qmp=self.source_vm.qmp,
            destination_qmp=self.destination_vm.qmp,
            control=self.postcopyd.control,
            id=id,
            push_rate=push_rate,
            keep_source=keep_source,
        )
        async with QemuMigration(wanted, say) as self.migration:
            async with asyncio.timeout(4 * PATIENCE_S):
                return await self.migration.run(await self.migration.plan())

    async def assert_lives(self, vm: GuestVm) -> None:
        """Its guest goes on, and never found a wrong page."""
        await vm.until_rounds(vm.rounds + 2)
        assert vm.wrong == 0

    async def ask(self, vm: GuestVm, command: str) -> object:
        async with await Machine.connect("vm", vm.qmp) as machine:
            return await machine.execute(command)


def page_servers(folder: Path) -> list[int]:
    """Pids of those that serve files of `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text().split("\0")
            if "serve" in command and any(f"={folder}/" in part for part in command):
                found.append(int(entry.name))
    return found


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """Page servers that outlive their migration, as they must where a guest may need them, end with the test."""
    async with Host() as host:
        it = Pair(host, await host.daemon())
        try:
            yield it
        finally:
            for pid in page_servers(it.folder):
                os.kill(pid, signal.SIGKILL)
