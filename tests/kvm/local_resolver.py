"""A page-fault handler in a thread of the test: the smallest thing that can serve a VMM's memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

UFFDIO_COPY = 0xC028AA03
UFFDIO_WAKE = 0x8010AA02
EVENT_PAGEFAULT = 0x12
EVENT_REMOVE = 0x15
MESSAGE_BYTES = 32


class LocalResolver:
    """Serves faults of one region from `fetch(offset, len_bytes)` until closed.

    Attributes:
        fetched: offsets of pages taken from `fetch`, in order.
        removed: offsets of pages that REMOVE events named; they are served as zeros.
        tids: thread ids of the faults, where the userfaultfd reports them.
    """

    def __init__(
        self,
        uffd: int,
        address: int,
        len_bytes: int,
        fetch: Callable[[int, int], bytes],
        page_size: int = 4096,
    ) -> None:
        self.fetched: list[int] = []
        self.removed: set[int] = set()
        self.tids: set[int] = set()
        self._faults: dict[int, None] = {}
        self._uffd = os.dup(uffd)
        self._address = address
        self._end = address + len_bytes
        self._fetch = fetch
        self._page_size = page_size
        self._buffer = ctypes.create_string_buffer(page_size)
        self._stop = os.eventfd(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="local-resolver")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and raise what went wrong in the thread."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        os.close(self._uffd)
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        try:
            while not any(fd == self._stop for fd, _ in poll.poll()):
                self._read()
                while self._faults:
                    self._install(next(iter(self._faults)))
        except BaseException as err:  # noqa: BLE001 - raised by close, in the test's thread
            self._error = err

    def _read(self) -> None:
        """Read all messages before any is served: a REMOVE may follow a fault that it decides about."""
        while True:
            try:
                data = os.read(self._uffd, 64 * MESSAGE_BYTES)
            except BlockingIOError:
                return
            for at in range(0, len(data), MESSAGE_BYTES):
                event, _, address, tid = struct.unpack_from("=B7xQQI", data, at)
                if event == EVENT_PAGEFAULT:
                    self._faults[address & ~(self._page_size - 1)] = None
                    self.tids.add(tid)
                elif event == EVENT_REMOVE:
                    start, end = struct.unpack_from("=8xQQ", data, at)
                    self.removed.update(range(start - self._address, end - self._address, self._page_size))
                else:
                    raise AssertionError(f"unexpected event {event:#x}")

    def _install(self, address: int) -> None:
        offset = address - self._address
        data = bytes(self._page_size) if offset in self.removed else self._fetch(offset, self._page_size)
        assert len(data) == self._page_size
        ctypes.memmove(self._buffer, data, self._page_size)
        copy = struct.pack("=QQQQq", address, ctypes.addressof(self._buffer), self._page_size, 0, 0)
        try:
            fcntl.ioctl(self._uffd, UFFDIO_COPY, copy)
        except OSError as err:
            if err.errno == errno.EAGAIN:
                # A REMOVE is under way. Its event decides what this page must be, so read it and begin again.
                self._read()
                return
            if err.errno != errno.EEXIST:
                raise
            fcntl.ioctl(self._uffd, UFFDIO_WAKE, struct.pack("=QQ", address, self._page_size))
        else:
            if offset not in self.removed:
                self.fetched.append(offset)
        del self._faults[address]
