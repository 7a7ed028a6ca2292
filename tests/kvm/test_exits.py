"""Guests whose absent pages come as exits, moved by the real programs."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import uvloop

from harness import PATIENCE_S, DaemonProcess, Host
from postcopyd.demo.flow import DemoResult
from postcopyd.status import Limits, State
from postcopyd.units import MIB, PAGE_SIZE
from support import require_kvm, require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from postcopyd.demo.processes import Child

SHAPE = ("--memory", "16M", "--vcpus", "4", "--order", "random")
HELD = Limits(push_rate=1)
PAUSE_S = 5.0
"""A time-out, which a pause that had to wait for a page would reach."""


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(autouse=True)
def devices() -> None:
    require_kvm()
    require_uffd()


@pytest.mark.parametrize("vcpus", [1, 2, 8, 32])
async def test_exits_and_messages_together_bring_every_byte(vcpus: int) -> None:
    async with Host() as host:
        options = ("--faults", "exits", "--memory", "64M", "--vcpus", str(vcpus), "--push-rate", "64M")
        status, out, err = await host.cli("demo", "--json", *options)
    assert status == 0, (out, err)
    result = msgspec.json.decode(out, type=DemoResult)
    assert (result.faults, result.completed, result.source_released) == ("exits", True, True)
    assert (result.mismatched_pages, result.guest_errors) == (0, 0)
    assert result.pages_installed == result.pages_total == 64 * MIB // PAGE_SIZE
    assert result.faults_exits > 0
    assert result.faults_uffd > 0
    assert result.exits_by_shape["bare"] > 0
    assert len(result.vcpu_blocktime_us) == vcpus
    # The device's thread is no vCPU.
    assert result.other_blocktime_us > 0


@asynccontextmanager
async def waiting_guest() -> AsyncIterator[tuple[DaemonProcess, Child, Child, tuple[str, str]]]:
    """The daemon, a stopped page server, a guest all of whose vCPUs wait for it, and what to check it against."""
    async with Host() as host:
        ram, registers = await host.paused_source(*SHAPE)
        server, source = await host.page_server(f"guest={ram}")
        daemon = await host.daemon()
        prepared = await daemon.client.prepare("guest", [source], limits=HELD)
        vmm = await host.spawn(
            *("destination", "postcopyd.vmm", "destination", *SHAPE, "--faults", "exits"),
            *("--socket", prepared.socket_path),
        )
        await vmm.line()
        await vmm.command("load", path=str(registers))
        await daemon.until_state("guest", State.RUNNING)
        server.process.send_signal(signal.SIGSTOP)
        try:
            await vmm.command("start")
            # Every vCPU, and the device.
            await daemon.until("guest", lambda status: status.exits >= 4 and status.waiting >= 5)
            yield daemon, server, vmm, (str(ram), str(registers))
        finally:
            server.process.send_signal(signal.SIGCONT)


async def test_a_vcpu_that_waits_for_a_stalled_source_can_be_paused_and_goes_on() -> None:
    async with waiting_guest() as (daemon, server, vmm, (ram, registers)):
        await vmm.command("pause", timeout_s=PAUSE_S)
        paused = await vmm.command("status")
        assert phases(paused) == {"parked"}
        await vmm.command("start")
        # None of them came to anything: the source has not answered.
        assert (await daemon.client.get("guest")).waiting >= 5
        await vmm.command("pause", timeout_s=PAUSE_S)
        server.process.send_signal(signal.SIGCONT)
        await vmm.command("start")
        await daemon.client.set_limits("guest", Limits())
        await daemon.until_state("guest", State.COMPLETE)
        await vmm.command("wait", steps=1000, timeout_s=PATIENCE_S)
        await vmm.command("pause")
        check = await vmm.command("check", ram=ram, state=registers)
        assert (check["mismatched_pages"], check["guest_errors"]) == (0, 0)


def phases(answer: dict[str, Any]) -> set[str]:
    return {vcpu["phase"] for vcpu in answer["status"]["vcpus"]}


async def test_a_guest_that_waits_can_be_ended() -> None:
    async with waiting_guest() as (daemon, _, vmm, _):
        vmm.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await vmm.process.wait()
        ended = await daemon.until("guest", lambda status: status.state.is_final)
        assert ended.state is State.FAILED
