"""Hand-offs as VMMs send them, byte for byte, and the VMM's end of the socket."""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from postcopyd.errors import Code, HandoffError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FIRECRACKER_1_1 = (
    b'[{"base_host_virt_addr":139942411894784,"size":3489660928,"offset":0},'
    b'{"base_host_virt_addr":139938116927488,"size":805306368,"offset":3489660928}]'
)
FIRECRACKER_1_7 = (
    b'[{"base_host_virt_addr":139942411894784,"size":268435456,"offset":0,"page_size_kib":2097152}]'
)
FIRECRACKER_1_12 = (
    b'[{"base_host_virt_addr":139942411894784,"size":268435456,"offset":0,'
    b'"page_size":4096,"page_size_kib":4096}]'
)
FRAMED_BODY = (
    b'{"type":"handoff","version":0,"vmm_pid":4711,"mode":"MISSING|WP|WP_ASYNC","regions":['
    b'{"guest_phys_addr":0,"host_virt_addr":139942411894784,"size":268435456,"backing_file_offset":0}]}'
)
ADD_REGION_BODY = (
    b'{"type":"add_region","region":{"guest_phys_addr":4294967296,"host_virt_addr":139938116927488,'
    b'"size":134217728,"backing_file_offset":268435456}}'
)


def framed(body: bytes | dict[str, object]) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack("<I", len(data)) + data


FRAMED = framed(FRAMED_BODY)
ADD_REGION = framed(ADD_REGION_BODY)


def framed_with(**changes: object) -> bytes:
    """Return a good framed hand-off, with these top-level fields instead."""
    return framed({**json.loads(FRAMED_BODY), **changes})


def send(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send all of `data` in one message with `descriptors`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    assert sock.sendmsg([data], rights) == len(data)


async def drained(sock: socket.socket) -> None:
    """Return when the other end has read everything that was sent to it."""
    unread = bytearray(4)
    # SIOCOUTQ, unix(7): no event tells that the reader has caught up, so each turn of the loop looks.
    while fcntl.ioctl(sock, 0x5411, unread) or any(unread):  # noqa: ASYNC110
        await asyncio.sleep(0)


def advance_clock(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    """Make the running event loop believe that it is `by_s` later."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + by_s)


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The VMM's end, and ours; tests let a duplicate of ours be received from."""
    vmm, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with vmm, ours:
        yield vmm, ours


@contextmanager
def refused_with(code: Code) -> Iterator[pytest.ExceptionInfo[HandoffError]]:
    with pytest.raises(HandoffError) as caught:
        yield caught
    assert caught.value.code is code, str(caught.value)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Assert that the block leaves exactly those descriptors open that were open before."""
    before = _open_descriptors()
    yield
    assert _open_descriptors() == before


def _open_descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the directory that is being listed
    return found
