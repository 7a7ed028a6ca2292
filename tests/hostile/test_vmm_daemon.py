"""VMMs that lie, die or come twice, before a running daemon that has a good guest in progress all the while."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import struct
import sys
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from harness import PATIENCE_S, DaemonProcess, Host, LocalGuest, content_of, huge_pages
from postcopyd.errors import Code, HandoffError
from postcopyd.status import Limits, State
from postcopyd.units import HUGE_PAGE_SIZE, MIB, PAGE_SIZE
from postcopyd.vmm.guestmem import MemoryKind
from postcopyd.vmm.handoff_client import HandoffFormat, encode, regions_of
from support_handoff import framed, send
from support_uffd import open_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAGES = 512  # 2 MiB
CONTENT = content_of(PAGES)
HANDOFF_TIMEOUT_S = 0.3
BASE = 0x7F00_0000_0000


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Setting:
    """A daemon that serves a healthy guest slowly, and where VMMs of the migration `bad` are expected."""

    host: Host
    daemon: DaemonProcess
    source: str
    socket_path: Path | str
    http: str

    async def refusals(self) -> dict[str, int]:
        """Hand-offs refused so far, by code, as the metrics tell."""

        def fetch() -> str:
            with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=PATIENCE_S) as answer:
                text: str = answer.read().decode()
                return text

        found = {}
        for line in (await asyncio.to_thread(fetch)).splitlines():
            if line.startswith("postcopyd_handoff_errors_total{"):
                found[line.split('"')[1]] = int(float(line.rsplit(" ", 1)[1]))
        return found


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    """At its end the healthy guest completes, and then a good VMM at the socket where the bad ones were."""
    async with Host() as host:
        image = host.image("image", CONTENT)
        _, source = await host.page_server(f"healthy={image}", f"bad={image}")
        http = f"127.0.0.1:{free_port()}"
        daemon = await host.daemon(http=http, handoff_timeout_s=str(HANDOFF_TIMEOUT_S))
        healthy = await daemon.client.prepare("healthy", [source], limits=Limits(push_rate=1))
        bad = await daemon.client.prepare("bad", [source])
        async with LocalGuest(len(CONTENT)) as guest, LocalGuest(len(CONTENT)) as good:
            await guest.hand_off(healthy.socket_path)
            assert await guest.reading(PAGE_SIZE * 100) == CONTENT[100 * PAGE_SIZE : 101 * PAGE_SIZE]
            yield Setting(host, daemon, source, bad.socket_path, http)
            status = await daemon.client.get("healthy")
            assert (status.state, status.error) == (State.RUNNING, "")
            assert status.pages_installed < PAGES
            await daemon.client.set_limits("healthy", Limits())
            assert await guest.read_all() == CONTENT
            await daemon.until_state("healthy", State.COMPLETE)
            if (await daemon.client.get("bad")).state is State.PREPARED:
                await good.hand_off(bad.socket_path)
                assert await good.read_all() == CONTENT
                await daemon.until_state("bad", State.COMPLETE)


def firecracker(**changes: int) -> bytes:
    entry = {"base_host_virt_addr": BASE, "size": MIB, "offset": 0, "page_size": 4096}
    return json.dumps([{**entry, **changes}]).encode()


def overlapping() -> bytes:
    return json.dumps(
        [
            {"base_host_virt_addr": BASE, "size": MIB, "offset": 0},
            {"base_host_virt_addr": BASE + 4096, "size": MIB, "offset": MIB},
        ]
    ).encode()


# message, how many descriptors, close afterwards, code
BAD: dict[str, tuple[bytes, int, bool, Code]] = {
    "not JSON": (b"[this is no JSON]", 1, False, Code.HANDOFF_NOT_JSON),
    "a frame that is not JSON": (framed(b"{no}"), 1, False, Code.HANDOFF_NOT_JSON),
    "noise": (os.urandom(1) + b"\xfe\xed\xfa\xce\0\0\0", 1, False, Code.HANDOFF_UNKNOWN_FORMAT),
    "ten megabytes": (b"[" + b" " * 10_000_000, 1, False, Code.HANDOFF_TOO_LARGE),
    "a frame of ten megabytes": (struct.pack("<I", 10_000_000) + b"{", 1, False, Code.HANDOFF_TOO_LARGE),
    "truncated": (firecracker()[:-5], 1, True, Code.HANDOFF_TRUNCATED),
    "no descriptor": (firecracker(), 0, True, Code.HANDOFF_NO_DESCRIPTOR),
    "several descriptors": (firecracker(), 3, False, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "a region of nothing": (firecracker(size=0), 1, False, Code.HANDOFF_BAD_REGION),
    "regions that overlap": (overlapping(), 1, False, Code.HANDOFF_BAD_REGION),
    "an unaligned region": (firecracker(base_host_virt_addr=BASE + 1), 1, False, Code.HANDOFF_BAD_REGION),
    "an unaligned size": (firecracker(size=MIB + 512), 1, False, Code.HANDOFF_BAD_REGION),
    "a size that overflows": (firecracker(size=(1 << 64) - 4096), 1, False, Code.HANDOFF_BAD_REGION),
    "an unknown page size": (firecracker(page_size=16384), 1, False, Code.HANDOFF_PAGE_SIZE),
    "more memory than the image": (firecracker(size=16 * MIB), 1, False, Code.HANDOFF_BEYOND_IMAGE),
    "an offset beyond the image": (firecracker(offset=2 * MIB), 1, False, Code.HANDOFF_BEYOND_IMAGE),
    "memory that is not registered": (firecracker(), 1, False, Code.HANDOFF_NOT_REGISTERED),
    "nothing at all": (b"", 0, False, Code.HANDOFF_TIMEOUT),
    "killed before the message": (b"", 0, True, Code.HANDOFF_TRUNCATED),
}


def misbehave(path: Path | str, message: bytes, fds: list[int], close: bool) -> None:
    """Send, and return when the daemon has closed the connection. It answers nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(path))
        try:
            if message:
                send(sock, message[:4096], fds)
                sock.sendall(message[4096:])
            if close:
                sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            return  # it did not read everything: that is refused too


async def test_every_bad_handoff_is_refused_by_name_and_harms_nobody(setting: Setting) -> None:
    before = setting.daemon.descriptors()
    for name, (message, count, close, code) in BAD.items():
        fds = [open_uffd() for _ in range(count)]
        counted = (await setting.refusals()).get(code, 0)
        try:
            for fd in fds:
                greet_uffd(fd)
            await asyncio.to_thread(misbehave, setting.socket_path, message, fds, close)
        finally:
            for fd in fds:
                os.close(fd)
        assert (await setting.refusals()).get(code, 0) == counted + 1, name
        assert (await setting.daemon.client.get("bad")).state is State.PREPARED, name
    await setting.daemon.until_descriptors(before)


async def test_a_descriptor_that_is_no_userfaultfd_is_refused(setting: Setting) -> None:
    for kind in (os.memfd_create("x"), *os.pipe(), os.open("/dev/null", os.O_RDWR)):
        await asyncio.to_thread(misbehave, setting.socket_path, firecracker(), [kind], False)
        os.close(kind)
    assert await setting.refusals() == {Code.HANDOFF_NOT_UFFD: 4}


def greet_uffd(fd: int) -> None:
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 0, 0))


async def test_huge_pages_handed_over_as_small_ones_are_refused(setting: Setting) -> None:
    """Every install would fail: it is found before anything is served."""
    with huge_pages(1):
        async with LocalGuest(HUGE_PAGE_SIZE, MemoryKind.HUGETLB) as liar:
            message = encode(HandoffFormat.FIRECRACKER_1_12, regions_of(liar.memory), PAGE_SIZE)
            fds = [liar.uffd.fileno()]
            await asyncio.to_thread(misbehave, setting.socket_path, message, fds, False)
    assert await setting.refusals() == {Code.HANDOFF_PAGE_SIZE: 1}


@pytest.mark.parametrize("fmt", [HandoffFormat.FRAMED, HandoffFormat.FIRECRACKER_1_12], ids=str)
async def test_a_second_vmm_is_told_that_the_session_has_one(setting: Setting, fmt: HandoffFormat) -> None:
    path = (await setting.daemon.client.get("healthy")).socket_path
    async with LocalGuest(len(CONTENT)) as second:
        if fmt is HandoffFormat.FRAMED:
            with pytest.raises(HandoffError):
                await second.hand_off(path, fmt)
        else:
            message = encode(fmt, regions_of(second.memory), PAGE_SIZE)
            await asyncio.to_thread(misbehave, path, message, [second.uffd.fileno()], False)
    assert await setting.refusals() == {Code.HANDOFF_BUSY: 1}


async def test_a_vmm_killed_between_connect_and_message_leaves_its_socket_to_the_next(
    setting: Setting,
) -> None:
    program = (
        "import signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(1, flush=True); signal.pause()"
    )
    vmm = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(setting.socket_path), stdout=asyncio.subprocess.PIPE
    )
    assert vmm.stdout is not None
    assert await vmm.stdout.readline() == b"1\n"
    vmm.kill()
    await vmm.wait()
    async with asyncio.timeout(PATIENCE_S):
        while not (refused := await setting.refusals()):
            pass
    assert set(refused) <= {Code.HANDOFF_TRUNCATED, Code.HANDOFF_TIMEOUT}


async def test_a_vmm_that_closes_its_socket_at_once_but_lives_is_served(setting: Setting) -> None:
    """As Firecracker before 1.12 does."""
    async with LocalGuest(len(CONTENT)) as old:
        await old.hand_off(setting.socket_path, HandoffFormat.FIRECRACKER_1_1)
        assert await old.read_all() == CONTENT
        done = await setting.daemon.until_state("bad", State.COMPLETE)
    assert done.handoff_format == "firecracker-1.1"


async def test_as_many_regions_as_a_message_holds_are_served(setting: Setting) -> None:
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(setting.socket_path, HandoffFormat.FRAMED, regions=PAGES)
        assert await guest.read_all() == CONTENT
        await setting.daemon.until_state("bad", State.COMPLETE)


async def test_a_vmm_that_hangs_up_without_reading_its_acknowledgement_is_served_while_it_lives(
    setting: Setting,
) -> None:
    async with LocalGuest(len(CONTENT)) as guest:
        message = encode(HandoffFormat.FRAMED, regions_of(guest.memory), PAGE_SIZE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(setting.socket_path))
            send(sock, message, [guest.uffd.fileno()])
        await setting.daemon.until("bad", lambda status: status.state is not State.PREPARED)
        assert await guest.read_all() == CONTENT
        await setting.daemon.until_state("bad", State.COMPLETE)
