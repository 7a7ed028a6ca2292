"""systemd's notification protocol: readiness, watchdog, and the descriptor store. Silent when nobody listens.

Every message is sent on a socket of its own without blocking: a slow PID 1 must not keep page faults waiting.
What is of the moment (`notify`) is dropped with a warning; what must arrive (`store`, `remove`, `barrier`)
waits for room, bounded by a time-out.

Source: sd_notify(3), sd_listen_fds(3), systemd.service(5); "measured" means with systemd 252.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING

import structlog

from .errors import Code, ConfigError, InvariantError, KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = structlog.get_logger(__name__)

LISTEN_FDS_START = 3
MAX_LISTEN_FDS = 65536
# net/scm.h, SCM_MAX_FD: the kernel refuses more in one message.
MAX_FDS_PER_MESSAGE = 253
MAX_NAME_LEN = 255
SEND_TIMEOUT_S = 2.0


class Notifier:
    """Talks to the service manager. Without an address every method does nothing and `enabled` is False."""

    def __init__(self, address: str = "") -> None:
        """`address` as in NOTIFY_SOCKET: a path, or an abstract name after `@`."""
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        return cls(environ.get("NOTIFY_SOCKET", ""))

    @property
    def enabled(self) -> bool:
        return bool(self._address)

    def notify(self, **fields: str | int) -> bool:
        """Send `notify(READY=1, STATUS="…")`; return whether it went out. A failure is logged."""
        try:
            return self._send(_message(fields))
        except OSError as error:
            log.warning("notify.failed", fields=sorted(fields), errno=errno.errorcode.get(error.errno or 0))
            return False

    async def store(self, name: str, fds: Sequence[int]) -> None:
        """Hand duplicates of `fds` to the manager under one name; they come back by `listen_fds`.

        FDPOLL=0: otherwise a uffd without O_NONBLOCK, or a pipe whose peer closed, is dropped (measured).
        The manager drops silently what exceeds FileDescriptorStoreMax, so the caller counts.

        Raises:
            KernelError: the message could not be sent.
        """
        if not 0 < len(fds) <= MAX_FDS_PER_MESSAGE:
            raise InvariantError(f"{len(fds)} descriptors cannot be stored by one message")
        await self._deliver(_message({"FDSTORE": 1, "FDNAME": _checked(name), "FDPOLL": 0}), fds)

    async def remove(self, name: str) -> None:
        """Have the manager close everything stored under `name`. Raises KernelError."""
        await self._deliver(_message({"FDSTOREREMOVE": 1, "FDNAME": _checked(name)}))

    async def barrier(self, timeout_s: float = 5.0) -> None:
        """Return when the manager has worked through every message sent before this one.

        It gets the write end of a pipe and closes it when it is there, which ends the read end.

        Raises:
            KernelError: not sent, or the manager did not answer in time (ETIMEDOUT).
        """
        if not self.enabled:
            return
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                await self._deliver(_message({"BARRIER": 1}), [write_end])
            finally:
                os.close(write_end)
            await _wait_readable(read_end, timeout_s)
        except TimeoutError as error:
            raise KernelError("BARRIER=1 to the service manager", 0, 0, errno.ETIMEDOUT) from error
        finally:
            os.close(read_end)

    async def _deliver(self, message: bytes, fds: Sequence[int] = ()) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                while True:
                    try:
                        self._send(message, fds)
                        return
                    except BlockingIOError:
                        await self._wait_for_room()
        except TimeoutError as error:
            raise KernelError("sendmsg to NOTIFY_SOCKET", 0, len(message), errno.ETIMEDOUT) from error
        except OSError as error:
            raise KernelError(
                "sendmsg to NOTIFY_SOCKET", 0, len(message), error.errno or errno.EIO
            ) from error

    async def _wait_for_room(self) -> None:
        """A connected datagram socket becomes writable when its peer's queue has room (unix_dgram_poll)."""
        with self._connected() as sock:
            loop = asyncio.get_running_loop()
            writable = asyncio.Event()
            loop.add_writer(sock, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(sock)

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._address)
        except OSError:
            sock.close()
            raise
        return sock

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        if not self._address:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._connected() as sock:
            sock.sendmsg([message], rights)
        return True


class Watchdog:
    """Sends WATCHDOG=1 from the event loop itself, so that a loop that hangs is killed and restarted."""

    def __init__(self, notifier: Notifier, interval_s: float) -> None:
        self._notifier = notifier
        self.interval_s = interval_s

    @classmethod
    def from_environ(cls, notifier: Notifier, environ: Mapping[str, str] = os.environ) -> Watchdog | None:
        """Return a watchdog of half the manager's period, None if it asks this process for none."""
        period_us = environ.get("WATCHDOG_USEC", "")
        meant_for = environ.get("WATCHDOG_PID", str(os.getpid()))
        if (
            not notifier.enabled
            or not period_us.isdecimal()
            or int(period_us) == 0
            or meant_for != str(os.getpid())
        ):
            return None
        return cls(notifier, int(period_us) / 2e6)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            self._notifier.notify(WATCHDOG=1)
            await asyncio.sleep(self.interval_s)


def listen_fds(
    environ: Mapping[str, str] = os.environ, *, start: int = LISTEN_FDS_START
) -> list[tuple[int, str]]:
    """Return (descriptor, name) of what the manager passed: sockets first, then the store, newest first.

    Match by name, not by place. The descriptors become close-on-exec and belong to the caller.

    Raises:
        ConfigError: the variables contradict each other or the process's descriptors.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environ.get("LISTEN_FDS", "")
    count = int(text) if text.isdecimal() else -1
    if not 0 <= count <= MAX_LISTEN_FDS:
        raise ConfigError(
            Code.CONFIG_INVALID, f"environment: LISTEN_FDS: {text!r} is not a number of descriptors"
        )
    names = environ.get("LISTEN_FDNAMES", ":".join(["unknown"] * count)).split(":") if count else []
    if len(names) != count:
        raise ConfigError(
            Code.CONFIG_INVALID, f"environment: LISTEN_FDNAMES names {len(names)} of {count} descriptors"
        )
    for fd in range(start, start + count):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                Code.CONFIG_INVALID, f"environment: LISTEN_FDS: descriptor {fd} is not open"
            ) from error
    return list(zip(range(start, start + count), names, strict=True))


def _message(fields: Mapping[str, str | int]) -> bytes:
    # A line feed would begin another assignment.
    return "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items()).encode()


def _checked(name: str) -> str:
    """The manager ignores a bad name and stores under "stored", where no one would find it again."""
    if not 0 < len(name) <= MAX_NAME_LEN or not name.isascii() or not name.isprintable() or ":" in name:
        raise InvariantError(f"{name!r} is no name for a stored descriptor")
    return name


async def _wait_readable(fd: int, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(timeout_s):
            await readable.wait()
    finally:
        loop.remove_reader(fd)
