"""Bytes with descriptors over a non-blocking UNIX stream socket, under asyncio or uvloop.

Neither loop has a recvmsg that keeps ancillary data, so the loop only says when the socket is ready.
"""

from __future__ import annotations

import array
import asyncio
import socket
from typing import TYPE_CHECKING

import msgspec

from ..errors import Code, HandoffError
from .descriptors import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHUNK_BYTES = 64 << 10
_SCM_MAX_FD = 253
"""The most descriptors of one message: with room for all, none is cut off. Source: include/net/scm.h."""

_ANCILLARY_BYTES = socket.CMSG_SPACE(_SCM_MAX_FD * array.array("i").itemsize)


class Chunk(msgspec.Struct, frozen=True):
    """What one read gave. No data: the peer closed."""

    data: bytes
    descriptors: tuple[OwnedFd, ...] = ()


async def receive_chunk(sock: socket.socket) -> Chunk:
    """Wait for data and return it; the caller owns the descriptors. Only one task may wait for a socket.

    Waits for readiness even if data is there already, so that a peer that never stops sending cannot keep the
    event loop to itself.

    Raises:
        HandoffError: HANDOFF_TRUNCATED: the kernel cut something off; nothing is left open.
    Cancellation: loses nothing, as nothing is awaited after the read.
    """
    while True:
        await _ready(sock)
        try:
            return _read(sock)
        except BlockingIOError:
            continue
        except ConnectionResetError:
            # The peer closed with bytes of ours unread; what it had sent was delivered before this.
            return Chunk(b"")


async def send_byte(sock: socket.socket, byte: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one byte with descriptors, which stay the caller's.

    Raises:
        HandoffError: VMM_GONE.
    """
    loop = asyncio.get_running_loop()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    while True:
        try:
            sock.sendmsg([byte], rights, socket.MSG_NOSIGNAL)
            return
        except BlockingIOError:
            writable = loop.create_future()
            fd = sock.fileno()
            loop.add_writer(fd, _resolver(writable))
            try:
                await writable
            finally:
                loop.remove_writer(fd)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HandoffError(
                Code.VMM_GONE, "the VMM closed its socket before its answer could be sent"
            ) from error


def _read(sock: socket.socket) -> Chunk:
    data, ancillary, flags, _ = sock.recvmsg(CHUNK_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    descriptors = tuple(
        OwnedFd(fd)
        for level, kind, payload in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for fd in _integers(payload)
    )
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for descriptor in descriptors:
            descriptor.close()
        raise HandoffError(
            Code.HANDOFF_TRUNCATED,
            "the kernel cut the VMM's message; most likely postcopyd has too many open files (LimitNOFILE)",
        )
    return Chunk(data, descriptors)


def _integers(payload: bytes) -> array.array[int]:
    numbers = array.array("i")
    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return numbers


async def _ready(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    # By number, as uvloop would otherwise delay the socket's close.
    fd = sock.fileno()
    loop.add_reader(fd, _resolver(ready))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _resolver(ready: asyncio.Future[None]) -> Callable[[], None]:
    def resolve() -> None:
        if not ready.done():
            ready.set_result(None)

    return resolve
