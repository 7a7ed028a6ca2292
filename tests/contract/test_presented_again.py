"""A VMM that keeps what it handed over, and presents it again when its daemon is gone or its connection broke."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, Host, LocalGuest, content_of
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child, ReadySocket
from postcopyd.errors import Code
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAGES = 1024
CONTENT = content_of(PAGES)
SLOW = Limits(push_rate=PAGE_SIZE)
ACK = b"\x01"


def page(number: int) -> bytes:
    return CONTENT[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


class KeepingVmm:
    """Speaks the framed hand-off for `guest`, and keeps the state memory that comes with the answer."""

    def __init__(self, guest: LocalGuest) -> None:
        self._guest = guest
        self._sock: socket.socket | None = None
        self.state = -1

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        if self.state >= 0:
            os.close(self.state)

    async def present(self, path: Path, state: int | None = None) -> bool:
        """Hand over, with `state` if given; return whether it was taken. The state that comes back replaces ours."""
        return await asyncio.to_thread(self._present, path, state)

    def _present(self, path: Path, state: int | None) -> bool:
        memory = self._guest.memory
        region = {"host_virt_addr": memory.address, "size": memory.len_bytes, "backing_file_offset": 0}
        message = {
            "type": "handoff",
            "version": 0,
            "vmm_pid": os.getpid(),
            "mode": "MISSING",
            "regions": [{**region, "guest_phys_addr": 0}],
            "keep_state": True,
            **({} if state is None else {"descriptors": ["uffd", "state"]}),
        }
        body = json.dumps(message).encode()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(path))
        fds = [self._guest.uffd.fileno(), *([] if state is None else [state])]
        socket.send_fds(sock, [struct.pack("<I", len(body)) + body], fds)
        answer, given, _, _ = socket.recv_fds(sock, 1, 4)
        if answer != ACK:
            sock.close()
            return False
        if self._sock is not None:
            self._sock.close()
        if self.state >= 0:
            os.close(self.state)
        self._sock, (self.state,) = sock, given
        return True


class Site:
    """A page server, and daemons one after the other in one folder, without anybody who keeps their descriptors."""

    def __init__(self, host: Host, address: str) -> None:
        self.host = host
        self.address = address
        self.folder = host.folder / "d"
        self._starts = 0

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[ControlClient]:
        """Killed at the end."""
        self._starts += 1
        self.folder.mkdir(exist_ok=True)
        (self.folder / "notify.sock").unlink(missing_ok=True)
        ready = ReadySocket(self.folder)
        child = await Child.start(
            f"daemon-{self._starts}",
            self.folder,
            *("postcopyd", "run", "--state-dir", str(self.folder)),
            env={"NOTIFY_SOCKET": str(ready.path), "POSTCOPYD_HTTP": "", "POSTCOPYD_TRANSPORT": "native"},
        )
        try:
            await ready.wait_ready(child)
            async with ControlClient(str(self.folder / "control.sock")) as client:
                yield client
        finally:
            ready.close()
            child.process.send_signal(signal.SIGKILL)
            await child.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / f"daemon-{self._starts}.log").read_text()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Host() as host:
        _, address = await host.page_server(f"vm={host.image('image', CONTENT)}")
        yield Site(host, address)


@pytest.fixture
async def guest() -> AsyncIterator[LocalGuest]:
    async with LocalGuest(len(CONTENT)) as made:
        yield made


@pytest.fixture
async def vmm(guest: LocalGuest) -> AsyncIterator[KeepingVmm]:
    made = KeepingVmm(guest)
    yield made
    made.close()


async def until_complete(client: ControlClient) -> None:
    await client.set_limits("vm", Limits())
    async with asyncio.timeout(PATIENCE_S):
        async for status in client.watch("vm", interval_s=0.02):
            last = status
    assert last.state is State.COMPLETE


async def test_a_daemon_that_finds_no_store_goes_on_with_the_state_that_its_vmm_kept(
    site: Site, guest: LocalGuest, vmm: KeepingVmm
) -> None:
    async with site.daemon() as client:
        path = (await client.prepare("vm", [site.address], limits=SLOW)).socket_path
        assert await vmm.present(path)
        assert await guest.reading(500 * PAGE_SIZE) == page(500)
        # What was given back must not come again from the source, whether the guest had it or not.
        for gone in (500, 700):
            await guest.discard(gone * PAGE_SIZE, PAGE_SIZE)
    waiting = guest.reading(300 * PAGE_SIZE)
    async with site.daemon() as client:
        assert (await client.get("vm")).state is State.PREPARED
        assert await vmm.present(path, vmm.state)
        assert await waiting == page(300)
        await until_complete(client)
        found = await guest.read_all()
    expected = bytearray(CONTENT)
    for gone in (500, 700):
        expected[gone * PAGE_SIZE : (gone + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
    assert found == expected


async def test_state_that_is_not_the_last_one_is_refused(
    site: Site, guest: LocalGuest, vmm: KeepingVmm
) -> None:
    """A page that was given back since would come from the source again."""
    async with site.daemon() as client:
        path = (await client.prepare("vm", [site.address], limits=SLOW)).socket_path
        assert await vmm.present(path)
        older = os.dup(vmm.state)
    async with site.daemon():
        assert await vmm.present(path, vmm.state)
        await guest.discard(700 * PAGE_SIZE, PAGE_SIZE)
    async with site.daemon() as client:
        assert not await vmm.present(path, older)
        assert Code.HANDOFF_STALE_STATE in site.log
        assert await vmm.present(path, vmm.state)
        await until_complete(client)
        assert not any(await guest.reading(700 * PAGE_SIZE))
    os.close(older)


async def test_a_guest_that_ran_is_not_served_without_its_state(
    site: Site, guest: LocalGuest, vmm: KeepingVmm
) -> None:
    async with site.daemon() as client:
        path = (await client.prepare("vm", [site.address], limits=SLOW)).socket_path
        assert await vmm.present(path)
    async with site.daemon() as client:
        assert not await vmm.present(path)
        assert Code.HANDOFF_STALE_STATE in site.log
        # An operator who knows that the VMM is gone begins again.
        await client.cancel("vm")
        await client.prepare("vm", [site.address], limits=SLOW)
        assert await vmm.present(path)
        await until_complete(client)
        assert await guest.read_all() == CONTENT


async def test_a_state_that_makes_no_sense_is_refused(site: Site, vmm: KeepingVmm) -> None:
    async with site.daemon() as client:
        path = (await client.prepare("vm", [site.address], limits=SLOW)).socket_path
        assert await vmm.present(path)
    real = os.pread(vmm.state, os.fstat(vmm.state).st_size, 0)
    lies = [b"", b"\0" * 4096, real[:-4096], bytes(len(real)), real[:8] + b"\xff" * 300 + real[308:]]
    async with site.daemon() as client:
        for lie in lies:
            forged = os.memfd_create("forged")
            os.write(forged, lie)
            assert not await vmm.present(path, forged)
            os.close(forged)
        assert site.log.count(Code.HANDOFF_STALE_STATE) == len(lies)
        assert await vmm.present(path, vmm.state)
        await until_complete(client)


async def test_the_kept_state_cannot_be_written(site: Site, vmm: KeepingVmm) -> None:
    async with site.daemon() as client:
        assert await vmm.present((await client.prepare("vm", [site.address])).socket_path)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(vmm.state, b"x", 0)
        # Nor by opening it again, for anybody but the daemon's user.
        assert os.fstat(vmm.state).st_mode & 0o777 == 0o600


async def test_a_vmm_that_lost_its_connection_presents_itself_again(
    site: Site, guest: LocalGuest, vmm: KeepingVmm
) -> None:
    async with site.daemon() as client:
        path = (await client.prepare("vm", [site.address], limits=SLOW)).socket_path
        assert await vmm.present(path)
        await guest.discard(700 * PAGE_SIZE, PAGE_SIZE)
        assert await vmm.present(path)
        # The ledger is the one that was, not a fresh one.
        assert not any(await guest.reading(700 * PAGE_SIZE))
        async with LocalGuest(len(CONTENT)) as stranger:
            other = KeepingVmm(stranger)
            assert not await other.present(path)
        assert Code.HANDOFF_BUSY in site.log
        await until_complete(client)
