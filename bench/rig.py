"""The processes that are measured: page servers, daemons and guests, each the real program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from array import array
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from images import PAGE, Pattern
from placement import placed
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child, ReadySocket, require
from postcopyd.status import Limits, MigrationStatus, State
from programs import ROOT, BenchError, Percentiles, build

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from placement import Placement

sys.path.append(str(ROOT / "tests"))

from tls_support import make_certificates

VARIANTS = ("native", "grpcio", "native_tls")
WAIT_S = 120.0
IDLE = Limits(push_rate=1)
"""A byte a second: one piece is pushed, and its debt keeps the push away for days."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Touched:
    """What a round of touches came to."""

    faults: int
    wall_s: float
    us: Percentiles

    @property
    def pages_s(self) -> float:
        return self.faults / self.wall_s if self.wall_s else 0.0


class Guest:
    """A faulter process: memory that can be handed over and touched."""

    def __init__(self, child: Child, pattern: Pattern) -> None:
        self._child = child
        self.pattern = pattern

    async def ask(self, line: str) -> dict[str, object]:
        """Raises BenchError: a wrong page, or the guest refused."""
        assert self._child.process.stdin is not None
        self._child.process.stdin.write(line.encode() + b"\n")
        answer = await self._child.line(WAIT_S)
        if not answer.get("ok"):
            raise BenchError(f"guest: {line}: {answer}")
        if answer.get("wrong"):
            raise BenchError(f"guest: {line}: {answer['wrong']} pages do not hold what the source has")
        return answer

    async def touch(self, threads: int, each: int, raw: Path | None = None) -> Touched:
        answer = await self.ask(f"touch {threads} {each} {raw or ''}")
        us = cast("dict[str, float]", require(answer, "us"))
        return Touched(
            cast("int", require(answer, "faults")),
            cast("float", require(answer, "wall_s")),
            Percentiles(us["p50"], us["p90"], us["p99"]),
        )

    @property
    def pid(self) -> int:
        return self._child.process.pid

    async def end(self) -> None:
        """Also while its threads wait for pages; idempotent."""
        await self._child.end()


@dataclass(frozen=True)
class Usage:
    """Of one process. CPU seconds so far, memory in MiB."""

    cpu_s: float
    rss_mib: float
    peak_mib: float
    anonymous_mib: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        # proc(5): utime and stime are fields 14 and 15; field 2, in parentheses, may hold blanks.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        memory = {}
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM", "RssAnon"):
                memory[name] = int(value.split()[0]) / 1024
        return cls(
            (int(stat[11]) + int(stat[12])) / TICKS_PER_S, memory["VmRSS"], memory["VmHWM"], memory["RssAnon"]
        )


class Variant:
    """A page server and a daemon that speak the same transport."""

    def __init__(self, name: str, server: Child, address: str, daemon: Child, client: ControlClient) -> None:
        self.name = name
        self.client = client
        self._address = address
        self._server = server
        self._daemon = daemon

    def usage(self) -> tuple[Usage, Usage]:
        """Of the daemon, and of the page server."""
        return Usage.of(self._daemon.process.pid), Usage.of(self._server.process.pid)

    def placed(self, placement: Placement, guest: Guest) -> contextlib.AbstractContextManager[None]:
        """Guest, daemon and page server stay where `placement` says."""
        return placed(placement, guest.pid, self._daemon.process.pid, self._server.process.pid)

    async def prepare(self, image: str, limits: Limits | None = None) -> str:
        """Make a migration; return the socket for its guest."""
        return (await self.client.prepare(image, [self._address], limits=limits or Limits())).socket_path

    async def until(
        self, image: str, wanted: Callable[[MigrationStatus], bool], interval_s: float = 0.1
    ) -> MigrationStatus:
        """Raises BenchError: it ended otherwise."""
        async with asyncio.timeout(WAIT_S):
            async for status in self.client.watch(image, interval_s=interval_s):
                if wanted(status):
                    return status
        raise BenchError(f"{self.name}: migration {image}: {status.state}: {status.error}")

    async def until_state(self, image: str, state: State, interval_s: float = 0.1) -> MigrationStatus:
        return await self.until(image, lambda status: status.state is state, interval_s)

    @contextlib.contextmanager
    def source_stopped(self) -> Iterator[None]:
        """The page server answers nothing meanwhile. Keep it short: a silent source is given up."""
        self._server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.process.send_signal(signal.SIGCONT)

    @contextlib.asynccontextmanager
    async def paused(self, rig: Rig, image: str, pages: int) -> AsyncIterator[Guest]:
        """A guest whose memory is handed over and whose push waits."""
        guest = await rig.guest(pages, rig.patterns[image])
        try:
            await guest.ask(f"handoff {await self.prepare(image, IDLE)}")
            await self.until_state(image, State.RUNNING, 0.01)
            yield guest
        finally:
            await guest.end()
            await self.until(image, lambda status: status.state.is_final)

    async def move(self, rig: Rig, image: str, pages: int, *, cold: bool = False) -> MigrationStatus:
        """Move an image from beginning to end, and check every page."""
        guest = await rig.guest(pages, rig.patterns[image], cold=cold)
        try:
            await guest.ask(f"handoff {await self.prepare(image)}")
            status = await self.until_state(image, State.COMPLETE)
            await guest.ask("check")
        finally:
            await guest.end()
        return status


class Rig:
    """All processes of a run, in a folder on tmpfs; they end with it, guests before daemons before servers."""

    def __init__(self, images: dict[str, tuple[Path, Pattern]], folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.patterns = {name: pattern for name, (_, pattern) in images.items()}
        self._files = {name: path for name, (path, _) in images.items()}
        self._stack = stack
        self._started = 0
        self.variants: dict[str, Variant] = {}

    async def start(self, names: Iterable[str]) -> Self:
        """Start the servers and daemons of these variants."""
        make_certificates(self.folder)
        for name in names:
            self.variants[name] = await self._start_variant(name)
        return self

    async def guest(self, pages: int, pattern: Pattern, *, cold: bool = False) -> Guest:
        """A guest that is ready: its memory is warmed, unless `cold`."""
        log = self._folder("guest") / "log"
        arguments = [str(pages), str(pattern.period), str(pattern.data), *(["cold"] if cold else [])]
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                str(build("faulter")), *arguments, stdin=asyncio.subprocess.PIPE, stdout=-1, stderr=stderr
            )
        child = Child("guest", process, log)
        # Only for when the run fails; else whoever asked for the guest ends it.
        self._stack.push_async_callback(child.end)
        await child.line(WAIT_S)
        return Guest(child, pattern)

    def _folder(self, name: str) -> Path:
        self._started += 1
        folder = self.folder / f"{name}{self._started}"
        folder.mkdir()
        return folder

    async def _start_variant(self, name: str) -> Variant:
        transport = name.removesuffix("_tls")
        folder = self._folder(name)
        serve_tls: list[str] = []
        run_tls: dict[str, str] = {}
        if name.endswith("_tls"):
            pems = {"ca": "ca.pem", "cert": "server.pem", "key": "server.key"}
            serve_tls = [
                part for key, file in pems.items() for part in (f"--tls-{key}", str(self.folder / file))
            ]
            pems = {"CA": "ca.pem", "CERT": "client.pem", "KEY": "client.key"}
            run_tls = {f"POSTCOPYD_TLS_{key}": str(self.folder / file) for key, file in pems.items()}
        images = [part for id, path in self._files.items() for part in ("--image", f"{id}={path}")]
        server = await Child.start(
            f"serve-{name}",
            folder,
            *("postcopyd", "serve", *images, "--keep", "--listen", "127.0.0.1:0", "--log-level", "warning"),
            *("--transport", transport, "--max-streams", "512", *serve_tls),
        )
        self._stack.push_async_callback(server.end)
        address = str(require(await server.line(), "address"))
        ready = ReadySocket(folder)
        self._stack.callback(ready.close)
        environment = {
            "NOTIFY_SOCKET": str(ready.path),
            "POSTCOPYD_HTTP": "",
            "POSTCOPYD_TRANSPORT": transport,
            "POSTCOPYD_MAX_MIGRATIONS": "256",
            "POSTCOPYD_LOG_LEVEL": "warning",
            **run_tls,
        }
        daemon = await Child.start(
            f"run-{name}", folder, "postcopyd", "run", "--state-dir", str(folder), env=environment
        )
        self._stack.push_async_callback(daemon.end)
        await ready.wait_ready(daemon)
        client = await self._stack.enter_async_context(ControlClient(str(folder / "control.sock")))
        return Variant(name, server, address, daemon, client)


def image_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder on tmpfs: a disk is not what is measured."""
    if not os.path.isdir("/dev/shm"):
        raise BenchError("the images need a tmpfs at /dev/shm")
    return tempfile.TemporaryDirectory(prefix="postcopyd-bench-", dir="/dev/shm")


def read_latencies(path: Path) -> array[int]:
    """Nanoseconds, sorted, as the faulter wrote them."""
    values = array("Q")
    values.frombytes(path.read_bytes())
    return array("Q", sorted(values))


def pages_of(mib: int) -> int:
    return mib * (1 << 20) // PAGE
