"""VMMs that misuse the socket over which they forward faults: each ends its own session by name, and no other."""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from exit_socket_vmm import GPA, NO_EXITLESS, ExitSocketVmm, MemfdGuest, frame
from harness import PATIENCE_S, LocalDaemon, LocalGuest, content_of, local_daemon
from postcopyd.errors import Code
from postcopyd.handoff.exit_frames import FaultRequest
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE
from scripted_source import ScriptedSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from postcopyd.status import MigrationStatus

PAGES = 512
CONTENT = content_of(PAGES)
HELD = Limits(push_rate=1)


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@dataclass
class Setting:
    """A daemon where `healthy` is under way and `bad` is expected."""

    daemon: LocalDaemon
    source: ScriptedSource
    path: str

    async def until_failed(self) -> MigrationStatus:
        async with asyncio.timeout(PATIENCE_S), self.daemon.manager.changes("bad") as changed:
            while (status := self.daemon.manager.get("bad")).state is not State.FAILED:
                changed.clear()
                await changed.wait()
            return status


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    """At its end the healthy guest completes."""
    async with (
        ScriptedSource(CONTENT, id="healthy") as source,
        ScriptedSource(CONTENT, id="bad") as other,
        local_daemon() as daemon,
    ):
        healthy = await daemon.prepare("healthy", source.address, limits=HELD)
        bad = await daemon.prepare("bad", other.address, limits=HELD)
        async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
            fds = [guest.uffd.fileno()]
            await vmm.hand_off(healthy.socket_path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
            vmm.listen()
            await vmm.resolve(0, 300)
            yield Setting(daemon, other, bad.socket_path)
            assert daemon.manager.get("healthy").state is State.RUNNING
            await vmm.resolve(0, 301)
            await daemon.manager.set_limits("healthy", Limits())
            assert await guest.read_all() == CONTENT
            await daemon.until_state("healthy", State.COMPLETE)


BAD = {
    "a gpa outside of every region": frame(FaultRequest(0, 0, 16, GPA + len(CONTENT))),
    "a gpa below": frame(FaultRequest(0, 0, 16, GPA - 1)),
    "an offset outside": frame(FaultRequest(0, len(CONTENT), 16)),
    "a vcpu that cannot be": frame(FaultRequest(1 << 31, 0, 16, GPA)),
    "a length without bounds": struct.pack("<I", 1 << 31),
    "a payload that is none": struct.pack("<I", 3) + b"\x09\x09\x09",
    "an empty frame": struct.pack("<I", 0),
}


@pytest.mark.parametrize("message", BAD.values(), ids=list(BAD))
async def test_a_bad_request_ends_its_own_session_by_name(setting: Setting, message: bytes) -> None:
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        await vmm.send(message)
        assert (await setting.until_failed()).error_code == Code.EXIT_SOCKET_BROKEN


@pytest.mark.parametrize(
    ("word", "code"),
    [(b"exitless_apf:2", Code.EXIT_SOCKET_EXITLESS), (b"no_exitlessness", Code.EXIT_SOCKET_BROKEN)],
)
async def test_another_word_about_exits_ends_its_session_by_name(
    setting: Setting, word: bytes, code: Code
) -> None:
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), [guest.uffd.fileno()])
        await vmm.send(word)
        assert (await setting.until_failed()).error_code == code


async def test_more_requests_than_a_vm_has_vcpus_end_its_session(setting: Setting) -> None:
    """The source is silent, so all of them wait."""
    setting.source.script = setting.source.silent
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        requests = [frame(vmm.request(vcpu, page)) for vcpu in range(8) for page in range(256, 512)]
        await vmm.send(b"".join(requests))
        status = await setting.until_failed()
        assert status.error_code == Code.EXIT_SOCKET_BROKEN
        assert status.waiting <= 1024


async def test_a_vmm_that_does_not_read_its_replies_ends_its_session(setting: Setting) -> None:
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        batch = b"".join(frame(vmm.request(vcpu, 256)) for vcpu in range(256))

        async def flood() -> None:
            while True:
                await vmm.send(batch)

        flooding = asyncio.ensure_future(flood())
        status = await setting.until_failed()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        assert status.error_code == Code.EXIT_SOCKET_BROKEN
        assert "unread" in status.error


async def test_a_bitmap_that_is_too_small_is_refused(setting: Setting) -> None:
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        os.ftruncate(guest.bitmap, 8)
        fds = guest.descriptors
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        assert await asyncio.get_running_loop().sock_recv(vmm.sock, 1) == b""
        assert setting.daemon.manager.get("bad").state is State.PREPARED


async def test_the_bitmap_cannot_be_shrunk_while_it_is_served(setting: Setting) -> None:
    """Or the daemon would touch what is behind its end, and die."""
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = guest.descriptors
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        vmm.listen()
        await vmm.resolve(0, 300)
        with pytest.raises(PermissionError):
            os.ftruncate(guest.bitmap, 0)


async def test_descriptors_that_are_no_memfd_are_refused(setting: Setting) -> None:
    async with MemfdGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        reading, writing = os.pipe()
        try:
            fds = [guest.uffd.fileno(), writing, guest.bitmap]
            await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
            assert await asyncio.get_running_loop().sock_recv(vmm.sock, 1) == b""
            assert setting.daemon.manager.get("bad").state is State.PREPARED
        finally:
            os.close(reading)
            os.close(writing)


async def test_a_vmm_that_hangs_up_is_served_on_by_its_userfaultfd(setting: Setting) -> None:
    async with LocalGuest(len(CONTENT)) as guest, ExitSocketVmm() as vmm:
        fds = [guest.uffd.fileno()]
        await vmm.hand_off(setting.path, guest.memory.address, len(CONTENT), fds, NO_EXITLESS)
        await vmm.send(frame(vmm.request(0, 300)))
        vmm.sock.close()
        assert await guest.reading(300 * PAGE_SIZE) == CONTENT[300 * PAGE_SIZE : 301 * PAGE_SIZE]
        await setting.daemon.manager.set_limits("bad", Limits())
        await setting.daemon.until_state("bad", State.COMPLETE)
