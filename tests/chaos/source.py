"""The page server on the source host, which dies, comes back, and comes back with another image."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from chaos.network import SOURCE_ADDRESS
from postcopyd.demo.processes import require
from private_systemd import ChildInside

if TYPE_CHECKING:
    from pathlib import Path

    from chaos.network import Network

ADDRESS = f"{SOURCE_ADDRESS}:50051"


class Source:
    """Serves `ram` under any of `ids`."""

    def __init__(self, network: Network, folder: Path, ram: Path, ids: tuple[str, ...]) -> None:
        self._network = network
        self._folder = folder
        self._ram = ram
        self._ids = ids
        self._child: ChildInside | None = None

    async def start(self, ram: Path | None = None) -> None:
        """Return when it listens; on `ram`, another image, if given."""
        with (self._folder / "source.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *("nsenter", f"--net=/run/netns/{self._network.source}", sys.executable, "-m", "postcopyd", "serve"),
                *(part for id in self._ids for part in ("--image", f"{id}={ram or self._ram}")),
                *("--listen", ADDRESS, "--keep", "--transport", "native"),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True, env=os.environ,
            )  # fmt: skip
        self._child = ChildInside("source", process, self._folder / "source.log")
        require(await self._child.line(), "address")

    async def kill(self) -> None:
        """SIGKILL; idempotent."""
        child, self._child = self._child, None
        if child is not None:
            await child.end()
