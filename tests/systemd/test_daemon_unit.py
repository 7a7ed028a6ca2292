"""The shipped units under a real systemd: whatever becomes of the daemon, its guests get their memory."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from harness import Host
from postcopyd.control.client import ControlClient
from postcopyd.errors import Code, PostcopyError
from postcopyd.status import Limits, State
from postcopyd.units import MIB
from private_systemd import PATIENCE_S, STANDBY_STEPS, PrivateSystemd, require_systemd
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from postcopyd.demo.processes import Child
    from postcopyd.status import MigrationStatus

UNIT = "postcopyd.service"
SHAPE = ("--memory", "8M", "--vcpus", "1", "--order", "random", "--guest", "process")
PAGES = 8 * MIB // 4096
SLOW = Limits(push_rate=MIB // 4)

IMAGES = tuple(f"guest{number}" for number in range(40))
"""All of them the same memory; each migration takes one."""

SOURCE_ADDRESS = "127.0.0.1:50951"
CONFIG = """
http = ""
transport = "native"
default_source = ["{address}"]
default_image = "guest0"
"""

in_one_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Site:
    """A systemd with the daemon's unit, and a page server of a paused guest beside it."""

    systemd: PrivateSystemd
    stack: AsyncExitStack
    address: str
    ram: Path
    registers: Path
    made: int = 0

    def client(self) -> ControlClient:
        return ControlClient(f"/proc/{self.systemd.pid}/root/run/postcopyd/control.sock")

    async def held(self) -> int:
        return int((await self.systemd.properties(UNIT, "NFileDescriptorStore"))["NFileDescriptorStore"])

    async def restarts(self) -> int:
        return int((await self.systemd.properties(UNIT, "NRestarts"))["NRestarts"])

    async def migrate(self, *, address: str = "", id: str = "") -> tuple[str, Child]:
        """Prepare a migration whose push is slow, and start its guest; return its id and its VMM."""
        self.made += 1
        id = id or IMAGES[self.made]
        async with self.client() as client:
            prepared = await client.prepare(id, [address or self.address], limits=SLOW)
        return id, await self.vmm(prepared.socket_path)

    async def vmm(self, socket_path: str) -> Child:
        self.made += 1
        vmm = await self.systemd.program(
            f"vmm{self.made}", "postcopyd.vmm", "destination", *SHAPE, "--socket", socket_path
        )
        self.stack.push_async_callback(vmm.end)
        await vmm.line()
        await vmm.command("load", path=str(self.registers))
        await vmm.command("start")
        return vmm

    async def standby(self) -> int:
        """The process that waits for the daemon's end."""
        main = await self.systemd.main_pid(UNIT)
        async with asyncio.timeout(PATIENCE_S):
            while not (others := await self.systemd.processes(UNIT) - {main}):
                pass
        return others.pop()

    async def until_active(self, restarts: int) -> None:
        """Return when the unit was restarted so often and is ready."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                seen = await self.systemd.properties(UNIT, "ActiveState", "SubState", "NRestarts")
                if int(seen["NRestarts"]) >= restarts and seen["SubState"] == "running":
                    return

    async def get(self, id: str) -> MigrationStatus:
        async with self.client() as client:
            return await client.get(id)

    async def complete(self, id: str, vmm: Child) -> None:
        """Let a migration run to its end, and look at every byte."""
        async with asyncio.timeout(PATIENCE_S), self.client() as client:
            await client.set_limits(id, Limits())
            async for status in client.watch(id, interval_s=0.02):
                last = status
        assert last.state is State.COMPLETE
        await self.check(vmm)

    async def check(self, vmm: Child) -> None:
        await vmm.command("wait", steps=100, timeout_s=PATIENCE_S)
        await vmm.command("pause")
        check = await vmm.command("check", ram=str(self.ram), state=str(self.registers))
        assert (check["mismatched_pages"], check["source_mismatched_pages"], check["guest_errors"]) == (
            0,
            0,
            0,
        )
        assert await self.held() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def booted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    require_systemd()
    require_uffd()
    async with Host() as host, AsyncExitStack() as stack:
        ram, registers = await host.paused_source(*SHAPE, steps=PAGES // 2)
        _, address = await host.page_server(*(f"{id}={ram}" for id in IMAGES), options=("--keep",))
        files = {
            "postcopyd/postcopyd.toml": CONFIG.format(address=address),
            "postcopyd/source/pages.env": f"IMAGE={ram}\nLISTEN={SOURCE_ADDRESS}\nARGS=\n",
        }
        systemd = PrivateSystemd(tmp_path_factory.mktemp("systemd"), files)
        await stack.enter_async_context(systemd)
        await systemd.run("systemd-sysusers", "/etc/systemd/system/postcopyd.sysusers")
        await systemd.run("systemd-tmpfiles", "--create", "/etc/systemd/system/postcopyd.tmpfiles")
        yield Site(systemd, stack, address, ram, registers)


@pytest_asyncio.fixture(loop_scope="module")
async def site(booted: Site) -> AsyncIterator[Site]:
    """The daemon as shipped, running."""
    await booted.systemd.configure(UNIT)
    await booted.systemd.run("systemctl", "start", "postcopyd.socket", UNIT)
    yield booted
    # Whatever a failed test left unserved.
    await booted.systemd.configure(UNIT, "Restart=no")
    await booted.systemd.run("systemctl", "kill", "-s", "KILL", UNIT, check=False)
    await booted.systemd.run("systemctl", "stop", "postcopyd.socket", UNIT)
    await booted.systemd.run("systemctl", "reset-failed", check=False)


@in_one_loop
async def test_a_killed_daemon_goes_on_before_it_is_ready(site: Site) -> None:
    id, vmm = await site.migrate()
    held = await site.held()
    assert held >= 4
    for kills in range(1, 4):
        await site.systemd.kill(UNIT)
        await site.until_active(kills)
        assert (await site.get(id)).state is State.RUNNING
        assert await site.held() == held
    await site.complete(id, vmm)


@in_one_loop
async def test_a_standby_goes_on_where_a_daemon_was_killed(site: Site) -> None:
    id, vmm = await site.migrate()
    for kills in range(1, 4):
        standby = await site.standby()
        await site.systemd.kill(UNIT)
        await site.until_active(kills)
        assert await site.systemd.main_pid(UNIT) == standby
        assert (await site.get(id)).state is State.RUNNING
    await site.complete(id, vmm)


@in_one_loop
@pytest.mark.parametrize("step", sorted(STANDBY_STEPS))
async def test_a_standby_that_dies_on_its_way_is_done_without(step: str, site: Site) -> None:
    await site.systemd.configure(UNIT, f"Environment=POSTCOPYD_CRASH_AT={step}")
    await site.systemd.run("systemctl", "restart", UNIT)
    id, vmm = await site.migrate()
    standby = await site.standby()
    await site.systemd.kill(UNIT)
    await site.until_active(1 if step == "standby.claimed" else 2)
    assert standby not in await site.systemd.processes(UNIT)
    await site.complete(id, vmm)


@in_one_loop
async def test_no_standby_outlives_a_restart_or_a_stop(site: Site) -> None:
    left_over = "remains running"
    before = (await site.systemd.journal(UNIT)).count(left_over)
    id, vmm = await site.migrate()
    standby = await site.standby()
    await site.systemd.run("systemctl", "restart", UNIT)
    assert standby not in await site.systemd.processes(UNIT)
    await site.complete(id, vmm)
    await site.standby()
    await site.systemd.run("systemctl", "stop", UNIT)
    assert await site.systemd.processes(UNIT) == set()
    assert (await site.systemd.journal(UNIT)).count(left_over) == before


@in_one_loop
async def test_restarts_one_after_the_other_lose_nothing(site: Site) -> None:
    id, vmm = await site.migrate()
    for _ in range(5):
        await site.systemd.run("systemctl", "restart", UNIT)
    assert await site.restarts() == 0
    await site.complete(id, vmm)


@in_one_loop
async def test_a_hung_daemon_is_replaced(site: Site) -> None:
    await site.systemd.configure(UNIT, "WatchdogSec=1")
    await site.systemd.run("systemctl", "restart", UNIT)
    id, vmm = await site.migrate()
    await site.systemd.kill(UNIT, "STOP")
    await site.until_active(1)
    assert "watchdog" in (await site.systemd.journal(UNIT)).lower()
    await site.complete(id, vmm)


@in_one_loop
async def test_a_stop_waits_until_every_guest_has_its_memory(site: Site) -> None:
    _, vmm = await site.migrate()
    await site.systemd.run("systemctl", "stop", UNIT)
    assert (await site.systemd.properties(UNIT, "Result"))["Result"] == "success"
    await site.check(vmm)


@in_one_loop
async def test_a_served_guest_needs_nothing_that_the_confinement_takes_away(site: Site) -> None:
    id, vmm = await site.migrate()
    pid = await site.systemd.main_pid(UNIT)
    _, text, _ = await site.systemd.run("cat", f"/proc/{pid}/status")
    status = dict(re.findall(r"^(\w+):\t(.*)$", text, flags=re.MULTILINE))
    assert int(status["Uid"].split()[1]) != 0
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    _, devices, _ = await site.systemd.run("ls", f"/proc/{pid}/root/dev")
    assert not {"kvm", "userfaultfd"} & set(devices.split())
    await site.complete(id, vmm)


@in_one_loop
async def test_what_the_store_cannot_hold_is_refused(site: Site) -> None:
    await site.systemd.configure(UNIT, "FileDescriptorStoreMax=6", "Environment=POSTCOPYD_STORE_MAX=6")
    await site.systemd.run("systemctl", "restart", UNIT)
    id, vmm = await site.migrate()
    with pytest.raises(PostcopyError, match="refused"):
        await site.migrate()
    assert Code.STORE_FULL in await site.systemd.journal(UNIT)
    async with site.client() as client:
        await client.cancel(IMAGES[site.made - 1])
    await site.complete(id, vmm)


@in_one_loop
async def test_a_vmm_that_connects_while_no_daemon_lives_is_served_by_the_next(site: Site) -> None:
    await site.systemd.run("systemctl", "stop", UNIT)
    connecting = asyncio.ensure_future(site.vmm("/run/postcopyd/vmm.sock"))
    await site.until_active(0)
    vmm = await connecting
    await site.complete("guest0-1", vmm)


@in_one_loop
async def test_a_killed_source_is_back_and_ends_when_its_image_was_fetched(site: Site) -> None:
    source = "postcopyd-source@pages.service"
    # The unit runs as nobody who owns the image.
    os.chmod(site.ram, 0o644)
    os.chmod(site.ram.parent, 0o755)
    await site.systemd.run("systemctl", "start", source)
    id, vmm = await site.migrate(address=SOURCE_ADDRESS, id="pages")
    await site.systemd.kill(source)
    await site.complete(id, vmm)
    async with asyncio.timeout(PATIENCE_S):
        while (await site.systemd.properties(source, "ActiveState"))["ActiveState"] != "inactive":
            pass
    assert (await site.systemd.properties(source, "Result"))["Result"] == "success"
    assert "restart counter is at 1." in await site.systemd.journal(source)
