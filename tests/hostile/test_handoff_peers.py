"""VMMs that lie, die, or say nothing, over a real socket: each is refused by name, and nothing stays open."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest

from postcopyd.errors import Code, HandoffError
from postcopyd.handoff import channel, receive_handoff
from support_handoff import (
    FIRECRACKER_1_7,
    FIRECRACKER_1_12,
    FRAMED,
    advance_clock,
    drained,
    framed_with,
    no_descriptor_left,
    pair,
    refused_with,
    send,
)
from support_uffd import open_uffd

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

SHORT_S = 0.02


@pytest.fixture
def uffd() -> Iterator[int]:
    fd = open_uffd()
    yield fd
    os.close(fd)


REFUSED = {
    "noise": (b"\x16\x03\x01\x02\x00\x01\x00\x01", 1, Code.HANDOFF_UNKNOWN_FORMAT),
    "not JSON": (b"[not, JSON]", 1, Code.HANDOFF_NOT_JSON),
    "three descriptors": (FIRECRACKER_1_12, 3, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "a second uffd": (FIRECRACKER_1_12, 2, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "two descriptors in a frame": (FRAMED, 2, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "as many as the kernel lets through": (FRAMED, 253, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "many before the format is known": (b"[", 253, Code.HANDOFF_EXTRA_DESCRIPTORS),
    "empty region": (FIRECRACKER_1_12.replace(b"268435456", b"0"), 1, Code.HANDOFF_BAD_REGION),
    "unaligned region": (FIRECRACKER_1_7.replace(b"268435456", b"4096"), 1, Code.HANDOFF_BAD_REGION),
    "overflow": (FIRECRACKER_1_12.replace(b'"offset":0', b'"offset":18446744073709547520'), 1, Code.HANDOFF_BAD_REGION),
    "unknown page size": (FIRECRACKER_1_12.replace(b'"page_size":4096', b'"page_size":8192'), 1, Code.HANDOFF_PAGE_SIZE),
    "another version": (framed_with(version=7), 1, Code.HANDOFF_VERSION),
}  # fmt: skip


@pytest.mark.parametrize(("data", "count", "code"), REFUSED.values(), ids=REFUSED.keys())
async def test_a_bad_handoff_is_refused_by_name_and_all_that_came_is_closed_once(
    uffd: int, monkeypatch: pytest.MonkeyPatch, data: bytes, count: int, code: Code
) -> None:
    closed = count_closes(monkeypatch)
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, data, [uffd] * count)
        with refused_with(code):
            await receive_handoff(ours.dup())
    assert len(closed) == count


def count_closes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    closed: list[int] = []
    close = os.close

    def counting(fd: int) -> None:
        closed.append(fd)
        close(fd)

    monkeypatch.setattr("postcopyd.handoff.descriptors.os.close", counting)
    return closed


@pytest.mark.parametrize("data", [FIRECRACKER_1_12, FRAMED], ids=["array", "framed"])
@pytest.mark.parametrize("kind", ["memfd", "pipe", "socket", "file"])
async def test_a_descriptor_that_is_no_userfaultfd_is_refused(data: bytes, kind: str) -> None:
    fds = {
        "memfd": lambda: [os.memfd_create("[userfaultfd]")],
        "pipe": lambda: list(os.pipe()),
        "socket": lambda: [socket.socket(socket.AF_UNIX).detach()],
        "file": lambda: [os.open("/dev/null", os.O_RDWR)],
    }[kind]()
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, data, fds[:1])
        with refused_with(Code.HANDOFF_NOT_UFFD):
            await receive_handoff(ours.dup())
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("data", [FIRECRACKER_1_12, FRAMED], ids=["array", "framed"])
async def test_a_whole_message_without_its_descriptor_is_named_when_the_vmm_closes(data: bytes) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, data)
        vmm.shutdown(socket.SHUT_WR)
        with refused_with(Code.HANDOFF_NO_DESCRIPTOR):
            await receive_handoff(ours.dup())


@pytest.mark.parametrize("data", [FIRECRACKER_1_12, FRAMED], ids=["array", "framed"])
async def test_a_whole_message_without_its_descriptor_is_named_when_time_is_up(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        receiving = asyncio.create_task(receive_handoff(ours.dup(), timeout_s=1000))
        send(vmm, data)
        await drained(vmm)
        advance_clock(monkeypatch, 1001)
        with refused_with(Code.HANDOFF_NO_DESCRIPTOR):
            await receiving


@pytest.mark.parametrize("data", [b"", b"[", FIRECRACKER_1_12[:-1], FRAMED[:4], FRAMED[:-1]])
async def test_a_vmm_that_dies_in_the_middle_is_named(uffd: int, data: bytes) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        if data:
            send(vmm, data, [uffd])
        vmm.shutdown(socket.SHUT_RDWR)
        with refused_with(Code.HANDOFF_TRUNCATED):
            await receive_handoff(ours.dup())


@pytest.mark.parametrize("data", [b"", b"[", FIRECRACKER_1_12[:-1], FRAMED[:4], FRAMED[:-1]])
async def test_a_vmm_that_stops_talking_runs_out_of_time(uffd: int, data: bytes) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        if data:
            send(vmm, data, [uffd])
        with refused_with(Code.HANDOFF_TIMEOUT):
            await receive_handoff(ours.dup(), timeout_s=SHORT_S)


async def test_talking_slowly_gains_no_time(uffd: int) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        receiving = asyncio.create_task(receive_handoff(ours.dup(), timeout_s=SHORT_S))
        send(vmm, b"[", [uffd])
        while not receiving.done():
            send(vmm, b" ")
            await drained_or(receiving, vmm)
        with refused_with(Code.HANDOFF_TIMEOUT):
            await receiving


async def drained_or(receiving: asyncio.Task[object], vmm: socket.socket) -> None:
    emptied = asyncio.create_task(drained(vmm))
    await asyncio.wait([receiving, emptied], return_when=asyncio.FIRST_COMPLETED)
    emptied.cancel()


@pytest.mark.parametrize("start", [b"[", b"\x80\x96\x98\x00{"], ids=["array", "framed"])
async def test_ten_megabytes_are_not_read(uffd: int, start: bytes) -> None:
    with no_descriptor_left(), pair() as (vmm, ours):
        receiving = asyncio.create_task(receive_handoff(ours))
        send(vmm, start, [uffd])
        vmm.setblocking(False)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await asyncio.get_running_loop().sock_sendall(vmm, b'"' + bytes([32]) * 10_000_000)
        with refused_with(Code.HANDOFF_TOO_LARGE):
            await receiving


async def test_cancelling_closes_the_socket_and_what_came(uffd: int) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        receiving = asyncio.create_task(receive_handoff(ours.dup()))
        send(vmm, FRAMED[:30], [uffd])
        await drained(vmm)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving


async def test_descriptors_that_the_kernel_cut_off_are_noticed(
    uffd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_ANCILLARY_BYTES", socket.CMSG_SPACE(4))
    closed = count_closes(monkeypatch)
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, framed_with(descriptors=["uffd", "ledger"]), [uffd] * 4)
        with refused_with(Code.HANDOFF_TRUNCATED):
            await receive_handoff(ours.dup(), served={"uffd", "ledger"})
    assert closed


async def test_a_thousand_refusals_leave_no_descriptor(uffd: int) -> None:
    with no_descriptor_left():
        for index in range(1000):
            with pair() as (vmm, ours):
                send(vmm, FRAMED if index % 2 else b"[1]  ", [uffd, uffd])
                with pytest.raises(HandoffError):
                    await receive_handoff(ours)
