"""The demo's processes: the programs of this package, started as an operator would and ended by their pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, InvariantError, MigrationError, PostcopyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
LOG_TAIL_BYTES = 2000


class Child:
    """A process of ours; its log is a file that is shown when it fails."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, folder: Path, *argv: str, env: Mapping[str, str] | None = None) -> Child:
        """Run `python -m argv…` with pipes on its standard input and output."""
        log = folder / f"{name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        return cls(name, process, log)

    def failure(self, what: str) -> PostcopyError:
        """What went wrong, with the end of the process's log."""
        tail = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return MigrationError(Code.DEMO_FAILED, f"{self.name}: {what}; the end of its log:\n{tail}")

    async def line(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, object]:
        """Read a line of JSON.

        Raises:
            MigrationError: DEMO_FAILED: it ended, or said nothing in time.
        """
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                text = await self.process.stdout.readline()
        except TimeoutError:
            raise self.failure(f"no answer within {timeout_s:g} s") from None
        if not text:
            raise self.failure("it ended")
        return msgspec.json.decode(text, type=dict[str, object])

    async def command(
        self, command: str, answer_within_s: float = START_TIMEOUT_S, **arguments: object
    ) -> dict[str, object]:
        """Tell a VMM process something; return its answer. Raises MigrationError: it refused."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode({"command": command, **arguments}) + b"\n")
        answer = await self.line(answer_within_s)
        if not answer.get("ok"):
            raise self.failure(f"{command} was refused: {answer.get('error')}")
        return answer

    async def end(self) -> None:
        """SIGTERM, and SIGKILL when that does not help; idempotent."""
        if self.process.returncode is not None:
            return
        for end in (self.process.terminate, self.process.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
            try:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await self.process.wait()
            except TimeoutError:
                continue
            return


class ReadySocket:
    """Receives the sd_notify messages of a child, so that nobody has to guess when it is ready."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify.sock"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(str(self.path))

    async def wait_ready(self, child: Child) -> None:
        """Raises MigrationError: the child ended, or was not ready in time."""
        loop = asyncio.get_running_loop()
        ended = asyncio.ensure_future(child.process.wait())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    message = asyncio.ensure_future(loop.sock_recv(self._sock, 4096))
                    await asyncio.wait({message, ended}, return_when=asyncio.FIRST_COMPLETED)
                    if not message.done():
                        message.cancel()
                        raise child.failure("it ended")
                    if b"READY=1" in message.result().split(b"\n"):
                        return
        except TimeoutError:
            raise child.failure("it was not ready in time") from None
        finally:
            ended.cancel()

    def close(self) -> None:
        self._sock.close()


def require(answer: dict[str, object], key: str) -> object:
    """The value of `key`. Raises InvariantError if one of our programs left it out."""
    try:
        return answer[key]
    except KeyError:
        raise InvariantError(f"an answer lacks {key!r}: {answer}") from None
