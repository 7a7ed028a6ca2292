"""Two hosts of one machine: network name spaces with a cable between them that can be cut and slowed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from enum import StrEnum
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SOURCE_ADDRESS = "10.213.77.1"
DESTINATION_ADDRESS = "10.213.77.2"


class Direction(StrEnum):
    """As seen by the destination."""

    IN = "in"
    OUT = "out"
    BOTH = "both"


def require_network() -> None:
    """Skip where name spaces cannot be cut apart."""
    missing = [name for name in ("ip", "nft", "tc") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)}")


class Network:
    """Started by `async with`; gone with it."""

    def __init__(self) -> None:
        self.source = f"postcopyd-s{os.getpid()}"
        self.destination = f"postcopyd-d{os.getpid()}"

    async def __aenter__(self) -> Self:
        try:
            for name in (self.source, self.destination):
                await run("ip", "netns", "add", name)
            await run(
                *("ip", "-n", self.source, "link", "add", "wire", "type", "veth"),
                *("peer", "name", "wire", "netns", self.destination),
            )
            for name, address in ((self.source, SOURCE_ADDRESS), (self.destination, DESTINATION_ADDRESS)):
                await run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "wire")
                for link in ("wire", "lo"):
                    await run("ip", "-n", name, "link", "set", link, "up")
            await self._nft("add", "table", "inet", "cut")
            for hook in ("input", "output"):
                await self._nft(f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in (self.source, self.destination):
            with contextlib.suppress(AssertionError):
                await run("ip", "netns", "del", name)

    @contextlib.asynccontextmanager
    async def cut(self, direction: Direction) -> AsyncIterator[None]:
        """Packets vanish without a word."""
        try:
            if direction is not Direction.OUT:
                await self._nft("add", "rule", "inet", "cut", "input", "iifname", "wire", "drop")
            if direction is not Direction.IN:
                await self._nft("add", "rule", "inet", "cut", "output", "oifname", "wire", "drop")
            yield
        finally:
            await self._nft("flush", "table", "inet", "cut")

    @contextlib.asynccontextmanager
    async def slow(self, bytes_per_s: int) -> AsyncIterator[None]:
        """What the source sends is squeezed through a token bucket."""
        await run(
            *("tc", "-n", self.source, "qdisc", "add", "dev", "wire", "root", "tbf"),
            *("rate", f"{bytes_per_s}bps", "burst", "64k", "latency", "100ms"),
        )
        try:
            yield
        finally:
            await run("tc", "-n", self.source, "qdisc", "del", "dev", "wire", "root")

    async def _nft(self, *command: str) -> None:
        await run("nsenter", f"--net=/run/netns/{self.destination}", "nft", *command)


async def run(*command: str) -> str:
    """Run a command that must succeed; return its output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, f"{' '.join(command)}: {err.decode()}"
    return out.decode()
