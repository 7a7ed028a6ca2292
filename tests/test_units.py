"""The systemd units and the files beside them, judged by systemd's own tools."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from postcopyd.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
UNITS = sorted((ROOT / "systemd").glob("*.s[eo][rc][vk]*"))
SERVICES = [path for path in UNITS if path.suffix == ".service"]
# On systemd's scale from 0 to 10. What is left is the network, which page sources are reached by, UNIX sockets, and
# the host's root directory.
MAX_EXPOSURE = 1.0

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def settings(path: Path, section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return dict(parser[section])


@needs_analyze
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        # The program is not installed where the tests run, and systemd looks for it.
        (tmp_path / path.name).write_text(path.read_text().replace("/usr/bin/postcopyd", "/bin/true"))
    named = [path.name.replace("@.", "@image.") for path in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *named],
        capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "postcopyd" in line]
    assert (done.returncode, complaints) == (0, [])


@needs_analyze
@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_services_are_confined(path: Path) -> None:
    assert exposure(path) <= MAX_EXPOSURE


def exposure(path: Path) -> float:
    """Return systemd's own judgement, 0 to 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=100", "--no-pager", str(path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze has no offline review")
    match = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert match is not None, done.stdout + done.stderr
    return float(match[1])


def test_the_daemon_never_loses_its_stored_descriptors() -> None:
    service = settings(ROOT / "systemd" / "postcopyd.service", "Service")
    unit = settings(ROOT / "systemd" / "postcopyd.service", "Unit")
    assert unit["StartLimitIntervalSec"] == "0", "a start limit drops the store"
    assert service["KillSignal"] == "SIGINT", "a stop drops the store, so it must drain"
    assert service["RestartKillSignal"] == "SIGTERM", "a restart keeps the store, so it hands over"
    assert (service["Restart"], service["RestartSec"]) == ("always", "0")
    assert service["TimeoutStopSec"] == "infinity", (
        "a kill after a time-out drops the store under running guests"
    )
    assert service["Type"] == "notify"
    assert int(service["FileDescriptorStoreMax"]) >= 12 * 64
    assert int(service["WatchdogSec"]) > 0
    assert "DynamicUser" not in service, "VMMs cannot reach sockets below /run/private"


def test_the_socket_is_where_the_service_keeps_its_sockets() -> None:
    socket = settings(ROOT / "systemd" / "postcopyd.socket", "Socket")
    service = settings(ROOT / "systemd" / "postcopyd.service", "Service")
    assert socket["ListenStream"] == f"/run/{service['RuntimeDirectory']}/vmm.sock"
    assert socket["SocketGroup"] == service["Group"]
    assert service["RuntimeDirectoryPreserve"] == "yes", "else the socket vanishes with the first stop"


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_services_call_commands_that_exist(path: Path) -> None:
    program, command, *args = settings(path, "Service")["ExecStart"].split()
    assert program == "/usr/bin/postcopyd"
    assert command in COMMANDS
    assert args
