"""Guests of real QEMUs are moved, and whatever goes wrong leaves them where they can live."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from postcopyd.errors import Code, MigrationError, PostcopyError
from postcopyd.qemu.preload import environment
from postcopyd.qemu.qmp import Machine
from postcopyd.status import Limits, State
from postcopyd.units import MIB
from qemu_support import SLOW, WALKED, Pair, page_servers, pair, require_qemu

if TYPE_CHECKING:
    from postcopyd.qemu.guests.vm import GuestVm


@pytest.fixture(autouse=True)
def _qemu() -> None:
    require_qemu()


def kill(vm: GuestVm) -> None:
    os.kill(vm.process.pid, signal.SIGKILL)


async def test_a_running_guest_goes_on_at_the_destination() -> None:
    async with pair() as it:
        source, destination = await it.source(), await it.destination()
        report = await it.move()
        await it.assert_lives(destination)
        await source.end()
        assert source.process.returncode == 0, "the source was told to quit"
        assert report.pages_total == it.guest.memory_bytes // 4096
        assert report.downtime_ms > 0
        assert report.faults > 0
        status = await it.postcopyd.client.get("vm")
        assert status.state is State.COMPLETE


async def test_a_paused_guest_stays_paused() -> None:
    async with pair() as it:
        source, destination = await it.source(), await it.destination()
        await it.ask(source, "stop")
        report = await it.move()
        assert report.downtime_ms == 0
        assert (await it.ask(destination, "query-status"))["status"] == "paused"  # type: ignore[index]
        assert destination.rounds == 0
        await it.ask(destination, "cont")
        await it.assert_lives(destination)


async def test_memory_in_several_files_moves_as_several_migrations() -> None:
    async with pair() as it:
        rams = {
            f"{side}{n}": it.folder / f"{side}-ram{n}" for side in ("source", "destination") for n in (0, 1)
        }
        half = it.guest.memory_bytes // 2
        sockets = [str(it.folder / f"gate{n}.sock") for n in (0, 1)]

        def numa(side: str) -> tuple[str, ...]:
            return tuple(
                part
                for n in (0, 1)
                for part in (
                    *(
                        "-object",
                        f"memory-backend-file,id=m{n},size={half},mem-path={rams[f'{side}{n}']},share=on",
                    ),
                    *("-numa", f"node,memdev=m{n}"),
                )
            )

        files = ",".join(str(rams[f"destination{n}"]) for n in (0, 1))
        variables = environment(files, ",".join(sockets), wait=True)
        it.source_vm = await it.vm("source", extra=numa("source"))
        it.destination_vm = await it.vm(
            "destination", extra=numa("destination"), incoming="defer", variables=variables
        )
        await it.source_vm.until_rounds(1)
        report = await it.move()
        assert report.migrations == ["vm.m0", "vm.m1"]
        await it.assert_lives(it.destination_vm)


async def test_a_dry_run_says_what_would_be_done_and_does_nothing() -> None:
    async with pair() as it:
        source, destination = await it.source(), await it.destination()
        status, out, err = await it.host.cli(
            *("qemu", "migrate", "--source-qmp", source.qmp, "--destination-qmp", destination.qmp),
            *("--control", it.postcopyd.control, "--dry-run"),
        )
        assert (status, err) == (0, "")
        assert "stop the source's vCPUs" in out
        assert await it.postcopyd.client.list() == []
        assert (await it.ask(destination, "query-status"))["status"] == "inmigrate"  # type: ignore[index]
        await it.assert_lives(source)


@pytest.mark.parametrize(
    ("source", "destination", "code"),
    [
        ({}, {"shim": False}, Code.QEMU_NO_SHIM),
        ({}, {"extra": ("-machine", "q35,memory-backend=ram0")}, Code.QEMU_DIFFERENT),
        ({}, {"incoming": "", "shim": False}, Code.QEMU_STATE),
        ({}, {"vcpus": 2}, Code.QEMU_DIFFERENT),
    ],
    ids=["no shim", "another machine type", "running already", "another number of vCPUs"],
)
async def test_what_cannot_work_is_refused_and_the_source_runs_on(
    source: dict[str, Any], destination: dict[str, Any], code: Code
) -> None:
    async with pair() as it:
        await it.source(**source)
        await it.destination(**destination)
        with pytest.raises(MigrationError) as refused:
            await it.move()
        assert refused.value.code is code
        await it.assert_lives(it.source_vm)


async def test_a_source_whose_memory_is_its_own_is_refused() -> None:
    async with pair() as it:
        it.source_vm = await it.vm("source")
        await it.destination()
        with pytest.raises(MigrationError, match="share=on") as refused:
            await it.move()
        assert refused.value.code is Code.QEMU_UNSUITABLE


async def test_a_page_server_that_dies_before_the_switch_over_leaves_the_source_running() -> None:
    async with pair() as it:
        await it.source()
        await it.destination()

        def at(line: str) -> None:
            if line.startswith("page server"):
                os.kill(it.migration._server.pid, signal.SIGKILL)  # type: ignore[union-attr]

        with pytest.raises(PostcopyError, match="goes on as before"):
            await it.move(at)
        await it.assert_lives(it.source_vm)


async def test_a_destination_that_dies_at_the_switch_over_leaves_the_source_running() -> None:
    async with pair() as it:
        await it.source()
        await it.destination()
        with pytest.raises(MigrationError, match="goes on as before") as failed:
            await it.move(lambda line: kill(it.destination_vm) if line == "source: stopped" else None)
        assert failed.value.code is Code.QEMU_GONE
        await it.assert_lives(it.source_vm)


async def test_a_destination_that_dies_with_all_of_the_memory_handed_over_leaves_the_source_running() -> None:
    async with pair() as it:
        await it.source()
        await it.destination()
        with pytest.raises(MigrationError, match="goes on as before"):
            await it.move(lambda line: kill(it.destination_vm) if "handed over" in line else None)
        await it.assert_lives(it.source_vm)


async def test_after_a_failed_attempt_the_next_one_succeeds() -> None:
    async with pair() as it:
        await it.source()
        first = await it.destination()
        with pytest.raises(MigrationError):
            await it.move(lambda line: kill(it.destination_vm) if line == "source: stopped" else None)
        await first.end()
        (it.folder / "destination-ram").unlink()
        (it.folder / "destination").rename(it.folder / "first")
        second = await it.destination()
        await it.move()
        await it.assert_lives(second)


async def test_a_source_that_dies_at_the_switch_over_is_named() -> None:
    async with pair() as it:
        await it.source()
        await it.destination()
        with pytest.raises(MigrationError, match="the source QEMU ended"):
            await it.move(lambda line: kill(it.source_vm) if line == "source: stopped" else None)
        assert page_servers(it.folder) == [], "nobody needs it any more"


async def half_way(it: Pair) -> asyncio.Task[object]:
    """The guest is at the destination, most of its memory is not, and comes slowly."""
    await it.source()
    await it.destination()
    there = asyncio.Event()
    moving: asyncio.Task[object] = asyncio.ensure_future(
        it.move(lambda line: there.set() if "has the guest" in line else None, SLOW, keep_source=True)
    )
    waiting = asyncio.ensure_future(there.wait())
    await asyncio.wait({moving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    assert not moving.done()
    return moving


async def test_a_page_server_that_dies_half_way_is_started_again() -> None:
    async with pair() as it:
        moving = await half_way(it)
        server = it.migration._server
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        await it.postcopyd.until("vm", lambda status: status.reconnects > 0 and status.state is State.RUNNING)
        await it.postcopyd.client.set_limits("vm", Limits())
        await moving
        await it.assert_lives(it.destination_vm)


async def test_a_source_that_dies_half_way_costs_nothing() -> None:
    async with pair() as it:
        moving = await half_way(it)
        kill(it.source_vm)
        await it.postcopyd.client.set_limits("vm", Limits())
        await moving
        await it.assert_lives(it.destination_vm)


async def test_a_destination_that_dies_half_way_leaves_the_source_to_be_taken_up() -> None:
    async with pair() as it:
        moving = await half_way(it)
        kill(it.destination_vm)
        with pytest.raises(PostcopyError, match="paused, as it was at the switch-over") as failed:
            await moving
        assert failed.value.code is Code.VMM_GONE
        await it.ask(it.source_vm, "cont")
        await it.assert_lives(it.source_vm)


async def test_an_interrupt_half_way_leaves_guest_and_page_server_alive_and_says_so() -> None:
    async with pair() as it:
        moving = await half_way(it)
        server = it.migration._server
        assert server is not None
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        try:
            assert f"pid {server.pid}" in it.lines[-1]
            assert "postcopyd serve" in it.lines[-1]
            await it.postcopyd.client.set_limits("vm", Limits())
            await it.postcopyd.until_state("vm", State.COMPLETE)
            await it.assert_lives(it.destination_vm)
        finally:
            await server.end()


async def test_a_guests_walk_notices_a_page_that_is_not_as_it_was_left() -> None:
    """The other tests stand on the guest's word: here it must say that something is wrong."""
    async with pair() as it:
        source = await it.source()
        async with await Machine.connect("source", source.qmp) as machine:
            await machine.execute("stop")
            with (it.folder / "source-ram").open("r+b") as ram:
                ram.seek(MIB + WALKED // 2)
                ram.write(bytes(4096))
            await machine.execute("cont")
        rounds = source.rounds
        await source.until_rounds(rounds + 2)
        assert source.wrong == 1
