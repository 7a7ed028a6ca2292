"""One running QEMU, driven over its machine protocol: commands, and where its migration is.

Source: QEMU, docs/interop/qmp-spec.txt and qapi/migration.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from typing import TYPE_CHECKING, Self

from qemu.qmp import EventListener, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import ExecuteError

from ..arguments import parse_endpoint
from ..errors import Code, ConfigError, MigrationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

COMMAND_TIMEOUT_S = 10.0
MAX_EVENTS = 256
"""Events that came and were not looked at; a machine that sends more is not waited for, the oldest are dropped."""

_UCRED = struct.Struct("3i")

# Broken connections are reported as errors of ours.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Machine:
    """A connection to the monitor of the QEMU called `name` ("source", "destination"); use `connect`.

    pid: of its process, None if it is reached over TCP. migration: the status of the last MIGRATION event.
    stopped_at, resumed_at: when this process heard of it, by time.monotonic.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.pid: int | None = None
        self.migration = ""
        self.stopped_at: float | None = None
        self.resumed_at: float | None = None
        self.is_gone = False
        self._client = QMPClient(name)
        # The protocol's pause for a busy reader does not apply: events are read at once by a task of ours.
        self._events = EventListener(("MIGRATION", "STOP", "RESUME"))
        self._client.register_listener(self._events)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def connect(cls, name: str, address: str) -> Machine:
        """Connect to a monitor socket: a path, or HOST:PORT.

        Raises:
            ConfigError: QEMU_UNREACHABLE: nobody listens there, or what does is no QEMU, or another client has it.
        """
        machine = cls(name, address)
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                sock = await _open(address)
                machine.pid = _peer_pid(sock)
                await machine._client.connect(sock)
        except TimeoutError:
            raise _unreachable(
                name, address, "it does not answer; a monitor serves one client at a time"
            ) from None
        except (OSError, QMPError) as error:
            raise _unreachable(name, address, str(error) or type(error).__name__) from error
        machine._tasks = [
            asyncio.create_task(machine._follow_events()),
            asyncio.create_task(machine._follow_connection()),
        ]
        return machine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the machine as it is; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Whatever ended the connection was reported when it was used.
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self._client.disconnect()

    async def execute(
        self, command: str, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: object
    ) -> object:
        """Return what the command returns.

        Raises:
            MigrationError: QEMU_REFUSED: the machine said no. QEMU_GONE: it ended, or does not answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise MigrationError(
                Code.QEMU_REFUSED, f"the {self.name} QEMU refuses {command}: {error}"
            ) from error
        except TimeoutError:
            raise MigrationError(
                Code.QEMU_GONE, f"the {self.name} QEMU does not answer {command} within {timeout_s:g} s"
            ) from None
        except (OSError, QMPError, EOFError) as error:
            raise self.gone(f"at {command}") from error

    def gone(self, when: str) -> MigrationError:
        return MigrationError(Code.QEMU_GONE, f"the {self.name} QEMU ended {when}")

    async def until(self, reached: Callable[[Machine], bool], timeout_s: float, what: str) -> None:
        """Wait until `reached`, looking at every event.

        Raises:
            MigrationError: QEMU_GONE; QEMU_MIGRATION_FAILED: it was not reached in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not reached(self):
                    if self.is_gone:
                        raise self.gone(f"before it {what}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise MigrationError(
                Code.QEMU_MIGRATION_FAILED,
                f"the {self.name} QEMU did not come so far that it {what} within {timeout_s:g} s; "
                f"its migration is {self.migration or 'not begun'}",
            ) from None

    async def _follow_events(self) -> None:
        while True:
            event = await self._events.get()
            match event["event"]:
                case "MIGRATION":
                    self.migration = str(_object(event["data"]).get("status"))
                case "STOP":
                    self.stopped_at = time.monotonic()
                case "RESUME":
                    self.resumed_at = time.monotonic()
            self._changed.set()

    async def _follow_connection(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self.is_gone = True
        self._changed.set()


def _object(value: object) -> dict[str, object]:
    """A JSON object of a machine's answer. Raises MigrationError: QEMU_REFUSED: it is none."""
    if not isinstance(value, dict):
        raise MigrationError(Code.QEMU_REFUSED, f"QEMU answers {str(value)[:80]!r} where an object belongs")
    return value


async def _open(address: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    if "/" in address:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        target: object = address
    else:
        host, port = parse_endpoint(address)
        family, kind, proto, _, target = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
    try:
        await loop.sock_connect(sock, target)  # type: ignore[arg-type] # as the family wants it
    except BaseException:
        sock.close()
        raise
    return sock


def _peer_pid(sock: socket.socket) -> int | None:
    """The process that listens at a UNIX socket. Source: socket(7), SO_PEERCRED."""
    if sock.family != socket.AF_UNIX:
        return None
    pid: int = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    return pid or None


def _unreachable(name: str, address: str, why: str) -> ConfigError:
    return ConfigError(
        Code.QEMU_UNREACHABLE, f"the {name} QEMU cannot be reached at its monitor {address}: {why}"
    )
