"""A program that hands memory over as Firecracker does, uses it as a guest would, and checks every byte.

Stands alone: only the standard library, nothing of postcopyd. It maps memory, registers it with a userfaultfd,
sends the regions and the descriptor in the format of the wanted Firecracker, and then several threads

1. read the same first pages at the same time,
2. read half of their own share in random order, compare each page with the image, and write into every eighth,
3. balloon some pages (MADV_DONTNEED), read before or not, and read them again: they must be zero,
4. read the other half;

at last everything is read once more: the image, what was written, and zeros where the balloon was.
Prints one JSON object; the exit status is 0 if every byte was right, 1 if not, 2 if it could not begin.

    python firecracker_client.py --socket PATH --image FILE --memory BYTES [--generation 1.12] …
"""

from __future__ import annotations

import argparse
import array
import ctypes
import fcntl
import hashlib
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field

SHARED_PAGES = 16
RUN_PAGES = 4
WRITTEN_EVERY = 8
STAMP = b"\xa5guest\x5a!"
GROUP_BYTES = 1 << 20
HUGE = 2 << 20

NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
FEATURE_EVENT_REMOVE = 1 << 3
MODE_MISSING = 1
MAP_PRIVATE_ANONYMOUS_NORESERVE = 0x2 | 0x20 | 0x4000
MAP_HUGETLB_2M = 0x40000 | 21 << 26
MADV_DONTNEED = 4

# Calls through a CDLL give up the GIL, so a thread that waits for a page stops no other. ctypes.memmove and
# string_at make no such promise.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.restype = ctypes.c_void_p
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def check(what: str, result: int | None) -> int:
    """Return what a C function returned, or raise its errno."""
    if result is None or result in (-1, (1 << 64) - 1):
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def open_uffd() -> int:
    """Return a userfaultfd with the features that Firecracker asks for."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = libc.syscall(NR_USERFAULTFD, flags)
    if fd < 0:
        # Without privilege. Nothing here lets the kernel touch the memory, so the difference does not show.
        fd = check("userfaultfd", libc.syscall(NR_USERFAULTFD, flags | UFFD_USER_MODE_ONLY))
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", UFFD_API, FEATURE_EVENT_REMOVE, 0))
    return int(fd)


@dataclass
class Memory:
    """Guest memory in one or more mappings, addressed by page index."""

    page_size: int
    page_counts: list[int]
    addresses: list[int] = field(default_factory=list)

    @classmethod
    def map(cls, size_bytes: int, page_size: int, regions: int) -> Memory:
        pages = size_bytes // page_size
        counts = [pages // regions + (index < pages % regions) for index in range(regions)]
        memory = cls(page_size, counts)
        flags = MAP_PRIVATE_ANONYMOUS_NORESERVE | (MAP_HUGETLB_2M if page_size == HUGE else 0)
        for count in counts:
            memory.addresses.append(check("mmap", libc.mmap(None, count * page_size, 3, flags, -1, 0)))
        return memory

    @property
    def pages(self) -> int:
        return sum(self.page_counts)

    def regions(self) -> list[tuple[int, int, int]]:
        """Return (address, size, image offset) of each mapping."""
        found, offset = [], 0
        for address, count in zip(self.addresses, self.page_counts, strict=True):
            found.append((address, count * self.page_size, offset))
            offset += count * self.page_size
        return found

    def address(self, page: int) -> int:
        for address, count in zip(self.addresses, self.page_counts, strict=True):
            if page < count:
                return address + page * self.page_size
            page -= count
        raise IndexError(page)

    def register(self, uffd: int) -> None:
        for address, size, _ in self.regions():
            fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("=QQQQ", address, size, MODE_MISSING, 0))


def message(memory: Memory, generation: str) -> bytes:
    """Return the hand-off as serde_json writes it."""
    entries = []
    for address, size, offset in memory.regions():
        entry = {"base_host_virt_addr": address, "size": size, "offset": offset}
        if generation == "1.12":
            entry["page_size"] = memory.page_size
        if generation != "1.1":
            entry["page_size_kib"] = memory.page_size
        entries.append(entry)
    return json.dumps(entries, separators=(",", ":")).encode()


def hand_over(path: str, uffd: int, memory: Memory, generation: str) -> socket.socket:
    """Connect, send, and go on: nothing is answered. Before 1.12 the socket is closed at once."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    data = message(memory, generation)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))
    if sock.sendmsg([data], [rights]) != len(data):
        raise OSError("the hand-off was not sent in one piece")
    if generation != "1.12":
        sock.close()
    return sock


@dataclass
class Guest:
    """Uses the memory with `threads` threads and keeps account of what was wrong."""

    memory: Memory
    image: int
    threads: int
    balloon_pages: int
    seed: int
    writes: bool
    wrong: set[int] = field(default_factory=set)
    not_zero: set[int] = field(default_factory=set)
    lost_writes: set[int] = field(default_factory=set)
    ballooned: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._barrier = threading.Barrier(self.threads)

    def run(self) -> None:
        workers = [threading.Thread(target=self._work, args=(index,)) for index in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, index: int) -> None:
        try:
            self._use(index)
        except Exception as error:  # noqa: BLE001 - it is reported, and no other thread waits for this one
            self.errors.append(repr(error))
            self._barrier.abort()

    def _use(self, index: int) -> None:
        chosen = random.Random(self.seed * 1000 + index)
        buffer = ctypes.create_string_buffer(self.memory.page_size)
        self._barrier.wait()
        for page in range(min(SHARED_PAGES, self.memory.pages)):
            self._verify(page, buffer)
        self._barrier.wait()
        share = range(
            self.memory.pages * index // self.threads, self.memory.pages * (index + 1) // self.threads
        )
        order = chosen.sample(share, len(share))
        for page in order[: len(order) // 2]:
            self._verify_and_write(page, buffer)
        self._balloon(chosen, share, buffer)
        for page in order[len(order) // 2 :]:
            self._verify_and_write(page, buffer)

    def _read(self, page: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
        libc.memcpy(buffer, self.memory.address(page), self.memory.page_size)
        return buffer.raw

    def reference(self, page: int) -> bytes:
        """Return the page of the image, zeros beyond its end."""
        size = self.memory.page_size
        return os.pread(self.image, size, page * size).ljust(size, b"\0")

    def expected(self, page: int) -> bytes:
        """Return what the page must hold now."""
        data = bytes(self.memory.page_size) if page in self.ballooned else self.reference(page)
        return STAMP + data[len(STAMP) :] if page in self.written else data

    def _verify(self, page: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
        data = self._read(page, buffer)
        if data != self.expected(page):
            self.wrong.add(page)
            if page in self.ballooned and page not in self.written:
                self.not_zero.add(page)
            if page in self.written and not data.startswith(STAMP):
                self.lost_writes.add(page)
        return data

    def _verify_and_write(self, page: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        self._verify(page, buffer)
        if self.writes and page % WRITTEN_EVERY == WRITTEN_EVERY - 1:
            libc.memcpy(self.memory.address(page), STAMP, len(STAMP))
            self.written.add(page)

    def _balloon(self, chosen: random.Random, share: range, buffer: ctypes.Array[ctypes.c_char]) -> None:
        """Give pages back in short runs, read or not, written or not, and read each of them again."""
        wanted = min(self.balloon_pages // self.threads, len(share))
        for start in chosen.sample(share[::RUN_PAGES], min(len(share[::RUN_PAGES]), -(-wanted // RUN_PAGES))):
            run = [page for page in range(start, start + RUN_PAGES) if page in share]
            for page in run:
                self.ballooned.add(page)
                self.written.discard(page)
                address = self.memory.address(page)
                check("madvise", libc.madvise(address, self.memory.page_size, MADV_DONTNEED))
            # Every second page only later, so that some are read for the first time after the balloon.
            for page in run[::2]:
                self._verify(page, buffer)

    def final_pass(self) -> tuple[str, list[str]]:
        """Read everything once more; return the SHA-256 of all memory, and of each group of pages."""
        buffer = ctypes.create_string_buffer(self.memory.page_size)
        pages_per_group = max(1, GROUP_BYTES // self.memory.page_size)
        whole = hashlib.sha256()
        groups = []
        for first in range(0, self.memory.pages, pages_per_group):
            digest = hashlib.sha256()
            for page in range(first, min(first + pages_per_group, self.memory.pages)):
                data = self._verify(page, buffer)
                digest.update(data)
                whole.update(data)
            groups.append(digest.hexdigest())
        return whole.hexdigest(), groups


def report(guest: Guest, whole: str, groups: list[str], elapsed_s: float) -> dict[str, object]:
    return {
        "ok": not (guest.wrong or guest.errors),
        "pages": guest.memory.pages,
        "wrong_pages": len(guest.wrong),
        "first_wrong": min(guest.wrong, default=None),
        "ballooned": len(guest.ballooned),
        "balloon_not_zero": len(guest.not_zero),
        "written": len(guest.written),
        "lost_writes": len(guest.lost_writes),
        "sha256_groups": groups,
        "sha256": whole,
        "errors": guest.errors,
        "elapsed_s": round(elapsed_s, 3),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--socket", required=True)
    parser.add_argument("--image", required=True, help="what memory must contain; zeros beyond its end")
    parser.add_argument("--memory", required=True, type=int, metavar="BYTES")
    parser.add_argument("--generation", choices=["1.1", "1.7", "1.12"], default="1.12")
    parser.add_argument("--page-size", type=int, choices=[4096, HUGE], default=4096)
    parser.add_argument("--regions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--balloon", type=int, default=0, metavar="PAGES", help="how many pages to give back")
    parser.add_argument("--read-only", action="store_true", help="write nothing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=100, metavar="S", help="killed by SIGALRM after this")
    parser.add_argument("--stay", action="store_true", help="live on after the report, until stdin closes")
    chosen = parser.parse_args()
    if chosen.memory <= 0 or chosen.memory % chosen.page_size:
        parser.error("--memory must be a multiple of --page-size")
    if chosen.generation == "1.1" and chosen.page_size != 4096:
        parser.error("generation 1.1 knows only pages of 4096 bytes")
    if not 1 <= chosen.regions <= chosen.memory // chosen.page_size or chosen.threads < 1:
        parser.error("--regions and --threads must be at least 1, and no region empty")
    return chosen


def main() -> int:
    chosen = arguments()
    # The default action ends the process even while its threads wait for pages that never come.
    signal.alarm(chosen.timeout)
    try:
        image = os.open(chosen.image, os.O_RDONLY)
        memory = Memory.map(chosen.memory, chosen.page_size, chosen.regions)
        uffd = open_uffd()
        memory.register(uffd)
        began = time.monotonic()
        sock = hand_over(chosen.socket, uffd, memory, chosen.generation)
    except OSError as error:
        print(json.dumps({"ok": False, "errors": [str(error)]}), flush=True)
        return 2
    guest = Guest(memory, image, chosen.threads, chosen.balloon, chosen.seed, not chosen.read_only)
    guest.run()
    whole, groups = guest.final_pass()
    print(json.dumps(report(guest, whole, groups, time.monotonic() - began)), flush=True)
    if chosen.stay:
        sys.stdin.read()
    # As Firecracker does, both are held to the end: the socket so that a hang-up means this process ended.
    sock.close()
    os.close(uffd)
    return 0 if not (guest.wrong or guest.errors) else 1


if __name__ == "__main__":
    sys.exit(main())
