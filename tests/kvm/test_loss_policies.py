"""A source that does not come back: the guest waits, or is told, or ended, as was agreed. Never does it read zeros."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, DaemonProcess, Host
from postcopyd.errors import Code
from postcopyd.status import Limits, MigrationStatus, OnLoss, State
from postcopyd.units import PAGE_SIZE
from support import require_kvm, require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from postcopyd.demo.processes import Child

SHAPE = ("--memory", "16M", "--vcpus", "2", "--order", "random")
RETRY_FOR_S = 0.2


@dataclass
class Abandoned:
    """A guest whose source died when it had some of its memory."""

    host: Host
    daemon: DaemonProcess
    vmm: Child
    address: str
    ram: Path
    registers: Path

    async def until(self, code: Code) -> MigrationStatus:
        return await self.daemon.until("vm", lambda status: status.error_code == code)

    async def phase(self) -> dict[str, object]:
        answer = (await self.vmm.command("status"))["status"]
        assert isinstance(answer, dict)
        return answer


async def abandoned(host: Host, policy: OnLoss) -> Abandoned:
    require_kvm()
    require_uffd()
    ram, registers = await host.paused_source(*SHAPE)
    source, address = await host.page_server(f"vm={ram}")
    daemon = await host.daemon()
    # Most of the memory stays away: the guest is stopped by the first page that it has not.
    prepared = await daemon.client.prepare(
        "vm", [address], limits=Limits(push_rate=PAGE_SIZE), retry_for_s=RETRY_FOR_S, on_loss=policy
    )
    source.process.kill()
    await source.process.wait()
    vmm = await host.destination(prepared.socket_path, registers, *SHAPE)
    return Abandoned(host, daemon, vmm, address, ram, registers)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Host())


async def test_held_the_guest_waits_and_goes_on_when_the_source_is_back(host: Host) -> None:
    guest = await abandoned(host, OnLoss.HOLD)
    status = await guest.daemon.until("vm", lambda status: "given_up" in status.error_code)
    assert status.state is State.RECOVERING
    assert (await guest.phase())["phase"] == "running"
    await host.page_server(f"vm={guest.ram}", listen=guest.address)
    await guest.daemon.client.set_limits("vm", Limits())
    await guest.daemon.until_state("vm", State.COMPLETE)
    await guest.vmm.command("wait", steps=100, timeout_s=PATIENCE_S)
    await guest.vmm.command("pause")
    check = await guest.vmm.command("check", ram=str(guest.ram), state=str(guest.registers))
    assert (check["mismatched_pages"], check["source_mismatched_pages"], check["guest_errors"]) == (0, 0, 0)


async def test_poisoned_memory_ends_a_vmm_that_has_no_answer_to_memory_errors(host: Host) -> None:
    guest = await abandoned(host, OnLoss.POISON)
    status = await guest.daemon.until_state("vm", State.FAILED)
    assert status.error_code == Code.SOURCE_GIVEN_UP
    async with asyncio.timeout(PATIENCE_S):
        assert await guest.vmm.process.wait() == -signal.SIGBUS


async def test_killed_the_vmm_ends_and_the_reason_is_told(host: Host) -> None:
    guest = await abandoned(host, OnLoss.KILL)
    status = await guest.daemon.until_state("vm", State.FAILED)
    assert status.error_code == Code.SOURCE_GIVEN_UP
    async with asyncio.timeout(PATIENCE_S):
        assert await guest.vmm.process.wait() == -signal.SIGKILL
