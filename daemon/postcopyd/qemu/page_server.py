"""The page server of one migration: a process that must not end before the guest has its memory.

It is in a session of its own, so that an interrupt at the terminal does not reach it, and it is started again, at the
same address and with the same epoch, when it ends.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import TYPE_CHECKING

import structlog

from ..demo.processes import Child, require

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

RESTARTS = 5
RESTART_PAUSE_S = 0.2


class ServedFiles:
    """A page server for `files`, pairs of image id and path. epoch: of every image, whoever serves it."""

    def __init__(self, files: Sequence[tuple[str, str]], folder: Path) -> None:
        self.epoch = secrets.randbits(63) | 1
        self.address = "127.0.0.1:0"
        self._images = [f"{id}={path}@{self.epoch:#x}" for id, path in files]
        self._folder = folder
        self._child: Child | None = None
        self._starts = 0

    @property
    def pid(self) -> int:
        return 0 if self._child is None else self._child.process.pid

    def command(self) -> list[str]:
        """What an operator would type to have the same images served again."""
        images = [part for image in self._images for part in ("--image", image)]
        return ["postcopyd", "serve", *images, "--listen", self.address, "--transport", "native"]

    async def start(self) -> None:
        """Return when it listens. Raises MigrationError: it does not; the message has the end of its log."""
        self._starts += 1
        path = self._folder / f"page-server-{self._starts}.log"
        with path.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *self.command()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._child = Child("page server", process, path)
        self.address = str(require(await self._child.line(), "address"))

    async def keep_running(self) -> None:
        """Start it again whenever it ends; returns when it ended too often."""
        for _ in range(RESTARTS):
            assert self._child is not None
            status = await self._child.process.wait()
            log.error("page_server.ended", exit_status=status, address=self.address)
            await asyncio.sleep(RESTART_PAUSE_S)
            await self.start()
        log.error("page_server.given_up", starts=self._starts)

    async def end(self) -> None:
        """Only when no guest needs it; idempotent."""
        if self._child is not None:
            await self._child.end()
