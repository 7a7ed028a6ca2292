"""`python -m postcopyd.vmm`: two processes, driven by lines of JSON, move a guest from one to the other."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import pytest
from handoff_peer import HandoffPeer
from local_resolver import LocalResolver

from postcopyd.vmm.console import MAX_LINE_BYTES
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from postcopyd.vmm.state import GuestKind

MEMORY = 2 << 20
PAGE = 4096


class VmmProcess:
    """A VMM process and its greeting. It ends with the test, as its input does."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "postcopyd.vmm", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        self.greeting = self.answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply

    def send(self, line: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()
        return self.answer()

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a command that must succeed."""
        reply = self.send(json.dumps({"command": command} | arguments).encode())
        assert reply["ok"], reply
        return reply


def shape_options(guest: GuestKind) -> list[str]:
    return ["--memory", "2M", "--vcpus", "2", "--order", "random", "--spare", "64K", "--guest", guest]


@pytest.fixture
def source(guest: GuestKind, tmp_path: Path) -> Iterator[VmmProcess]:
    with VmmProcess("source", *shape_options(guest), "--ram", str(tmp_path / "ram")) as made:
        yield made


def test_a_guest_moves_from_process_to_process(guest: GuestKind, source: VmmProcess, tmp_path: Path) -> None:
    require_uffd()
    ram, state = str(tmp_path / "ram"), str(tmp_path / "state")
    assert source.greeting["ready"] == "source"
    source.ask("start")
    assert source.ask("wait", steps=1000, timeout_s=30)["reached"]
    source.ask("balloon", offset=MEMORY - 16 * PAGE, len_bytes=4 * PAGE)
    source.ask("pause")
    source.ask("save", path=state)
    content = (tmp_path / "ram").read_bytes()
    with ExitStack() as stack:
        peer = stack.enter_context(HandoffPeer(tmp_path / "socket"))
        destination = stack.enter_context(
            VmmProcess("destination", *shape_options(guest), "--socket", str(tmp_path / "socket"))
        )
        address = destination.greeting["host_virt_addr"]
        assert json.loads(peer.message[4:])["vmm_pid"] == destination.greeting["pid"]
        stack.enter_context(
            LocalResolver(peer.fds[0], address, MEMORY, lambda at, size: content[at : at + size])
        )
        assert destination.send(b'{"command":"start"}')["code"] == "guest.state", "registers come first"
        destination.ask("load", path=state)
        destination.ask("start")
        assert destination.ask("wait", steps=2000, timeout_s=60)["reached"]
        destination.ask("balloon", offset=MEMORY - 4 * PAGE, len_bytes=4 * PAGE)
        assert destination.send(b'{"command":"check"}')["code"] == "guest.state", "the guest runs"
        destination.ask("pause")
        report = destination.ask("check", ram=ram, state=state)
        status = destination.ask("status")["status"]
        assert destination.ask("quit") == {"ok": True}
    assert report["pages"] == MEMORY // PAGE
    assert (report["mismatched_pages"], report["source_mismatched_pages"]) == (0, 0)
    assert (report["first"], report["guest_errors"]) == (None, 0)
    assert [vcpu["tid"] for vcpu in status["vcpus"]] == destination.greeting["tids"]
    assert all(vcpu["steps"] >= 2000 for vcpu in status["vcpus"])


def test_a_source_that_was_changed_after_the_pause_is_noticed(source: VmmProcess, tmp_path: Path) -> None:
    ram, state = tmp_path / "ram", str(tmp_path / "state")
    source.ask("save", path=state)
    with ram.open("r+b") as file:
        file.seek(5 * PAGE)
        file.write(b"changed!")
    report = source.ask("check", ram=str(ram), state=state)
    assert (report["source_mismatched_pages"], report["mismatched_pages"]) == (1, 1)
    assert report["first"]["page"] == 5


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "guest.command"),
        (b"pause", "guest.command"),
        (b"[]", "guest.command"),
        (b'{"command":"explode"}', "guest.command"),
        (b'{"command":"pause","forever":true}', "guest.command"),
        (b'{"command":"wait","timeout_s":-1}', "guest.command"),
        (b'{"command":"wait","timeout_s":1e9}', "guest.command"),
        (b'{"command":"check","ram":"x"}', "guest.command"),
        (b'{"command":"handoff","socket":"x"}', "guest.command"),
        (b'{"command":"balloon","offset":1,"len_bytes":4096}', "argument.invalid"),
        (b'{"command":"load","path":"/none"}', "guest.state_file"),
        (b'{"command":"save","path":"/none/none"}', "guest.state_file"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_and_the_next_one_served(
    source: VmmProcess, line: bytes, code: str
) -> None:
    reply = source.send(line)
    assert (reply["ok"], reply["code"]) == (False, code)
    assert source.ask("status")["status"]["phase"] == "parked"


def test_a_line_beyond_all_bounds_ends_the_process(source: VmmProcess) -> None:
    assert source.send(b" " * MAX_LINE_BYTES)["code"] == "guest.command"
    assert source.process.wait(timeout=30) == 0


def test_the_end_of_input_ends_a_running_guest(source: VmmProcess) -> None:
    source.ask("start")
    source.process.communicate(timeout=30)
    assert source.process.returncode == 0


def test_a_destination_without_a_daemon_says_so_and_exits(guest: GuestKind, tmp_path: Path) -> None:
    require_uffd()
    process = subprocess.run(
        [sys.executable, "-m", "postcopyd.vmm", "destination", "--guest", guest, "--socket", "/none"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert process.returncode == 3
    assert b"vmm.handoff_unanswered" in process.stderr
    assert process.stdout == b""
