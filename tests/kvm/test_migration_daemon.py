"""Running guests are moved through the real programs, alone and together, and every byte is checked."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import uvloop

from harness import PATIENCE_S, TRANSPORTS, Host
from postcopyd.config import WINDOW_BYTES
from postcopyd.demo.flow import DemoResult
from postcopyd.errors import Code
from postcopyd.status import Limits, State
from postcopyd.units import MIB, PAGE_SIZE
from support import require_kvm, require_uffd

if TYPE_CHECKING:
    from pathlib import Path

    from postcopyd.demo.processes import Child
    from postcopyd.vmm.state import GuestKind

REQUIRED_KEYS = {
    "guest", "faults", "transport", "memory_bytes", "page_size", "vcpus", "pages_total", "pages_installed",
    "pages_demand", "pages_pushed", "pages_zero", "mismatched_pages", "fault_latency_us", "vcpu_blocktime_us",
    "total_s", "completed", "source_released",
}  # fmt: skip


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


async def run_demo(*options: str) -> DemoResult:
    async with Host() as host:
        status, out, err = await host.cli("demo", "--memory", "64M", "--json", *options)
    assert status == 0, (out, err)
    assert json.loads(out).keys() >= REQUIRED_KEYS
    return msgspec.json.decode(out, type=DemoResult)


def check_demo(result: DemoResult, vcpus: int) -> None:
    assert (result.completed, result.source_released) == (True, True)
    assert (result.mismatched_pages, result.guest_errors) == (0, 0)
    assert (result.memory_bytes, result.page_size) == (64 * MIB, PAGE_SIZE)
    assert result.pages_total == result.pages_installed == 64 * MIB // PAGE_SIZE
    assert result.pages_demand + result.pages_pushed + result.pages_zero == result.pages_total
    assert 0 < result.pages_zero < result.pages_total
    assert len(result.vcpu_blocktime_us) == result.vcpus == vcpus
    latency = result.fault_latency_us
    assert 0 <= latency.p50 <= latency.p90 <= latency.p99 <= latency.max


@pytest.mark.parametrize(
    ("vcpus", "order", "transport"),
    [
        *((vcpus, order, "native") for vcpus in (1, 2, 8) for order in ("sequential", "random")),
        *((vcpus, "random", "grpcio") for vcpus in (1, 2, 8)),
    ],
)
async def test_a_running_kvm_guest_is_moved(vcpus: int, order: str, transport: str) -> None:
    require_kvm()
    require_uffd()
    result = await run_demo("--vcpus", str(vcpus), "--order", order, "--transport", transport)
    check_demo(result, vcpus)
    assert (result.guest, result.order, result.transport) == ("kvm", order, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_threads_of_a_process_are_moved(transport: str) -> None:
    require_uffd()
    result = await run_demo("--guest", "process", "--vcpus", "2", "--transport", transport)
    check_demo(result, 2)
    assert result.guest == "process"


async def test_a_limited_push_keeps_its_rate_and_the_guest_fetches_what_it_wants() -> None:
    """In the time it takes, the push alone could not have brought the memory."""
    require_kvm()
    require_uffd()
    rate = 2 * MIB
    result = await run_demo("--push-rate", str(rate))
    check_demo(result, 2)
    assert result.pages_pushed * PAGE_SIZE <= rate * result.total_s + WINDOW_BYTES
    assert result.pages_demand > 0
    assert result.fault_latency_us.count >= result.vcpus
    assert result.fault_latency_us.p50 > 0
    assert all(blocked > 0 for blocked in result.vcpu_blocktime_us)


@pytest.mark.parametrize(
    "options", [("--memory", "0"), ("--memory", "3"), ("--memory", "5000"), ("--push-rate", "fast")]
)
async def test_sizes_that_make_no_sense_are_refused(options: tuple[str, str]) -> None:
    async with Host() as host:
        status, out, err = await host.cli("demo", "--json", *options)
    assert (status, out) == (2, "")
    assert Code.ARGUMENT_INVALID in err


async def verdict(vmm: Child, ram: Path, registers: Path) -> dict[str, object]:
    """Pause the guest and compare every byte."""
    await vmm.command("wait", steps=1000, timeout_s=PATIENCE_S)
    await vmm.command("pause")
    return await vmm.command("check", PATIENCE_S, ram=str(ram), state=str(registers))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_three_guests_at_once_and_one_killed_half_way(guest: GuestKind, transport: str) -> None:
    """The victim's push is as good as off and its guest never touches the end of memory, so half-way is certain."""
    require_uffd()
    shape = ("--memory", "32M", "--vcpus", "2", "--order", "random", "--spare", "16M", "--guest", guest)
    async with Host() as host:
        ram, registers = await host.paused_source(*shape)
        _, source = await host.page_server(*(f"{id}={ram}" for id in ("warm", "a", "victim", "b")))
        daemon = await host.daemon(transport)
        # What gRPC makes once and keeps is there after this.
        await daemon.client.prepare("warm", [source])
        await daemon.client.cancel("warm")
        before = daemon.descriptors()
        vmms = {}
        for id, rate in (("a", 8 * MIB), ("victim", 1), ("b", 8 * MIB)):
            prepared = await daemon.client.prepare(id, [source], limits=Limits(push_rate=rate))
            vmms[id] = await host.destination(prepared.socket_path, registers, *shape)
        half_way = await daemon.until("victim", lambda status: status.pages_installed > 100)
        assert half_way.pages_installed < half_way.pages_total
        os.kill(vmms["victim"].process.pid, signal.SIGKILL)
        failed = await daemon.until("victim", lambda status: status.state.is_final)
        assert (failed.state, failed.error_code) == (State.FAILED, Code.VMM_GONE)
        assert failed.pages_installed < failed.pages_total
        for id in ("a", "b"):
            await daemon.client.set_limits(id, Limits())
            done = await daemon.until_state(id, State.COMPLETE)
            assert (done.source_released, done.error, done.bad_replies) == (True, "", 0)
            result = await verdict(vmms[id], ram, registers)
            assert (result["mismatched_pages"], result["guest_errors"]) == (0, 0)
            assert result["source_mismatched_pages"] == 0
        await daemon.until_descriptors(before)
