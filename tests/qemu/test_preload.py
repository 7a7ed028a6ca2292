"""The preload shim under a program that maps a file and knows nothing else, against a daemon process."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import preload_vmm
from harness import PATIENCE_S, Host, LocalDaemon, content_of, huge_pages, local_daemon
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child, ReadySocket
from postcopyd.errors import ConfigError
from postcopyd.qemu.preload import library_path
from postcopyd.source.image import ImageSpec
from postcopyd.source.options import ServerOptions
from postcopyd.source.server import PageServer, serve
from postcopyd.status import Limits, MigrationSpec, State
from support import require_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGES = 512
SIZE = PAGES * 4096


@pytest.fixture(autouse=True)
def _uffd() -> None:
    require_uffd()


class Bench(Host):
    """A page server and a daemon in this process, and VMMs with the shim."""

    content = content_of(PAGES)
    server: PageServer
    postcopyd: LocalDaemon

    async def begin(self, size: int = SIZE) -> None:
        if size != SIZE:
            self.content = content_of(size // 4096)
        self.source = self.image("source-ram", self.content)
        self.address = await self.serve("vm", self.source)
        self.postcopyd = await self._stack.enter_async_context(local_daemon())
        self.ram = self.image("ram", b"")
        os.truncate(self.ram, size)
        self.socket = str(self.folder / "vm.sock")

    async def serve(self, id: str, path: Path) -> str:
        server = await serve([ImageSpec(id, str(path))], "127.0.0.1:0", ServerOptions())
        self._stack.push_async_callback(server.stop)
        return server.address

    async def daemon_at_home(self) -> Child:
        """Processes that share a state folder, one after the other, and have no service manager."""
        home = self.folder / "home"
        self.control = str(home / "control.sock")
        self._started += 1
        folder = self.folder / f"ready{self._started}"
        folder.mkdir()
        ready = ReadySocket(folder)
        self._stack.callback(ready.close)
        env = {"NOTIFY_SOCKET": str(ready.path), "POSTCOPYD_HTTP": "", "POSTCOPYD_STORE_MAX": "0"}
        child = await self.spawn("daemon", "postcopyd", "run", "--state-dir", str(home), **env)
        await ready.wait_ready(child)
        return child

    async def prepare(self, push_rate: int = 0, socket: str = "", present: bytes = b"") -> None:
        spec = self.spec("vm", self.address, push_rate, socket or self.socket)
        await self.postcopyd.manager.prepare(spec, present)

    @staticmethod
    def spec(id: str, address: str, push_rate: int, socket: str) -> MigrationSpec:
        return MigrationSpec(id, (address,), socket, limits=Limits(push_rate=push_rate))

    async def vmm(self, ram: str | None = None, **variables: str) -> Child:
        log = self.folder / "vmm.log"
        env = {
            **os.environ,
            "LD_PRELOAD": str(library_path()),
            "POSTCOPYD_RAM": ram or str(self.ram),
            "POSTCOPYD_SOCKET": self.socket,
            **variables,
        }
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(Path(preload_vmm.__file__)),
                stdin=-1,
                stdout=-1,
                stderr=stderr,
                env={name: value for name, value in env.items() if value},
            )
        child = Child("vmm", process, log)
        self._stack.push_async_callback(child.end)
        return child

    async def map(self, vmm: Child, **more: object) -> None:
        command: dict[str, Any] = {"path": str(self.ram), "size": SIZE, **more}
        await vmm.command("map", PATIENCE_S, **command)

    async def digest(self, vmm: Child, **more: object) -> object:
        command: dict[str, Any] = {"size": SIZE, **more}
        return (await vmm.command("digest", PATIENCE_S, **command))["result"]

    def expected(self, start: int = 0, end: int = SIZE) -> str:
        return hashlib.sha256(self.content[start:end]).hexdigest()

    async def ended(self, vmm: Child, **command: object) -> str:
        """Have it do something that the shim ends it for; what it says."""
        with pytest.raises(Exception, match="it ended"):
            await self.map(vmm, **command)
        async with asyncio.timeout(PATIENCE_S):
            assert await vmm.process.wait() == 1
        return (self.folder / "vmm.log").read_text()


@asynccontextmanager
async def bench(size: int = SIZE) -> AsyncIterator[Bench]:
    async with Bench() as host:
        await host.begin(size)
        yield host


def descriptors(vmm: Child) -> list[str]:
    folder = Path(f"/proc/{vmm.process.pid}/fd")
    return [os.readlink(fd) for fd in folder.iterdir()]


def mapped_with(vmm: Child, ram: Path) -> str:
    """The kernel's flags of the mapping, by /proc/PID/smaps."""
    text = Path(f"/proc/{vmm.process.pid}/smaps").read_text()
    found = re.search(rf"{re.escape(str(ram))}\n.*?VmFlags: ([^\n]*)", text, re.DOTALL)
    assert found is not None
    return found[1]


async def complete(daemon: LocalDaemon) -> None:
    await daemon.until_state("vm", State.COMPLETE)


async def test_a_program_that_maps_a_file_gets_the_sources_content() -> None:
    async with bench() as host:
        await host.prepare()
        vmm = await host.vmm()
        await host.map(vmm)
        assert await host.digest(vmm) == host.expected()
        await complete(host.postcopyd)


async def test_after_completion_nothing_of_the_shim_is_left() -> None:
    async with bench() as host:
        await host.prepare()
        vmm = await host.vmm()
        await host.map(vmm)
        await complete(host.postcopyd)
        async with asyncio.timeout(PATIENCE_S):
            while any("userfaultfd" in name for name in descriptors(vmm)):
                await vmm.command("run", argv=["true"])
        assert "um" not in mapped_with(vmm, host.ram).split()
        # A further mapping is an ordinary one.
        await host.map(vmm)
        assert await host.digest(vmm) == host.expected()


async def test_without_variables_it_does_nothing() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_SOCKET="", POSTCOPYD_RAM="")
        # Not through the fixture's default, which would set it.
        await host.map(vmm)
        assert await host.digest(vmm) == hashlib.sha256(bytes(SIZE)).hexdigest()
        assert (host.folder / "vmm.log").read_text() == ""


async def test_one_variable_alone_ends_the_vmm_before_it_begins() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_SOCKET="")
        assert "POSTCOPYD_RAM is set and POSTCOPYD_SOCKET is not" in await host.ended(vmm)


async def test_a_vmm_without_its_daemon_does_not_begin() -> None:
    async with bench() as host:
        vmm = await host.vmm()
        assert "cannot be handed over" in await host.ended(vmm)


async def test_a_refused_handoff_ends_the_vmm() -> None:
    async with bench() as host:
        await host.prepare()
        os.truncate(host.ram, 2 * SIZE)
        vmm = await host.vmm()
        assert "refused" in await host.ended(vmm, size=2 * SIZE)


async def test_a_private_mapping_is_refused() -> None:
    async with bench() as host:
        await host.prepare()
        assert "share=on" in await host.ended(await host.vmm(), private=True)


async def test_a_file_with_an_older_guests_memory_is_refused() -> None:
    async with bench() as host:
        await host.prepare()
        with host.ram.open("r+b") as file:
            file.seek(3 * 4096)
            file.write(b"old")
        assert "holds data already" in await host.ended(await host.vmm())


async def test_pages_copied_beforehand_are_kept_and_not_fetched_and_old_ones_are_replaced() -> None:
    async with bench() as host:
        good = range(64, 128)
        bitmap = b"".join(b"\xff" if page in good else b"\0" for page in range(0, PAGES, 8))
        (host.folder / "bitmap").write_bytes(bitmap)
        with host.ram.open("r+b") as file:
            file.write(b"old" * (SIZE // 3))
            file.seek(good.start * 4096)
            file.write(host.content[good.start * 4096 : good.stop * 4096])
        await host.prepare(present=bitmap)
        vmm = await host.vmm(POSTCOPYD_PRESENT=str(host.folder / "bitmap"))
        await host.map(vmm)
        assert await host.digest(vmm) == host.expected()
        await complete(host.postcopyd)
        status = host.postcopyd.manager.get("vm")
        assert status.pages_total == PAGES
        # Holes of the source are marked and not fetched: there is none, as every page was written.
        assert status.pages_demand + status.pages_pushed + status.pages_zero == PAGES - len(good)


async def test_a_guest_that_has_every_page_already_completes_at_once() -> None:
    async with bench() as host:
        (host.folder / "bitmap").write_bytes(b"\xff" * (PAGES // 8))
        host.ram.write_bytes(host.content)
        await host.prepare(present=b"\xff" * (PAGES // 8))
        vmm = await host.vmm(POSTCOPYD_PRESENT=str(host.folder / "bitmap"))
        await host.map(vmm)
        await complete(host.postcopyd)
        assert await host.digest(vmm) == host.expected()


async def test_a_bitmap_of_another_guest_is_refused() -> None:
    async with bench() as host:
        with pytest.raises(ConfigError, match="beyond"):
            await host.prepare(present=bytes(PAGES // 8) + b"\1")


async def test_a_file_on_a_disk_is_refused(tmp_path: Path) -> None:
    async with bench() as host:
        await host.prepare()
        disk = tmp_path / "ram"
        disk.touch()
        os.truncate(disk, SIZE)
        if os.statvfs(tmp_path).f_fsid == os.statvfs("/dev/shm").f_fsid:
            pytest.skip("the folder for temporary files is tmpfs too")
        assert "memory file system" in await host.ended(await host.vmm(str(disk)), path=str(disk))


async def test_a_second_mapping_of_the_same_bytes_is_refused() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_WAIT="1")
        await host.map(vmm)
        assert "mapped twice" in await host.ended(vmm)


async def test_with_wait_the_handoff_comes_when_the_socket_does() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_WAIT="1")
        half = SIZE // 2
        await host.map(vmm, size=half)
        await host.map(vmm, size=half, offset=half)
        assert "um" in mapped_with(vmm, host.ram).split()
        await host.prepare(socket=f"{host.socket}.hidden")
        os.symlink(f"{host.socket}.hidden", host.socket)
        assert await host.digest(vmm, size=half) == host.expected(0, half)
        assert await host.digest(vmm, size=half, mapping=half) == host.expected(half)


async def test_several_files_have_a_migration_each() -> None:
    async with bench() as host:
        other = host.image("other", b"")
        os.truncate(other, SIZE)
        turned = host.image("turned", host.content[::-1])
        address = await host.serve("second", turned)
        await host.prepare()
        second = str(host.folder / "second.sock")
        await host.postcopyd.manager.prepare(host.spec("second", address, 0, second))
        vmm = await host.vmm(f"{host.ram},{other}", POSTCOPYD_SOCKET=f"{host.socket},{second}")
        await host.map(vmm)
        assert await host.digest(vmm) == host.expected()
        await host.map(vmm, path=str(other))
        assert await host.digest(vmm) == hashlib.sha256(host.content[::-1]).hexdigest()


async def test_a_memfd_is_found_by_the_beginning_of_its_name() -> None:
    async with bench() as host:
        await host.prepare()
        vmm = await host.vmm("/memfd:guest*")
        await vmm.command("memfd", name="guest-ram", size=SIZE)
        assert await host.digest(vmm) == host.expected()


async def test_memory_in_huge_pages() -> None:
    size = 4 << 20
    with huge_pages(2):
        async with bench(size) as host:
            await host.prepare()
            vmm = await host.vmm("/memfd:guest*")
            await vmm.command("memfd", name="guest-ram", size=size, huge=True)
            assert await host.digest(vmm, size=size) == host.expected(0, size)
            await complete(host.postcopyd)
            assert host.postcopyd.manager.get("vm").pages_total == 2
            # The pages are reserved until its end.
            await vmm.end()


async def test_a_forked_child_has_no_guest_memory_and_harms_none() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_WAIT="1")
        await host.map(vmm)
        assert (await vmm.command("fork"))["result"] == "signal 11"
        await host.prepare()
        assert await host.digest(vmm) == host.expected()


async def test_programs_that_the_vmm_starts_are_left_alone() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_WAIT="1")
        await host.map(vmm)
        assert (await vmm.command("run", argv=["true"]))["result"] == 0


async def test_memory_dropped_before_the_handoff_is_not_handed_over() -> None:
    async with bench() as host:
        vmm = await host.vmm(POSTCOPYD_WAIT="1")
        await host.map(vmm)
        await vmm.command("unmap", skip=8 * 4096, size=16 * 4096)
        await host.prepare()
        assert await host.digest(vmm, size=8 * 4096) == host.expected(0, 8 * 4096)
        assert await host.digest(vmm, size=SIZE - 24 * 4096, skip=24 * 4096) == host.expected(24 * 4096)
        await complete(host.postcopyd)
        assert host.postcopyd.manager.get("vm").pages_total == PAGES - 16


async def test_memory_dropped_while_absent_does_not_keep_the_rest_back() -> None:
    async with bench() as host:
        await host.prepare(push_rate=4096)
        vmm = await host.vmm()
        await host.map(vmm)
        await vmm.command("unmap", skip=256 * 4096, size=16 * 4096)
        await host.postcopyd.manager.set_limits("vm", Limits())
        await complete(host.postcopyd)
        assert await host.digest(vmm, size=256 * 4096) == host.expected(0, 256 * 4096)


async def test_memory_moved_while_absent_gets_its_content_where_it_is_now() -> None:
    async with bench() as host:
        await host.prepare(push_rate=4096)
        vmm = await host.vmm()
        await host.map(vmm)
        start, size = 300 * 4096, 32 * 4096
        await vmm.command("move", skip=start, size=size)
        assert await host.digest(vmm, mapping=-1, size=size) == host.expected(start, start + size)


async def test_a_daemon_that_dies_is_replaced_and_nothing_reads_zero() -> None:
    async with bench() as host:
        limits = Limits(push_rate=4096)
        first = await host.daemon()
        await first.client.prepare("vm", [host.address], socket_path=host.socket, limits=limits)
        vmm = await host.vmm()
        await host.map(vmm)
        first.child.process.kill()
        await first.child.process.wait()
        reading = asyncio.create_task(host.digest(vmm))
        await asyncio.to_thread(_until_it_waits, vmm, host.folder / "vmm.log")
        assert not reading.done()
        await host.prepare()
        assert await reading == host.expected()
        await complete(host.postcopyd)


async def test_a_daemon_that_comes_back_goes_on_where_it_stopped() -> None:
    async with bench() as host:
        first = await host.daemon_at_home()
        async with ControlClient(host.control) as client:
            await client.prepare("vm", [host.address], socket_path=host.socket, limits=Limits(push_rate=4096))
        vmm = await host.vmm()
        await host.map(vmm)
        # Zeros that the guest made must not be fetched again.
        dropped = 40 * 4096
        await vmm.command("discard", skip=0, size=dropped)
        first.process.kill()
        await first.process.wait()
        await host.daemon_at_home()
        async with ControlClient(host.control) as client:
            await client.set_limits("vm", Limits())
            *_, status = [status async for status in client.watch("vm", interval_s=0.01)]
        assert status.state is State.COMPLETE
        assert status.pages_removed == 40
        assert await host.digest(vmm, size=dropped) == hashlib.sha256(bytes(dropped)).hexdigest()
        assert await host.digest(vmm, skip=dropped, size=SIZE - dropped) == host.expected(dropped)


def _until_it_waits(vmm: Child, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "handed over again" not in log.read_text():
        assert time.monotonic() < deadline
        os.sched_yield()
