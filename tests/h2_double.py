"""Page streams and reply sinks in C for tests of the transports: doubles/h2_double.c, and its wire format in Python."""

from __future__ import annotations

import ctypes
import functools
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from postcopyd.source.native_server import CallError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ANSWER, REFUSE, FAIL, STALL = 0, 1, 2, 3
_SOURCE = Path(__file__).parent / "doubles" / "h2_double.c"


class _Page(ctypes.Structure):
    _fields_ = (
        ("ranges", ctypes.c_uint32 * 4 * 64),
        ("first", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("produced", ctypes.c_uint64),
        ("bytes_produced", ctypes.c_uint64),
        ("wants_read", ctypes.c_int),
        ("was_read", ctypes.c_int),
        ("requests", ctypes.c_uint64),
    )


class _Reply(ctypes.Structure):
    _fields_ = (
        ("messages", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("wrong", ctypes.c_uint64),
        ("refuse_at", ctypes.c_uint64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "h2_double.so"
        subprocess.run(
            ["cc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)], check=True
        )
        return ctypes.CDLL(str(target))


def _address(name: str) -> int:
    value = ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
    assert value is not None
    return value


def request(count: int, length: int, mode: int = ANSWER, argument: int = 0) -> bytes:
    """A request for `count` messages of `length` bytes, or for a failure with status `argument`."""
    return struct.pack("<4I", count, length, mode, argument)


class PageDouble:
    """A NativePages that answers `request`s."""

    def __init__(self) -> None:
        self.state = _Page()
        self.context = ctypes.addressof(self.state)
        self.request = _address("double_request")
        self.produce = _address("double_produce")
        self.error = _address("double_error")
        self.is_closed = False
        self.reads = 0

    def read_blocking(self) -> None:
        self.reads += 1
        _library().double_read(ctypes.byref(self.state))

    def close(self) -> None:
        self.is_closed = True


class ReplyDouble:
    """A ReplySink that checks messages, in C where the transport can."""

    def __init__(self, refuse_at: int = 0) -> None:
        self.state = _Reply(refuse_at=refuse_at)
        self.native = (_address("double_reply"), ctypes.addressof(self.state))
        self.batches = 0
        self.on_fed: Callable[[], object] = lambda: None

    def feed(self, message: bytes) -> None:
        _library().double_reply(ctypes.byref(self.state), message, ctypes.c_size_t(len(message)))

    def fed(self) -> None:
        self.batches += 1
        self.on_fed()


async def answer_in_python(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same page stream for a server in Python. Raises CallError."""
    produced = 0
    async for data in requests:
        count, length, mode, argument = struct.unpack("<4I", data)
        if mode in (REFUSE, FAIL):
            code = next(code for code in grpc.StatusCode if code.value[0] == argument)
            raise CallError(code, "the double says no: 100 %")
        for _ in range(count):
            yield struct.pack("<Q", produced) + bytes([produced & 0xFF]) * (length - 8)
            produced += 1
