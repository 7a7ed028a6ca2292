"""A process whose memory a test serves: it registers memory, hands the userfaultfd over, and does as it is told.

Started as a program (`Target` does that), it imports nothing of postcopyd. Every command runs in a thread of its own, so
one that stands still at an absent page holds up no other. ctypes' foreign functions release the interpreter's lock.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6
THREAD_ID, MINOR_SHMEM = 1 << 8, 1 << 10
MISSING, MINOR = 1, 4
MADV_DONTNEED, MADV_REMOVE = 4, 9
HUGE = 2 << 20

_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_MFD_HUGETLB = 4
_MREMAP = 3  # MAYMOVE | FIXED


class _Memory:
    """The child's side: memory of `kind` behind a userfaultfd."""

    def __init__(self, kind: str, size: int, features: int, mode: int) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = self.libc.mremap.restype = ctypes.c_void_p
        self.size = size
        self.memfd = -1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if kind != "anon":
            self.memfd = os.memfd_create(
                "target", os.MFD_CLOEXEC | (_MFD_HUGETLB if kind == "hugetlb" else 0)
            )
            os.ftruncate(self.memfd, size)
            flags = mmap.MAP_SHARED
        self.base = self._map(flags)
        self.uffd = self._open(features)
        self._register(self.base, size, mode)

    def _map(self, flags: int) -> int:
        where = self.libc.mmap(
            None,
            ctypes.c_size_t(self.size),
            mmap.PROT_READ | mmap.PROT_WRITE,
            flags,
            self.memfd,
            ctypes.c_long(0),
        )
        if where == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return int(where)

    def _open(self, features: int) -> int:
        # For faults of user mode alone, which needs no privilege.
        uffd = self.libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | 1)
        if uffd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("QQQ", 0xAA, features, 0))
        return int(uffd)

    def _register(self, start: int, len_bytes: int, mode: int) -> None:
        fcntl.ioctl(self.uffd, _UFFDIO_REGISTER, struct.pack("QQQQ", start, len_bytes, mode, 0))

    def _checked(self, result: int | None, what: str) -> int:
        if result in (-1, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), what)
        return result or 0

    # Commands; addresses are absolute.

    def read(self, start: int, len_bytes: int) -> bytes:
        buffer = ctypes.create_string_buffer(len_bytes)
        ctypes.memmove(buffer, ctypes.c_void_p(start), len_bytes)
        return buffer.raw

    def digest(self, start: int, len_bytes: int) -> str:
        return hashlib.sha256(self.read(start, len_bytes)).hexdigest()

    def touch(self, start: int, len_bytes: int, step: int) -> str:
        """First byte of every `step`, as hex."""
        return b"".join(self.read(at, 1) for at in range(start, start + len_bytes, step)).hex()

    def fill(self, start: int, len_bytes: int, byte: int) -> None:
        ctypes.memset(ctypes.c_void_p(start), byte, len_bytes)

    def madvise(self, start: int, len_bytes: int, advice: int) -> None:
        self._checked(
            self.libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(len_bytes), advice), "madvise"
        )

    def munmap(self, start: int, len_bytes: int) -> None:
        self._checked(self.libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(len_bytes)), "munmap")

    def mprotect(self, start: int, len_bytes: int, prot: int) -> None:
        self._checked(
            self.libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(len_bytes), prot), "mprotect"
        )

    def reserve(self, len_bytes: int) -> int:
        """Address space that nothing uses."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return self._checked(
            self.libc.mmap(None, ctypes.c_size_t(len_bytes), 0, flags, -1, ctypes.c_long(0)), "mmap"
        )

    def mremap(self, start: int, len_bytes: int, to: int) -> None:
        length = ctypes.c_size_t(len_bytes)
        self._checked(
            self.libc.mremap(ctypes.c_void_p(start), length, length, _MREMAP, ctypes.c_void_p(to)), "mremap"
        )

    def pwrite(self, offset: int, byte: int, len_bytes: int) -> None:
        """Put content into the file behind the memory, past the userfaultfd."""
        os.pwrite(self.memfd, bytes([byte]) * len_bytes, offset)

    def storm(self, start: int, len_bytes: int, step: int, rounds: int, advice: int) -> int:
        """Give each piece back and read it, over and over; the number of bytes that were not zero."""
        wrong = 0
        for _ in range(rounds):
            for at in range(start, start + len_bytes, step):
                self.madvise(at, step, advice)
                wrong += step - self.read(at, step).count(0)
        return wrong


def _main(fd: int, kind: str, size: int, features: int, mode: int) -> None:
    control = socket.socket(fileno=fd)
    memory = _Memory(kind, size, features, mode)
    hello = json.dumps({"base": memory.base}).encode() + b"\n"
    control.sendmsg([hello], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory.uffd]))])
    sending = threading.Lock()

    def obey(number: int, name: str, arguments: list[int]) -> None:
        try:
            result = getattr(memory, name)(*arguments)
            reply = {"number": number, "result": result.hex() if isinstance(result, bytes) else result}
        except OSError as error:
            reply = {"number": number, "error": str(error)}
        with sending:
            control.sendall(json.dumps(reply).encode() + b"\n")

    for line in control.makefile("rb"):
        threading.Thread(target=obey, args=json.loads(line), daemon=True).start()
    os._exit(0)


class Target:
    """The parent's side: starts the process, sends commands, collects answers. A context manager that ends it."""

    def __init__(
        self, kind: str, size: int, *, features: int = EVENT_REMOVE | THREAD_ID, mode: int = MISSING
    ) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno()), kind, str(size), str(features), str(mode)]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self.control = ours
        self.size = size
        self.page_size = HUGE if kind == "hugetlb" else mmap.PAGESIZE
        self._text = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        ours.settimeout(30)
        hello, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        if not fds:
            self.close()
            raise OSError("the target process did not come up")
        self.uffd = fds[0]
        self.base = int(json.loads(hello)["base"])
        ours.setblocking(False)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        os.close(self.uffd)

    def close(self) -> None:
        """End the process, whatever its threads wait for."""
        self.process.kill()
        self.process.wait()
        self.control.close()

    def start(self, name: str, *arguments: int) -> int:
        """Begin a command; returns its number."""
        self._number += 1
        self.control.sendall(json.dumps([self._number, name, arguments]).encode() + b"\n")
        return self._number

    def collect(self) -> None:
        """Take the answers that have come, without waiting."""
        try:
            while chunk := self.control.recv(65536):
                self._text += chunk
        except (BlockingIOError, ConnectionResetError):
            pass
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._answers[answer["number"]] = answer

    def is_done(self, *numbers: int) -> bool:
        return all(number in self._answers for number in numbers)

    def result(self, number: int) -> Any:
        """What a command that is done returned. Raises OSError as the command did."""
        answer = self._answers[number]
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def blocked_threads(self) -> int:
        """Threads that stand still in handle_userfault."""
        folder = f"/proc/{self.process.pid}/task"
        return sum(_wchan(f"{folder}/{task}/wchan") == "handle_userfault" for task in os.listdir(folder))


def _wchan(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
