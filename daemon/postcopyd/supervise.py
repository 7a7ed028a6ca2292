"""`postcopyd supervise`: holds descriptors and restarts the daemon, for hosts without systemd.

The parent does nothing else, so there is nothing in it to crash. It speaks the service manager's protocol as far as the
daemon uses it: FDSTORE, FDSTOREREMOVE, BARRIER and READY come in on NOTIFY_SOCKET; what is stored goes to the next
child as LISTEN_FDS. Standard library only. Source: sd_notify(3), sd_listen_fds(3).
"""

from __future__ import annotations

import array
import fcntl
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import NoReturn

CAPACITY = 4096
SPARE_FDS = 32
MAX_MESSAGE_BYTES = 4096
MAX_FDS_PER_MESSAGE = 253
FIRST_PASSED_FD = 3
RESTART_PAUSE_S = 0.5
"""Before a child that lived for less than this is started again; one that lived longer is restarted at once."""

_UCRED = struct.Struct("=iII")


@dataclass
class Store:
    """Descriptors by name, oldest first; the supervisor's whole state."""

    capacity: int
    held: list[tuple[str, int]] = field(default_factory=list)

    def put(self, name: str, fds: list[int]) -> None:
        """Keep `fds`; beyond the capacity they are closed, as systemd does."""
        for fd in fds:
            if len(self.held) < self.capacity:
                self.held.append((name, fd))
            else:
                os.close(fd)

    def remove(self, name: str) -> None:
        for held_name, fd in self.held:
            if held_name == name:
                os.close(fd)
        self.held = [entry for entry in self.held if entry[0] != name]


class Supervisor:
    """Runs `argv` for as long as it takes."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._store = Store(_raise_limit())
        self._folder = tempfile.mkdtemp(prefix="postcopyd-supervise-")
        self._address = f"{self._folder}/notify"
        self._sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(self._address)
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._child = 0
        self._is_ready = False
        self._stopping = False

    def run(self) -> int:
        """Return the exit status of the last child: the one that ended well after it was asked to stop."""
        signal.set_wakeup_fd(self._wakeup_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_restart)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            while True:
                began = time.monotonic()
                status = self._run_child()
                # Not ended well, it may have left guests behind: they are served again, whatever was asked.
                if self._stopping and (status == 0 or not self._store.held):
                    return status
                if time.monotonic() - began < RESTART_PAUSE_S:
                    time.sleep(RESTART_PAUSE_S)
        finally:
            self._sock.close()
            os.unlink(self._address)
            os.rmdir(self._folder)

    @property
    def held(self) -> list[str]:
        """Names of what is stored, oldest first."""
        return [name for name, _ in self._store.held]

    def _on_stop(self, number: int, frame: object) -> None:
        self._stopping = True
        self._stop_child()

    def _stop_child(self) -> None:
        """SIGINT makes the daemon drain: with us the store would end. Before it is ready, it would only kill it."""
        if self._stopping and self._child and self._is_ready:
            os.kill(self._child, signal.SIGINT)

    def _on_restart(self, number: int, frame: object) -> None:
        """SIGTERM makes the daemon hand over: to its successor, an upgraded one perhaps."""
        if self._child:
            os.kill(self._child, signal.SIGTERM)

    def _run_child(self) -> int:
        self._is_ready = False
        self._child = self._spawn()
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wakeup_read, selectors.EVENT_READ)
            while True:
                pid, status = os.waitpid(self._child, os.WNOHANG)
                if pid:
                    self._child = 0
                    # What it sent before it died counts.
                    self._receive_all()
                    return os.waitstatus_to_exitcode(status)
                selector.select()
                self._receive_all()
                _empty(self._wakeup_read)

    def _spawn(self) -> int:
        child = os.fork()
        if child == 0:
            self._become_child()
        return child

    def _become_child(self) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            # Newest first, as systemd lists them. Moved out of the way first: a source may lie where another must go.
            held = list(reversed(self._store.held))
            high = FIRST_PASSED_FD + len(held)
            moved = [_move_above(fd, high) for _, fd in held]
            for place, fd in enumerate(moved, FIRST_PASSED_FD):
                os.dup2(fd, place)
            environ = {
                **os.environ,
                "NOTIFY_SOCKET": self._address,
                "FDSTORE": str(self._store.capacity),
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDS": str(len(held)),
                "LISTEN_FDNAMES": ":".join(name for name, _ in held),
            }
            os.execve(self._argv[0], self._argv, environ)
        finally:
            os._exit(127)

    def _receive_all(self) -> None:
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    MAX_MESSAGE_BYTES,
                    socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * 4) + socket.CMSG_SPACE(_UCRED.size),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return
            if flags & socket.MSG_CTRUNC:
                sys.stderr.write("postcopyd supervise: too many open files; a descriptor was not stored\n")
            self._take(data, ancillary)

    def _take(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        fds: list[int] = []
        sender = 0
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                fds.extend(numbers)
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                sender = _UCRED.unpack(payload[: _UCRED.size])[0]
        fields = dict(line.partition("=")[::2] for line in data.decode(errors="replace").split("\n"))
        name = fields.get("FDNAME", "stored")
        # The child may just have died, and what it sent before still counts; nobody else may speak for it.
        if sender not in (self._child, 0) and self._child:
            fields = {}
        if "FDSTORE" in fields:
            self._store.put(name, fds)
            return
        if "FDSTOREREMOVE" in fields:
            self._store.remove(name)
        # BARRIER=1: closing its descriptor is the answer.
        for fd in fds:
            os.close(fd)
        if "READY" in fields:
            self._is_ready = True
            self._stop_child()


def _raise_limit() -> int:
    """Let this process open as many files as it may; return how many of them can be stored.

    What is passed on lies twice in the child until it runs the daemon.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(CAPACITY, max(0, hard // 3 - SPARE_FDS))


def _move_above(fd: int, floor: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)


def _empty(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        return


def supervise(arguments: list[str]) -> int:
    """Run `postcopyd run ARGUMENTS…` under a supervisor and return its exit status.

    SIGTERM and SIGINT: drain, then end. SIGHUP: replace the daemon by a new one, which goes on with its sessions.
    """
    return Supervisor([sys.executable, "-m", "postcopyd", "run", *arguments]).run()
