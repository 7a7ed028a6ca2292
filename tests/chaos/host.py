"""The destination host: the shipped unit under a systemd of its own, and the guests that arrive."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar, cast

from chaos.network import SOURCE_ADDRESS
from postcopyd.control.client import ControlClient
from postcopyd.errors import Code, PostcopyError
from postcopyd.status import Limits, MigrationStatus
from private_systemd import PrivateSystemd

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from chaos.tally import Tally
    from postcopyd.demo.processes import Child

UNIT = "postcopyd.service"
PAGES_ADDRESS = f"{SOURCE_ADDRESS}:50051"
PATIENCE_S = 60.0
"""For what must come in the end; whatever takes longer is stuck."""

CONFIG = """
http = ""
transport = "native"
"""

Answer = TypeVar("Answer")


class DestinationHost(PrivateSystemd):
    """A PrivateSystemd with the daemon running."""

    def __init__(self, folder: Path, network: str) -> None:
        super().__init__(folder, {"postcopyd/postcopyd.toml": CONFIG}, network)

    async def start(self) -> None:
        await self.run("systemd-sysusers", "/etc/systemd/system/postcopyd.sysusers")
        await self.run("systemd-tmpfiles", "--create", "/etc/systemd/system/postcopyd.tmpfiles")
        await self.configure_daemon()
        await self.run("systemctl", "start", "postcopyd.socket", UNIT)

    async def configure_daemon(self, *lines: str) -> None:
        """The shipped unit, but for a shorter watchdog, with `lines`. Takes effect with the next start."""
        await self.configure(UNIT, "WatchdogSec=2", *lines)

    async def held(self) -> int:
        """Descriptors in the store."""
        return int((await self.properties(UNIT, "NFileDescriptorStore"))["NFileDescriptorStore"])

    async def call(self, action: Callable[[ControlClient], Awaitable[Answer]]) -> Answer:
        """Ask the daemon; again for as long as none answers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with ControlClient(f"/proc/{self.pid}/root/run/postcopyd/control.sock") as client:
                        return await action(client)
                except PostcopyError as error:
                    if error.code is not Code.CONTROL_UNREACHABLE:
                        raise
                await asyncio.sleep(0.02)

    async def until(self, id: str, wanted: Callable[[MigrationStatus], bool]) -> MigrationStatus:
        """Return the first status that is `wanted`. It is asked for again and again, as daemons come and go."""
        async with asyncio.timeout(PATIENCE_S):
            while not wanted(status := await self.call(lambda client: client.get(id))):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.02)
        return status


class Guest:
    """A guest that arrives: its VMM runs, its memory is at the source."""

    def __init__(self, host: DestinationHost, id: str, vmm: Child, ram: Path, registers: Path) -> None:
        self.id = id
        self._vmm = vmm
        self._one_at_a_time = asyncio.Lock()
        self._host = host
        self._ram = ram
        self._registers = registers

    @classmethod
    async def arrive(
        cls, host: DestinationHost, id: str, shape: tuple[str, ...], source: tuple[Path, Path], limits: Limits
    ) -> Guest:
        """`source`: the files of its memory and of its registers."""
        prepared = await host.call(lambda client: client.prepare(id, [PAGES_ADDRESS], limits=limits))
        vmm = await host.program(id, "postcopyd.vmm", "destination", *shape, "--socket", prepared.socket_path)
        guest = cls(host, id, vmm, *source)
        await vmm.line()
        await guest.command("load", path=str(guest._registers))
        await guest.command("start")
        return guest

    async def command(self, name: str, **arguments: object) -> dict[str, object]:
        """Tell the VMM; one thing at a time."""
        async with self._one_at_a_time:
            return await self._vmm.command(name, answer_within_s=PATIENCE_S * 2, **arguments)

    async def status(self) -> MigrationStatus:
        return await self._host.call(lambda client: client.get(self.id))

    async def until(self, wanted: Callable[[MigrationStatus], bool]) -> MigrationStatus:
        return await self._host.until(self.id, wanted)

    async def is_arriving(self) -> bool:
        """Whether it still needs the daemon."""
        return not (await self.status()).state.is_final

    async def longest_s(self) -> float:
        """How long a vCPU stood still at most since this was asked last."""
        return cast("float", (await self.command("stillness"))["longest_s"])

    async def finish(self, tally: Tally) -> None:
        """Let the rest of its memory come, at full rate, and judge."""
        with contextlib.suppress(PostcopyError):
            # It may have ended under an earlier process, which the one that lives knows nothing of.
            await self._host.call(lambda client: client.set_limits(self.id, Limits()))
        status = await self._ended()
        tally.migrations += 1
        if status is not None:
            tally.wrong_counts += status.pages_installed != status.pages_total
        tally.leaked_fds += await self._host.held()
        listed = await self._host.call(lambda client: client.list())
        tally.zombie_sessions += sum(not migration.state.is_final for migration in listed)
        await self._judge_memory(tally)
        await self._vmm.end()

    async def _ended(self) -> MigrationStatus | None:
        """Its last status; None if the daemon that served it to its end is gone."""
        try:
            return await self.until(lambda status: status.state.is_final)
        except PostcopyError as error:
            if error.code is not Code.MIGRATION_UNKNOWN:
                raise
            return None

    async def _judge_memory(self, tally: Tally) -> None:
        moved = await self.command("wait", steps=1000, timeout_s=PATIENCE_S)
        tally.stuck_vcpus += not moved["reached"]
        await self.command("pause")
        check = await self.command("check", ram=str(self._ram), state=str(self._registers))
        bad = cast("int", check["mismatched_pages"]) + cast("int", check["guest_errors"])
        tally.lost_bytes += 4096 * (bad + cast("int", check["source_mismatched_pages"]))
