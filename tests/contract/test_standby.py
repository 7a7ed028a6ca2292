"""The standby's conversation, with a stand-in for the service manager. With systemd: systemd/test_daemon_unit.py."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from postcopyd.standby.claim import MAIN, REFUSED, TAKEN, encode, send_fds
from supervised import Supervised

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 30.0


class Manager:
    """What a service manager does with FDSTORE and BARRIER; `heeds`: whether the standby is its main process."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.heeds = True
        self.is_ready = threading.Event()
        self.held: list[int] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.address)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 4096, 8)
            if data == b"end":
                return
            if b"READY=1" in data:
                self.is_ready.set()
            if self.heeds and data.startswith(b"FDSTORE=1"):
                self.held += fds
                continue
            if data.startswith(b"FDSTOREREMOVE=1"):
                fds += self.held
                self.held.clear()
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", self.address)
        self._thread.join()
        self._sock.close()


class Standby:
    """A standby; `gone()` ends the daemon that it waits for."""

    def __init__(self, folder: Path, manager: Manager) -> None:
        self.folder = folder
        self.manager = manager
        self.path = str(folder / "standby.sock")
        self.argv = ["run", f"--state-dir={folder}"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.path)
            listener.listen(1)
            lifeline, self._held_by_daemon = os.pipe()
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "postcopyd.standby.process"),
                    *(str(listener.fileno()), str(lifeline), *self.argv),
                ],
                pass_fds=(listener.fileno(), lifeline),
            )
            os.close(lifeline)

    def gone(self) -> None:
        os.close(self._held_by_daemon)

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def call(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE_S)
        sock.connect(self.path)
        return sock

    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "NOTIFY_SOCKET": self.manager.address,
            "POSTCOPYD_HTTP": "",
            "WATCHDOG_PID": "1",
        }

    def present(self, sock: socket.socket, *argv: str) -> None:
        fd = os.memfd_create("claim")
        os.write(fd, encode(argv or self.argv, self.environ()))
        send_fds(sock, b"3", [fd])
        os.close(fd)
        send_fds(sock, b"fds", [0, 1, 2])

    def named(self) -> socket.socket:
        """A claim up to where the standby has given its process number."""
        sock = self.call()
        self.present(sock)
        assert int(sock.recv(64)) == self.process.pid
        return sock


@pytest.fixture
def early(tmp_path: Path) -> Iterator[Standby]:
    """Its daemon lives."""
    manager = Manager(tmp_path / "notify")
    standby = Standby(tmp_path, manager)
    yield standby
    standby.process.kill()
    standby.process.wait()
    manager.close()


@pytest.fixture
def standby(early: Standby) -> Standby:
    early.gone()
    return early


def _text(data: bytes) -> int:
    fd = os.memfd_create("claim")
    os.write(fd, data)
    return fd


def test_it_becomes_the_daemon(standby: Standby) -> None:
    with standby.named() as sock:
        sock.send(MAIN)
        assert sock.recv(64) == TAKEN
    assert standby.manager.is_ready.wait(PATIENCE_S)
    assert standby.manager.held == []
    assert (standby.folder / "control.sock").is_socket()


def test_what_is_no_claim_changes_nothing(standby: Standby) -> None:
    with standby.named():
        files = standby.open_files()
    good = encode(standby.argv, standby.environ())
    for head, texts in (
        (b"", []),
        (b"3", []),
        (b"many", [good]),
        (b"2", [good]),
        (b"99999999", [good]),
        (b"3", [good, good]),
    ):
        with standby.call() as sock:
            fds = [_text(text) for text in texts]
            sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(BrokenPipeError):
                sock.send(b"no descriptors")
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(64) == b""
    # It dies with its number known, or says something else than that it is the main process now.
    standby.named().close()
    with standby.named() as sock:
        sock.send(b"wait")
        assert sock.recv(64) == b""
    with standby.named() as sock:
        assert standby.open_files() == files
        sock.send(MAIN)
        assert sock.recv(64) == TAKEN
    assert standby.manager.is_ready.wait(PATIENCE_S)


def test_a_manager_that_does_not_heed_it_ends_it(standby: Standby) -> None:
    standby.manager.heeds = False
    with standby.named() as sock:
        sock.send(MAIN)
        assert sock.recv(64) == REFUSED
    assert standby.process.wait(PATIENCE_S) == 0
    assert not standby.manager.is_ready.is_set()


@pytest.mark.parametrize("change", ["arguments", "program"])
def test_it_does_not_go_on_for_another_program(
    change: str, standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "program":
        monkeypatch.setattr("postcopyd.standby.claim.program_stamp", lambda: "another")
    with standby.call() as sock:
        standby.present(sock, *(["run", "--control=/elsewhere"] if change == "arguments" else standby.argv))
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(64) == b""
    assert standby.process.wait(PATIENCE_S) == 0


def test_nobody_who_comes_before_the_daemon_is_gone_is_answered(early: Standby) -> None:
    """Two daemons must never serve one guest."""
    with early.call() as sock:
        early.present(sock)
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(64)
        early.gone()
        sock.settimeout(PATIENCE_S)
        assert int(sock.recv(64)) == early.process.pid


async def test_under_a_supervisor_that_heeds_no_other_process_a_start_is_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    async with contextlib.AsyncExitStack() as stack:
        daemon = await Supervised.start(stack, tmp_path, standby="true")
        await daemon.call(lambda client: client.list())
        killed = daemon.daemon_pid
        async with asyncio.timeout(PATIENCE_S):
            while not (standbys := _children(killed)):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.02)
        os.kill(killed, signal.SIGKILL)
        await daemon.started(2)
        await daemon.call(lambda client: client.list())
        assert daemon.daemon_pid not in {killed, *standbys}
        async with asyncio.timeout(PATIENCE_S):
            while any(_is_there(pid) for pid in standbys):  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.02)


def _children(pid: int) -> set[int]:
    return {
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    }


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
