"""The standby itself: `python -m postcopyd.standby.process LISTENER LIFELINE run ARGUMENTS…`, a child of the daemon.

LISTENER and LIFELINE are descriptors: a socket that listens, and the read end of a pipe of which the daemon holds the
other. It ends when the daemon is gone and nobody claims it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import selectors
import socket
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from ..crash import crash_point
from ..entry import plain_run
from ..errors import PostcopyError
from .claim import FIRST_PASSED_FD, MAIN, REFUSED, STDIO, TAKEN, program_stamp, send_to_manager

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLAIM_WITHIN_S = 30.0
"""After the daemon's end; then there is no service manager that starts it again."""

CONVERSATION_S = 2.0
MANAGER_ANSWERS_WITHIN_S = 5.0
MAX_FDS = 65536
MAX_TEXT_BYTES = 16 << 20
PROBE = "standby-probe"

_UCRED = struct.Struct("=iII")


@dataclass(frozen=True)
class Claim:
    """What a new main process would have begun with; `fds`: 0, 1, 2, and those that follow."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class UnusableError(Exception):
    """A claim that this process cannot answer."""


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    listener, lifeline = socket.socket(fileno=int(argv[0])), int(argv[1])
    gc.disable()
    options = plain_run(argv[2:]) or {}
    _load(options)
    gc.freeze()
    claim = _wait(listener, lifeline, options)
    if claim is None:
        return 0
    listener.close()
    os.close(lifeline)
    _become(claim)
    from .. import log
    from ..launch import launch

    log.configure()
    structlog.get_logger(__name__).info("standby.took_over", pid=os.getpid())
    try:
        launch(**options)
    except PostcopyError as error:
        from ..cli import report

        return report(error)
    return 0


def _load(options: Mapping[str, str]) -> None:
    """Import what a daemon with this configuration will need."""
    from ..config import load_config

    names = ["uvloop", "postcopyd.launch", "postcopyd.daemon", "postcopyd.control.server"]
    # A configuration that cannot be read now may be right by then.
    with contextlib.suppress(PostcopyError):
        config = load_config(options.get("config_path"))
        names.append(f"postcopyd.transport.{config.transport}")
        if config.http:
            names += ["postcopyd.health.http", "postcopyd.metrics.collector", "postcopyd.metrics.exposition"]
    for name in names:
        importlib.import_module(name)


def _wait(listener: socket.socket, lifeline: int, options: dict[str, str]) -> Claim | None:
    """Return the claim that made this the main process; None: nobody needs a standby any more."""
    with selectors.DefaultSelector() as selector:
        selector.register(lifeline, selectors.EVENT_READ)
        selector.select()
        # The daemon is gone.
        selector.unregister(lifeline)
        selector.register(listener, selectors.EVENT_READ)
        while selector.select(CLAIM_WITHIN_S):
            conversation, _ = listener.accept()
            with conversation:
                conversation.settimeout(CONVERSATION_S)
                try:
                    claim = _receive(conversation, options)
                except (OSError, ValueError):
                    # Whoever it was is gone, or was not one of us. The next may be.
                    continue
                except UnusableError:
                    return None
                if claim is not None:
                    return claim
        return None


def _receive(conversation: socket.socket, options: dict[str, str]) -> Claim | None:
    """The claim, once it is settled that this is the main process; None: it came to nothing, and changed nothing.

    Raises:
        UnusableError: not for this program, or the service manager will not have it. OSError, ValueError: not a claim.
    """
    peer = _UCRED.unpack(conversation.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if peer[1] != os.geteuid():
        return None
    claim = _read_claim(conversation)
    try:
        if plain_run(claim.argv) != options:
            raise UnusableError("it was started with other arguments")
        crash_point("standby.claimed")
        conversation.send(str(os.getpid()).encode())
        if conversation.recv(len(MAIN)) != MAIN:
            claim.close()
            return None
        crash_point("standby.named")
        if not _is_main(claim.environ["NOTIFY_SOCKET"]):
            conversation.send(REFUSED)
            raise UnusableError("the service manager does not take it for the main process")
    except BaseException:
        claim.close()
        raise
    crash_point("standby.main")
    with contextlib.suppress(OSError):
        # It need not hear that any more.
        conversation.send(TAKEN)
    return claim


def _read_claim(conversation: socket.socket) -> Claim:
    """Raises OSError, ValueError: not a claim. UnusableError: of another program."""
    head, texts, _, _ = socket.recv_fds(conversation, 16, 1)
    fds: list[int] = []
    try:
        argv, environ = _read_text(texts)
        count = int(head)
        if not len(STDIO) <= count <= MAX_FDS:
            raise ValueError(f"{count} descriptors")
        while len(fds) < count:
            data, more, flags, _ = socket.recv_fds(conversation, 16, count - len(fds))
            fds += more
            if not data or not more or flags & socket.MSG_CTRUNC:
                raise ValueError(f"{len(fds)} of {count} descriptors arrived")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    finally:
        for fd in texts:
            os.close(fd)
    return Claim(argv, environ, tuple(fds))


def _read_text(texts: Sequence[int]) -> tuple[tuple[str, ...], dict[str, str]]:
    if len(texts) != 1:
        raise ValueError(f"{len(texts)} texts")
    text = os.pread(texts[0], MAX_TEXT_BYTES, 0)
    return decode(text)


def decode(text: bytes) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and environment of what `claim.encode` wrote.

    Raises:
        UnusableError: another program wrote it. ValueError: none did.
    """
    stamp, *fields = os.fsdecode(text).split("\0")
    if stamp != program_stamp():
        raise UnusableError("the program has changed")
    count = int(fields[0])
    argv, variables = fields[1 : 1 + count], fields[1 + count :]
    return tuple(argv), dict(variable.split("=", 1) for variable in variables)


def _is_main(manager: str) -> bool:
    """Whether the service manager heeds this process: it closes what others would have it store (NotifyAccess=main).

    Raises OSError: it does not answer.
    """
    probe_read, probe_write = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            send_to_manager(manager, f"FDSTORE=1\nFDNAME={PROBE}".encode(), [probe_write])
        finally:
            os.close(probe_write)
        _barrier(manager)
        is_held = not _is_readable(probe_read, 0)
        if is_held:
            send_to_manager(manager, f"FDSTOREREMOVE=1\nFDNAME={PROBE}".encode())
        return is_held
    finally:
        os.close(probe_read)


def _barrier(manager: str) -> None:
    """Return when it has worked through all that was sent before. Raises OSError."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            send_to_manager(manager, b"BARRIER=1", [write_end])
        finally:
            os.close(write_end)
        if not _is_readable(read_end, MANAGER_ANSWERS_WITHIN_S):
            raise TimeoutError("BARRIER=1 to the service manager")
    finally:
        os.close(read_end)


def _is_readable(fd: int, timeout_s: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))


def _become(claim: Claim) -> None:
    """Put descriptors and environment where the new process had them."""
    first_free = FIRST_PASSED_FD + len(claim.fds)
    # Out of the way first: one may lie where another must go.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first_free) for fd in claim.fds]
    claim.close()
    for place, fd in enumerate(moved):
        os.dup2(fd, place, inheritable=place in STDIO)
        os.close(fd)
    os.environ.clear()
    os.environ.update(_own(claim.environ))


def _own(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that name the process they are meant for name this one."""
    own = {name: str(os.getpid()) for name in ("LISTEN_PID", "WATCHDOG_PID") if name in environ}
    return {**environ, **own}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
