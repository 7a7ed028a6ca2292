"""The daemon under test: its programs as real processes, or its manager in this process, and guests for both.

A `LocalGuest` is memory of the test's own process behind a userfaultfd. Its reads happen in threads that hold no
lock of the interpreter, so they may wait for pages that an event loop of the same process brings.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from postcopyd.config import load_config
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child, ReadySocket, require
from postcopyd.manager import Manager
from postcopyd.sdnotify import Notifier
from postcopyd.status import MigrationSpec, MigrationStatus, State
from postcopyd.store import DescriptorStore
from postcopyd.transport.factory import make_factory
from postcopyd.units import PAGE_SIZE
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.handoff_client import HandoffFormat, hand_off
from postcopyd.vmm.uffd_client import Feature, register_memory
from support import require_uffd

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator

    from postcopyd.status import Limits

TRANSPORTS = ("native", "grpcio")
PATIENCE_S = 30.0
"""For whatever must happen; a wait that takes so long is a failure, and nothing is ever measured by it."""

NR_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder for images and sockets, on tmpfs where there is one; its short name leaves room for sockets."""
    root = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="postcopyd-test-", dir=root) as name:
        yield Path(name)


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Reserve huge pages and give them back; skip where they cannot be had."""
    try:
        before = int(NR_HUGE_PAGES.read_text())
        NR_HUGE_PAGES.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error}")
    try:
        if int(NR_HUGE_PAGES.read_text()) < before + count:
            pytest.skip(f"no {count} huge pages are free")
        yield
    finally:
        # Taken back as a difference: others may have reserved some meanwhile.
        NR_HUGE_PAGES.write_text(str(max(0, int(NR_HUGE_PAGES.read_text()) - count)))


def content_of(pages: int, *, seed: int = 1) -> bytes:
    """Pages that differ from each other, every eighth of them zero."""
    made = [
        bytes(PAGE_SIZE) if page % 8 == 5 else hashlib.shake_128(b"%d %d" % (seed, page)).digest(PAGE_SIZE)
        for page in range(pages)
    ]
    return b"".join(made)


class LocalGuest:
    """Fresh memory that is handed over. Close it: that also frees every thread that still waits for a page."""

    def __init__(
        self,
        len_bytes: int,
        kind: MemoryKind = MemoryKind.ANONYMOUS,
        features: Feature = Feature.EVENT_REMOVE,
    ) -> None:
        require_uffd()
        self.memory = GuestMemory(kind, len_bytes)
        self.uffd = register_memory(self.memory, features | Feature.THREAD_ID)
        self._socket: socket.socket | None = None
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="guest")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.uffd.unregister(self.memory.address, self.memory.len_bytes)
        await asyncio.to_thread(self._threads.shutdown)
        if self._socket is not None:
            self._socket.close()
        self.uffd.close()
        self.memory.close()

    async def hand_off(
        self, path: str | Path, fmt: HandoffFormat = HandoffFormat.FRAMED, regions: int = 1
    ) -> None:
        """Raises HandoffError: refused."""
        self._socket = await asyncio.to_thread(
            hand_off, Path(path), self.uffd, self.memory, fmt, regions=regions, timeout_s=PATIENCE_S
        )

    def reading(self, offset: int = 0, len_bytes: int = PAGE_SIZE) -> asyncio.Future[bytes]:
        """Begin to read, which goes on for as long as a page of the range is absent."""
        return asyncio.get_running_loop().run_in_executor(self._threads, self.memory.read, offset, len_bytes)

    async def read_all(self) -> bytes:
        """Read everything, by several threads in different places at once."""
        size, parts = self.memory.len_bytes, 4
        cuts = [size // parts // self.memory.page_size * self.memory.page_size * i for i in range(parts)] + [
            size
        ]
        pieces = [self.reading(a, b - a) for a, b in itertools.pairwise(cuts) if b > a]
        async with asyncio.timeout(PATIENCE_S):
            return b"".join(await asyncio.gather(*pieces))

    async def discard(self, offset: int, len_bytes: int) -> None:
        """Give pages back as a balloon does."""
        await asyncio.get_running_loop().run_in_executor(
            self._threads, self.memory.discard, offset, len_bytes
        )


@dataclass
class LocalDaemon:
    """A manager in this process, without a control socket."""

    manager: Manager
    folder: Path

    async def prepare(
        self, id: str, *sources: str, limits: Limits | None = None, epoch: int | None = None
    ) -> MigrationStatus:
        limits = limits or self.manager._config.default_limits()
        return await self.manager.prepare(MigrationSpec(id, sources, limits=limits, epoch=epoch))

    async def until(self, id: str, wanted: Callable[[MigrationStatus], bool]) -> MigrationStatus:
        """Return the first status that is `wanted`, looking at every change."""
        async with asyncio.timeout(PATIENCE_S), self.manager.changes(id) as changed:
            while not wanted(status := self.manager.get(id)):
                assert not status.state.is_final, f"ended before its time: {status}"
                changed.clear()
                await changed.wait()
            return status

    async def until_state(self, id: str, state: State) -> MigrationStatus:
        return await self.until(id, lambda status: status.state is state)


@asynccontextmanager
async def local_daemon(**settings: object) -> AsyncIterator[LocalDaemon]:
    """A manager with this configuration. At its end what it holds is closed, as the end of its process would."""
    with memory_folder() as folder:
        config = load_config(None, {"state_dir": str(folder), "http": "", **settings}, environ={})
        manager = Manager(config, make_factory(config), DescriptorStore(Notifier(""), 0))
        try:
            yield LocalDaemon(manager, folder)
        finally:
            await manager.close()
            for entry in manager._entries.values():
                if entry.serving is not None and not entry.serving.done():
                    entry.serving.cancel()
                    await asyncio.gather(entry.serving, return_exceptions=True)
                    assert entry.session._memory is not None
                    entry.session._memory.pager.close()
                    entry.session._memory.state.close()
                    entry.session._memory.vmm.close()


@dataclass
class DaemonProcess:
    """`postcopyd run`, ready."""

    child: Child
    client: ControlClient
    control: str
    transport: str

    @property
    def pid(self) -> int:
        return self.child.process.pid

    def descriptors(self) -> list[str]:
        """What it has open, sorted; a descriptor that vanishes meanwhile is passed over.

        Not the sockets of grpcio, which closes them when it likes.
        """
        found = []
        for entry in os.scandir(f"/proc/{self.pid}/fd"):
            try:
                found.append(os.readlink(entry.path).split(":[")[0])
            except FileNotFoundError:
                continue
        return sorted(name for name in found if self.transport == "native" or name != "socket")

    async def until_descriptors(self, wanted: list[str]) -> None:
        """Wait until exactly these are open: sockets are closed a moment after a state is told."""
        async with asyncio.timeout(PATIENCE_S):
            while self.descriptors() != wanted:
                await self.client.list()

    def memory_bytes(self, field: str = "VmRSS") -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"/proc/PID/status has no {field}")

    async def until(self, id: str, wanted: Callable[[MigrationStatus], bool]) -> MigrationStatus:
        async with asyncio.timeout(PATIENCE_S):
            async for status in self.client.watch(id, interval_s=0.01):
                if wanted(status):
                    return status
        raise AssertionError(f"ended before its time: {status}")

    async def until_state(self, id: str, state: State) -> MigrationStatus:
        return await self.until(id, lambda status: status.state is state)


class Host:
    """The processes of one test, in `folder`; they end with it, those started last first."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._started = 0

    async def __aenter__(self) -> Self:
        self.folder = self._stack.enter_context(memory_folder())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def image(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    async def spawn(self, name: str, *argv: str, **env: str) -> Child:
        """Run `python -m argv…`."""
        self._started += 1
        child = await Child.start(f"{name}-{self._started}", self.folder, *argv, env=env)
        self._stack.push_async_callback(child.end)
        return child

    async def page_server(
        self, *images: str, listen: str = "127.0.0.1:0", options: tuple[str, ...] = ()
    ) -> tuple[Child, str]:
        """Serve images, each ID=PATH; return the process and its address."""
        named = [part for image in images for part in ("--image", image)]
        server = await self.spawn("serve", "postcopyd", "serve", *named, "--listen", listen, *options)
        return server, str(require(await server.line(), "address"))

    async def daemon(self, transport: str = "native", **settings: str) -> DaemonProcess:
        """`settings` are configuration keys. The HTTP endpoint is off unless one names it."""
        self._started += 1
        home = self.folder / f"d{self._started}"
        home.mkdir()
        ready = ReadySocket(home)
        self._stack.callback(ready.close)
        variables = {"transport": transport, "http": "", **settings}
        child = await self.spawn(
            "daemon",
            *("postcopyd", "run", "--state-dir", str(home)),
            NOTIFY_SOCKET=str(ready.path),
            **{f"POSTCOPYD_{key.upper()}": value for key, value in variables.items()},
        )
        await ready.wait_ready(child)
        control = str(home / "control.sock")
        client = await self._stack.enter_async_context(ControlClient(control))
        return DaemonProcess(child, client, control, transport)

    async def paused_source(self, *shape: str, steps: int = 2000) -> tuple[Path, Path]:
        """Run a guest of this shape for a while; return the files of its memory and of its registers."""
        ram, registers = self.folder / "ram", self.folder / "registers.json"
        vmm = await self.spawn("source", "postcopyd.vmm", "source", *shape, "--ram", str(ram))
        await vmm.line()
        await vmm.command("start")
        await vmm.command("wait", steps=steps, timeout_s=PATIENCE_S)
        await vmm.command("pause")
        await vmm.command("save", path=str(registers))
        return ram, registers

    async def destination(self, socket_path: str, registers: Path, *shape: str) -> Child:
        """A guest that goes on from `registers`, its memory handed over at `socket_path`."""
        vmm = await self.spawn("destination", "postcopyd.vmm", "destination", *shape, "--socket", socket_path)
        await vmm.line()
        await vmm.command("load", path=str(registers))
        await vmm.command("start")
        return vmm

    async def cli(self, *args: str) -> tuple[int, str, str]:
        """Run `postcopyd args…` to its end; return exit status, standard output and standard error."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "postcopyd", *args, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, out.decode(), err.decode()

    async def cli_json(self, *args: str) -> dict[str, object]:
        """Run a command that must succeed, with --json."""
        status, out, err = await self.cli(*args, "--json")
        assert status == 0, (status, out, err)
        parsed: dict[str, object] = json.loads(out)
        return parsed
