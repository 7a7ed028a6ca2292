"""The daemon's side: there is a standby for as long as the daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from .claim import standby_path

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger(__name__)

PAUSE_S = 5.0
"""Before one that ended is replaced: what it died of may still be there."""

MEANT_FOR_ONE = (
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "NOTIFY_SOCKET",
)


class StandbyKeeper:
    """Used by `async with`: at the end the standby is gone too, and what is started next starts as ever.

    Args:
        argv: of the daemon, `run` and what follows; a standby goes on only for the same.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._path = Path(standby_path(os.environ))
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            try:
                status = await self._keep_one()
                log.warning("standby.ended", status=status, again_in_s=PAUSE_S)
            except OSError as error:
                log.warning("standby.not_started", error=str(error), again_in_s=PAUSE_S)
            await asyncio.sleep(PAUSE_S)

    async def _keep_one(self) -> int:
        """Return the status that it ended with. Raises OSError."""
        # The daemon's end is what the standby waits for, so only the daemon may hold this end.
        lifeline, held_by_us = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                with self._listen() as listener:
                    child = await asyncio.to_thread(self._spawn, listener.fileno(), lifeline)
            finally:
                os.close(lifeline)
            try:
                log.debug("standby.started", pid=child.pid)
                return await _end_of(child)
            finally:
                child.kill()
                child.wait()
        finally:
            os.close(held_by_us)
            self._path.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        return listener

    def _spawn(self, listener: int, lifeline: int) -> subprocess.Popen[bytes]:
        environ = {name: value for name, value in os.environ.items() if name not in MEANT_FOR_ONE}
        return subprocess.Popen(
            [sys.executable, "-m", "postcopyd.standby.process", str(listener), str(lifeline), *self._argv],
            stdin=subprocess.DEVNULL,
            pass_fds=(listener, lifeline),
            env=environ,
        )


async def _end_of(child: subprocess.Popen[bytes]) -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(child.pid)
    try:
        loop.add_reader(pidfd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        return child.wait()
    return -1
