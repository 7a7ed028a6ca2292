"""The command line as scripts see it: output, errors and exit status, before a daemon without sessions."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fake_manager import FakeManager
from postcopyd import __version__
from postcopyd.cli import COMMANDS, main
from postcopyd.cli.daemon import run
from postcopyd.control.server import ControlServer
from postcopyd.entry import RUN_OPTIONS, plain_run
from postcopyd.errors import Code, InvariantError
from postcopyd.status import Limits, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from postcopyd.config import DaemonConfig


class Daemon(NamedTuple):
    manager: FakeManager
    path: str

    async def run(self, *args: str) -> tuple[int, str, str]:
        """Run a command in a process of its own; return (exit status, stdout, stderr)."""
        process = await self.started(*args)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def started(self, *args: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "postcopyd", *args, "--control", self.path, stdout=-1, stderr=-1
        )


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    manager = FakeManager()
    async with ControlServer(manager, str(tmp_path / "c.sock")) as server:
        yield Daemon(manager, server.path)


async def test_prepare_prints_the_socket_alone(daemon: Daemon) -> None:
    assert await daemon.run("prepare", "vm-1", "--source", "a:1") == (0, "/run/postcopyd/vm-1.sock\n", "")


async def test_prepare_passes_everything_on(daemon: Daemon) -> None:
    args = [
        "prepare",
        "vm-1",
        "--source",
        "a:1",
        "--source",
        "[::1]:2",
        "--socket",
        "/tmp/s",
        "--push-rate",
        "2M",
        "--epoch",
        "0xff",
        "--json",
    ]
    status, out, _ = await daemon.run(*args)
    spec = daemon.manager.specs[0]
    assert status == 0
    assert (spec.sources, spec.socket_path, spec.epoch) == (("a:1", "[::1]:2"), "/tmp/s", 255)
    assert spec.limits.push_rate == 2 << 20
    assert json.loads(out)["socket_path"] == "/tmp/s"


async def test_list_and_show(daemon: Daemon) -> None:
    assert json.loads((await daemon.run("list", "--json"))[1]) == []
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    daemon.manager.change("vm-1", state=State.RUNNING, pages_total=200, pages_installed=50, faults=9)
    listed = json.loads((await daemon.run("list", "--json"))[1])
    assert [(entry["id"], entry["state"]) for entry in listed] == [("vm-1", "running")]
    table = (await daemon.run("list"))[1].splitlines()
    assert table[0].split()[:2] == ["ID", "STATE"]
    assert table[1].split()[:4] == ["vm-1", "running", "25.0", "%"]
    assert json.loads((await daemon.run("show", "vm-1", "--json"))[1])["faults"] == 9
    details = dict(
        line.split(maxsplit=1)
        for line in (await daemon.run("show", "vm-1"))[1].splitlines()
        if " " in line.strip()
    )
    assert details["pages_installed"].strip() == "50"


async def test_json_has_no_field_that_the_protocol_does_not_carry(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    assert "pages_requested" not in json.loads((await daemon.run("show", "vm-1", "--json"))[1])


async def test_watch_prints_one_object_a_line_and_ends_with_the_migration(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    process = await daemon.started("watch", "vm-1", "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["state"] == "prepared"
    daemon.manager.change("vm-1", state=State.COMPLETE)
    assert json.loads(await process.stdout.readline())["state"] == "complete"
    assert await process.wait() == 0


async def test_watch_of_a_failure_ends_with_its_exit_status(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    daemon.manager.change(
        "vm-1", state=State.FAILED, error_code=Code.SOURCE_OTHER_EPOCH, error="other \x1b[2Jimage"
    )
    status, out, err = await daemon.run("watch", "vm-1")
    assert status == 4
    assert err == "postcopyd: error: other ?[2Jimage [source.other_epoch]\n", (
        "control characters reach the terminal"
    )
    assert "\x1b" not in out


async def test_watch_of_a_cancelled_migration_is_no_success(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    daemon.manager.change("vm-1", state=State.CANCELLED)
    status, _, err = await daemon.run("watch", "vm-1")
    assert (status, err) == (6, "postcopyd: error: vm-1 ended cancelled [migration.cancelled]\n")


async def test_cancel_needs_force_while_pages_are_missing(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1")
    daemon.manager.change("vm-1", state=State.RUNNING)
    status, _, err = await daemon.run("cancel", "vm-1")
    assert status == 6
    assert "[migration.unfinished]" in err
    assert await daemon.run("cancel", "vm-1", "--force") == (0, "vm-1 cancelled\n", "")


async def test_set_limits_leaves_alone_what_is_not_named(daemon: Daemon) -> None:
    await daemon.run("prepare", "vm-1", "--source", "a:1", "--push-rate", "1M")
    await daemon.run("set-limits", "vm-1", "--weight", "7")
    assert daemon.manager.get("vm-1").limits == Limits(1 << 20, 7)
    await daemon.run("set-limits", "vm-1", "--push-rate", "0")
    assert daemon.manager.get("vm-1").limits == Limits(0, 7)
    assert (await daemon.run("set-limits", "vm-1"))[0] == 2


async def test_an_unknown_migration_is_one_line_on_stderr(daemon: Daemon) -> None:
    expected = "postcopyd: error: there is no migration vm-9 [migration.unknown]\n"
    for command in ("show", "watch", "cancel"):
        assert await daemon.run(command, "vm-9") == (6, "", expected)


def test_without_a_daemon_the_error_says_where_it_was_sought(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--control", str(tmp_path / "absent.sock")]) == 2
    error = capsys.readouterr().err
    assert "absent.sock" in error
    assert error.count("\n") == 1
    assert error.rstrip().endswith("[control.unreachable]")


@pytest.mark.parametrize(
    "command",
    [
        "prepare ../x --source a:1",
        "prepare x --source a",
        "prepare x --source a:1 --push-rate fast",
        "prepare x --source a:1 --socket relative",
        "prepare x --source a:1 --epoch 0x1ffffffffffffffff",
        "prepare x --source a:1 --epoch seven",
        "show " + "x" * 129,
        "list --control relative",
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_asked(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("postcopyd: error: ")
    assert captured.err.endswith("[argument.invalid]\n")
    assert captured.out == ""


@pytest.mark.parametrize("args", [["prepare", "x"], ["nonsense"], ["set-limits", "x", "--weight", "0"], []])
def test_wrong_usage_has_exit_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert "Usage: postcopyd" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: DaemonConfig, arguments: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "postcopyd.daemon", fake_daemon(broken))
    with pytest.raises(ZeroDivisionError):
        main(["run"])


def test_run_gives_the_daemon_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def run_daemon(config: DaemonConfig, arguments: list[str]) -> None:
        seen.append((config, arguments))

    monkeypatch.setitem(sys.modules, "postcopyd.daemon", fake_daemon(run_daemon))
    path = tmp_path / "c.toml"
    path.write_text('max_migrations = 3\nstate_dir = "/x"')
    assert main(["run", "--config", str(path), "--state-dir", "/y"]) == 0
    assert [(c.max_migrations, c.state_dir, c.control) for c, _ in seen] == [(3, "/y", "/y/control.sock")]
    assert [plain_run(arguments) for _, arguments in seen] == [{"config_path": str(path), "state_dir": "/y"}]


def test_a_daemon_that_cannot_go_on_gives_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run_daemon(config: DaemonConfig, arguments: list[str]) -> None:
        raise InvariantError("two and two are five")

    monkeypatch.setitem(sys.modules, "postcopyd.daemon", fake_daemon(run_daemon))
    assert main(["run"]) == 70
    assert capsys.readouterr().err.endswith("postcopyd: error: two and two are five [internal.invariant]\n")


def fake_daemon(run_daemon: object) -> types.ModuleType:
    module = types.ModuleType("postcopyd.daemon")
    module.__dict__["run_daemon"] = run_daemon
    return module


def test_a_missing_configuration_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "/nonexistent/p.toml"]) == 2
    assert capsys.readouterr().err.endswith("[config.unreadable]\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"postcopyd {__version__}\n"


def test_help_names_every_command_without_importing_what_they_need() -> None:
    code = (
        "import sys; from postcopyd.cli import main; main(['--help'])\n"
        "print([m for m in ('grpc', 'aiohttp', 'rich', 'prometheus_client', 'uvloop') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert out.endswith("[]\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "postcopyd", "--help"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["run"], {}),
        (["run", "--config", "a.toml", "--control=/c"], {"config_path": "a.toml", "control": "/c"}),
        (["run", "--state-dir", "/s"], {"state_dir": "/s"}),
        (["run", "--help"], None),
        (["run", "--config"], None),
        (["run", "--config", "--control"], None),
        (["run", "extra"], None),
        (["list"], None),
        ([], None),
    ],
)
def test_only_a_plain_run_goes_the_short_way(args: list[str], options: dict[str, str] | None) -> None:
    assert plain_run(args) == options


def test_the_short_way_knows_every_option_of_run() -> None:
    named = {option.opts[0]: option.name for option in run.params}
    assert named == RUN_OPTIONS


def test_a_daemon_serves_its_guests_before_it_loads_what_they_do_not_need() -> None:
    """Each of these takes longer to load than a restart should last."""
    code = "import sys, postcopyd.launch, postcopyd.daemon, postcopyd.transport.native; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"grpc", "click", "aiohttp", "prometheus_client", "rich"} & set(loaded)
