"""What a daemon costs: memory with a huge image attached, and CPU with a guest that waits."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import uvloop

from harness import TRANSPORTS, DaemonProcess, Host, LocalGuest, content_of
from postcopyd.status import Limits, State
from postcopyd.units import GIB, MIB, PAGE_SIZE
from scripted_source import ScriptedSource

TIB = 1024 * GIB
RSS_LIMIT = 80 * MIB
# Of 100 a second: a loop that polls takes most of them. A slow host has been seen to take 3 for two reconnections.
TICKS_LIMIT = 6
SWITCHES_LIMIT = 10
WINDOW_S = 1.0


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_tebibyte_costs_two_bits_a_page_and_little_else(transport: str) -> None:
    """64 MiB of real data lie in a sparse image, a mebibyte in every 16 GiB. All that was ever resident counts."""
    chunk = content_of(256)
    places = range(0, TIB, 16 * GIB)
    async with Host() as host:
        image = host.folder / "sparse"
        with image.open("wb") as file:
            for place in places:
                file.seek(place)
                file.write(chunk)
            file.truncate(TIB)
        _, source = await host.page_server(f"vm={image}")
        daemon = await host.daemon(transport, http="127.0.0.1:0")
        prepared = await daemon.client.prepare("vm", [source])
        async with LocalGuest(TIB) as guest:
            await guest.hand_off(prepared.socket_path)
            done = await daemon.until_state("vm", State.COMPLETE)
            for place in places:
                assert await guest.reading(place, len(chunk)) == chunk
                assert await guest.reading(place + len(chunk)) == bytes(PAGE_SIZE)
        ledger_bytes = done.pages_total // 4
        assert done.pages_installed == done.pages_total == TIB // PAGE_SIZE
        assert done.pages_demand + done.pages_pushed + done.pages_zero == done.pages_total
        assert daemon.memory_bytes("VmHWM") - ledger_bytes < RSS_LIMIT
        # And the ledger goes with its migration.
        assert daemon.memory_bytes("VmRSS") < RSS_LIMIT


def cpu_ticks(daemon: DaemonProcess) -> int:
    """User and system time so far. Source: proc_pid_stat(5)."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def switches(daemon: DaemonProcess) -> int:
    """How often its event loop went to sleep so far; gRPC's own threads wake now and then."""
    status = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return int(found.split()[1])


async def assert_idle(daemon: DaemonProcess) -> None:
    ticks, slept = cpu_ticks(daemon), switches(daemon)
    await asyncio.sleep(WINDOW_S)
    assert cpu_ticks(daemon) - ticks <= TICKS_LIMIT
    assert switches(daemon) - slept <= SWITCHES_LIMIT


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_parked_guest_costs_no_cpu_while_its_source_takes_its_time(transport: str) -> None:
    content = content_of(64)
    async with Host() as host, ScriptedSource(content) as source, LocalGuest(len(content)) as guest:
        source.script = source.silent
        daemon = await host.daemon(transport, silent_after_s="3600")
        prepared = await daemon.client.prepare("vm", [source.address], limits=Limits(push_rate=1))
        await guest.hand_off(prepared.socket_path)
        reading = [guest.reading(page * PAGE_SIZE) for page in range(0, 12, 4)]
        await daemon.until("vm", lambda status: status.waiting == len(reading))
        await assert_idle(daemon)
        parked = await daemon.client.get("vm")
        assert (parked.state, parked.waiting) == (State.RUNNING, len(reading))
        assert not any(page.done() for page in reading)
        source.script = source.right
        # Lost with its streams, what was asked for is asked for again.
        await source.stop()
        await source.start()
        await daemon.client.set_limits("vm", Limits())
        assert await guest.read_all() == content
        await daemon.until_state("vm", State.COMPLETE)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_parked_guest_costs_no_cpu_while_its_source_is_gone(transport: str) -> None:
    content = content_of(64)
    async with Host() as host, LocalGuest(len(content)) as guest:
        image = host.image("image", content)
        server, source = await host.page_server(f"vm={image}")
        daemon = await host.daemon(transport, silent_after_s="0.2", connect_timeout_s="0.5")
        prepared = await daemon.client.prepare("vm", [source])
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            await guest.hand_off(prepared.socket_path)
            reading = guest.reading()
            await daemon.until("vm", lambda now: now.state is State.RECOVERING and now.reconnects >= 4)
            await assert_idle(daemon)
            assert not reading.done()
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        assert await guest.read_all() == content
        await daemon.until_state("vm", State.COMPLETE)
