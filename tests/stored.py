"""A daemon that is started with descriptors which a service manager kept, as this test says."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING, Self

from harness import PATIENCE_S
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class StoredDaemon:
    """Started by `async with`, ready. `told` are the messages that the service manager got so far."""

    def __init__(self, folder: Path, kept: Mapping[str, int], **settings: str) -> None:
        """`kept`: descriptors by their FDNAME; they stay the caller's."""
        self.folder = folder
        self.told: list[dict[str, str]] = []
        self._kept = dict(kept)
        self._settings = settings
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    async def __aenter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / "notify.sock"
        path.unlink(missing_ok=True)
        self._sock.bind(str(path))
        moves = " ".join(f"{place}<&{fd}" for place, fd in enumerate(self._kept.values(), 3))
        settings = {"state_dir": str(self.folder), "http": "", "transport": "native", "store_max": "64"}
        log = (self.folder / "daemon.log").open("wb")
        with log:
            process = await asyncio.create_subprocess_exec(
                *("/bin/bash", "-c", f'exec {moves}; export LISTEN_PID=$$; exec "$@"', "sh"),
                *(sys.executable, "-m", "postcopyd", "run"),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                pass_fds=tuple(self._kept.values()),
                env={
                    **os.environ,
                    **{f"POSTCOPYD_{key.upper()}": value for key, value in {**settings, **self._settings}.items()},
                    "NOTIFY_SOCKET": str(path),
                    "LISTEN_FDS": str(len(self._kept)),
                    "LISTEN_FDNAMES": ":".join(self._kept),
                },
            )  # fmt: skip
        self.child = Child("daemon", process, self.folder / "daemon.log")
        try:
            await self.until_told("READY")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.child.process.returncode is None:
            self.child.process.kill()
        await self.child.process.wait()
        self._sock.close()

    def client(self) -> ControlClient:
        return ControlClient(str(self.folder / "control.sock"))

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def open_files(self) -> set[str]:
        folder = f"/proc/{self.child.process.pid}/fd"
        return {os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}

    async def until_told(self, field: str, value: str = "") -> None:
        """Return when the manager got a message with `field`, and this value if there is one."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not any(
                field in message and (not value or message[field] == value) for message in self.told
            ):
                text = (await loop.sock_recv(self._sock, 4096)).decode()
                self.told.append(dict(line.split("=", 1) for line in text.splitlines()))

    @property
    def removed(self) -> list[str]:
        """Names that the manager was asked to let go, as far as they were read."""
        return [message["FDNAME"] for message in self.told if "FDSTOREREMOVE" in message]
