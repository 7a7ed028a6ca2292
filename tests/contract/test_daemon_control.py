"""The life of migrations in a real daemon, as an operator sees and steers it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from harness import PATIENCE_S, TRANSPORTS, DaemonProcess, Host, LocalGuest, content_of
from postcopyd.errors import Code, PostcopyError
from postcopyd.status import Limits, State
from scripted_source import ScriptedSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

PAGES = 256
CONTENT = content_of(PAGES)
SLOW = Limits(push_rate=1)
VMM_SHAPE = ("--memory", "4M", "--spare", "2M", "--guest", "process")


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with Host() as host:
        yield host


@pytest.fixture
async def source(host: Host) -> str:
    image = host.image("image", CONTENT)
    return (await host.page_server(f"vm={image}", f"other={image}", options=("--keep",)))[1]


@pytest.fixture
async def daemon(host: Host) -> DaemonProcess:
    return await host.daemon()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_sigterm_waits_for_the_guest_that_needs_the_daemon(host: Host, transport: str) -> None:
    daemon = await host.daemon(transport)
    async with ScriptedSource(CONTENT) as source, LocalGuest(len(CONTENT)) as guest:
        source.script = source.silent
        prepared = await daemon.client.prepare("vm", [source.address])
        await guest.hand_off(prepared.socket_path)
        first = guest.reading()
        await daemon.until("vm", lambda status: status.waiting == 1)
        os.kill(daemon.pid, signal.SIGTERM)
        # It takes nothing new from then on; before, this source has no such image.
        async with asyncio.timeout(PATIENCE_S):
            while (
                await refused_by(daemon.client.prepare("other", [source.address]))
                is not Code.MIGRATION_EXISTS
            ):
                pass
        assert not (await daemon.client.get("vm")).state.is_final
        assert not first.done()
        source.script = source.right
        # What was asked for in the silence is asked for again over new streams.
        await source.stop()
        await source.start()
        assert await guest.read_all() == CONTENT
        async with asyncio.timeout(PATIENCE_S):
            assert await daemon.child.process.wait() == 0
        assert len(source.completed) == 1


async def refused_by(call: Awaitable[object]) -> Code:
    with pytest.raises(PostcopyError) as caught:
        await call
    return caught.value.code


async def test_sigterm_ends_a_daemon_that_nobody_needs(daemon: DaemonProcess, source: str) -> None:
    """A migration that is only prepared has no guest yet."""
    prepared = await daemon.client.prepare("vm", [source])
    os.kill(daemon.pid, signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await daemon.child.process.wait() == 0
    left = {
        str(path) for path in await asyncio.to_thread(lambda: list(Path(daemon.control).parent.rglob("*")))
    }
    assert not left & {prepared.socket_path, daemon.control}


async def test_cancel_before_handoff_frees_socket_and_id(daemon: DaemonProcess, source: str) -> None:
    prepared = await daemon.client.prepare("vm", [source])
    assert await refused_by(daemon.client.prepare("vm", [source])) is Code.MIGRATION_EXISTS
    assert (await daemon.client.cancel("vm")).state is State.CANCELLED
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):
        sock.connect(prepared.socket_path)
    again = await daemon.client.prepare("vm", [source])
    assert again.socket_path == prepared.socket_path
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(again.socket_path)
        assert await guest.read_all() == CONTENT


async def test_cancel_after_handoff_is_refused_and_harms_nothing(host: Host, daemon: DaemonProcess) -> None:
    ram, registers = await host.paused_source(*VMM_SHAPE)
    _, source = await host.page_server(f"vm={ram}")
    prepared = await daemon.client.prepare("vm", [source], limits=SLOW)
    vmm = await host.destination(prepared.socket_path, registers, *VMM_SHAPE)
    assert await refused_by(daemon.client.cancel("vm")) is Code.MIGRATION_UNFINISHED
    await daemon.client.set_limits("vm", Limits())
    await daemon.until_state("vm", State.COMPLETE)
    await vmm.command("pause")
    result = await vmm.command("check", ram=str(ram), state=str(registers))
    assert (result["mismatched_pages"], result["guest_errors"]) == (0, 0)


async def test_cancel_with_force_ends_the_vmm(host: Host, daemon: DaemonProcess) -> None:
    ram, registers = await host.paused_source(*VMM_SHAPE)
    _, source = await host.page_server(f"vm={ram}")
    # What gRPC makes once and keeps is there after this.
    await daemon.client.prepare("vm", [source])
    await daemon.client.cancel("vm")
    before = daemon.descriptors()
    prepared = await daemon.client.prepare("vm", [source], limits=SLOW)
    vmm = await host.destination(prepared.socket_path, registers, *VMM_SHAPE)
    cancelled = await daemon.client.cancel("vm", force=True)
    assert (cancelled.state, cancelled.error_code) == (State.CANCELLED, Code.MIGRATION_CANCELLED)
    assert await vmm.process.wait() == -signal.SIGKILL
    assert cancelled.vmm_pid == vmm.process.pid
    await daemon.until_descriptors(before)


async def test_watch_ends_with_the_final_state(daemon: DaemonProcess, source: str) -> None:
    prepared = await daemon.client.prepare("vm", [source], limits=SLOW)
    async with LocalGuest(len(CONTENT)) as guest:
        states: list[State] = []

        async def watch() -> None:
            async for status in daemon.client.watch("vm", interval_s=0.01):
                if not states or states[-1] is not status.state:
                    states.append(status.state)

        watching = asyncio.create_task(watch())
        await daemon.until_state("vm", State.PREPARED)
        await guest.hand_off(prepared.socket_path)
        await daemon.until_state("vm", State.RUNNING)
        await daemon.client.set_limits("vm", Limits())
        async with asyncio.timeout(PATIENCE_S):
            await watching
    assert states[-1] is State.COMPLETE
    assert State.FAILED not in states


async def test_the_command_line_tells_programs_what_is_going_on(
    host: Host, daemon: DaemonProcess, source: str
) -> None:
    control = ("--control", daemon.control)
    prepared = await host.cli_json("prepare", "vm", "--source", source, "--push-rate", "1", *control)
    assert prepared["state"] == "prepared"
    watching = asyncio.create_task(host.cli("watch", "vm", "--json", *control))
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(str(prepared["socket_path"]))
        await daemon.until_state("vm", State.RUNNING)
        shown = await host.cli_json("show", "vm", *control)
        assert (shown["state"], shown["vmm_pid"], shown["source_in_use"]) == ("running", os.getpid(), source)
        status, out, err = await host.cli("list", "--json", *control)
        assert (status, [entry["id"] for entry in json.loads(out)]) == (0, ["vm"]), err
        status, out, err = await host.cli("cancel", "vm", *control)
        assert (status, out) == (6, "")
        assert Code.MIGRATION_UNFINISHED in err
        limits = await host.cli_json("set-limits", "vm", "--push-rate", "0", *control)
        assert limits["limits"] == {"push_rate": 0, "weight": 100}
        status, out, err = await watching
        assert status == 0, (status, err)
    last = json.loads(out.splitlines()[-1])
    assert (last["state"], last["pages_installed"], last["source_released"]) == ("complete", PAGES, False)
    status, _, err = await host.cli("show", "nobody", "--json", *control)
    assert status == 6
    assert Code.MIGRATION_UNKNOWN in err


async def test_watch_fails_with_the_reason_of_the_migration(
    host: Host, daemon: DaemonProcess, source: str
) -> None:
    control = ("--control", daemon.control)
    await daemon.client.prepare("vm", [source])
    watching = asyncio.create_task(host.cli("watch", "vm", "--json", *control))
    # Cancelled whenever the watch begins, the last line says so.
    await host.cli_json("cancel", "vm", *control)
    status, out, err = await watching
    assert (status, json.loads(out.splitlines()[-1])["state"]) == (6, "cancelled")
    assert Code.MIGRATION_CANCELLED in err


@pytest.mark.parametrize(
    ("image", "options", "code"),
    [
        ("vm", ("--source", "127.0.0.1:1"), Code.SOURCE_UNREACHABLE),
        ("nobody", (), Code.SOURCE_UNKNOWN_IMAGE),
        ("vm", ("--epoch", "1"), Code.SOURCE_OTHER_EPOCH),
    ],
    ids=["unreachable", "unknown image", "another epoch"],
)
async def test_prepare_names_what_is_wrong_with_its_source(
    host: Host, daemon: DaemonProcess, source: str, image: str, options: tuple[str, ...], code: Code
) -> None:
    where = () if "--source" in options else ("--source", source)
    status, out, err = await host.cli("prepare", image, *where, *options, "--control", daemon.control)
    assert (status, out) == (4, "")
    assert code in err
    assert await daemon.client.list() == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--push-rate", "3x"), ("--push-rate", "-1"), ("--epoch", "soon"), ("--source", "nowhere")],
)
async def test_arguments_that_make_no_sense_are_refused(
    host: Host, tmp_path: Path, option: str, value: str
) -> None:
    args = ("prepare", "vm", "--source", "127.0.0.1:1", option, value, "--control", str(tmp_path / "none"))
    status, out, err = await host.cli(*args)
    assert (status, out) == (2, "")
    assert Code.ARGUMENT_INVALID in err


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no_such_key = 1", Code.CONFIG_INVALID),
        ('max_migrations = "many"', Code.CONFIG_INVALID),
        ("= no TOML", Code.CONFIG_INVALID),
        (None, Code.CONFIG_UNREADABLE),
    ],
)
async def test_a_daemon_does_not_start_with_a_configuration_that_is_wrong(
    host: Host, text: str | None, code: Code
) -> None:
    path = host.folder / "postcopyd.toml"
    if text is not None:
        path.write_text(text)
    status, _, err = await host.cli("run", "--config", str(path), "--state-dir", str(host.folder / "s"))
    assert status == 2
    assert code in err
    assert not (host.folder / "s").exists()
