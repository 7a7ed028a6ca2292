"""A userfaultfd without a kernel: pages, threads that block on them, and mappings that change, for `Pager(edge=…)`.

It keeps the book the real one cannot: what every page ought to hold, and who saw what. A breach is noted in `breaches`,
as an exception cannot leave a C callback. What it imitates is fs/userfaultfd.c: faults are read ahead of events; while
an event is unread, or its cause has not run on, installs answer EAGAIN; a wake lets a thread look again.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from postcopyd._native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

EVENT_PAGEFAULT, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 0x12, 0x14, 0x15, 0x16
MESSAGE_BYTES = 32
COPY, ZEROPAGE, CONTINUE, POISON = range(4)


@dataclass
class Page:
    """One page of the guest, wherever it is mapped."""

    number: int
    size: int
    expected: bytes
    content: bytes | None = None
    vma: int = 0
    removing: int = 0
    """Removals announced and not carried out: it may be seen either way."""


@dataclass
class Blocked:
    """A thread that stands still at `hva`; `pending` until its message is read."""

    hva: int
    pending: bool = True


@dataclass
class Change:
    """A change of the mapping: its event, and what is left to do once that is read."""

    message: bytes
    finish: Callable[[], None] = field(default=lambda: None)


class FakeKernel:
    """Args: pages by address; `thread_ids` as with UFFD_FEATURE_THREAD_ID."""

    def __init__(self, pages: dict[int, Page], *, thread_ids: bool = True) -> None:
        self.mapped = dict(pages)
        self.thread_ids = thread_ids
        self.blocked: dict[int, Blocked] = {}
        self.breaches: list[str] = []
        self.seen: deque[tuple[int, int]] = deque(maxlen=1000)
        self.unread: deque[Change] = deque()
        self.unfinished: deque[Change] = deque()
        self.short_for = 0
        """Installs that find no memory."""
        self.most_pages = 0
        """Pages one install places before it stops half way; 0: all."""
        self.lazy_changes = 0
        """Installs that a change of the mapping still refuses after its event was read."""
        self.calls_to_live = -1
        self.dead = False
        self.on_death: Callable[[], None] = lambda: None
        self._faults: deque[int] = deque()
        self._vmas = 1
        self._build_edge()

    # ── the pager's side ─────────────────────────────────────────────────────────────────────────────────────────

    def _build_edge(self) -> None:
        ffi = _core.ffi
        self._callbacks = {
            "install": ffi.callback(
                "struct uffd_result(int, enum uffd_op, uint64_t, uint64_t, uint64_t)", self._install
            ),
            "wake": ffi.callback("int(int, uint64_t, uint64_t)", self._wake),
            "unprotect": ffi.callback("int(int, uint64_t, uint64_t)", self._nothing),
            "unregister": ffi.callback("int(int, uint64_t, uint64_t)", self._nothing),
            "read": ffi.callback("ssize_t(int, struct uffd_msg *, size_t)", self._read),
        }
        self.edge = ffi.new("struct uffd_edge *", self._callbacks)

    def _alive(self) -> bool:
        """Count a call; the one at which the process dies has its effect, and is its last."""
        if self.calls_to_live > 0:
            self.calls_to_live -= 1
        return not self.dead

    def _maybe_die(self) -> None:
        if self.calls_to_live == 0 and not self.dead:
            self.dead = True
            self.on_death()

    def revive(self) -> None:
        self.dead = False
        self.calls_to_live = -1

    def _nothing(self, _fd: int, _start: int, _len_bytes: int) -> int:
        return 0

    def _install(self, _fd: int, op: int, dst: int, src: int, len_bytes: int) -> Any:
        result = (errno.EAGAIN, -errno.EAGAIN)
        if self._alive():
            result = self._place(op, dst, src, len_bytes)
            self._maybe_die()
        return _core.lib.uffd_classify(op, result[0], result[1], len_bytes)

    def _place(self, op: int, dst: int, src: int, len_bytes: int) -> tuple[int, int]:
        """(errno, the result field)."""
        if self._is_changing():
            return errno.EAGAIN, -errno.EAGAIN
        first = self.mapped.get(dst)
        if first is None:
            return errno.ENOENT, -errno.ENOENT
        if dst % first.size or len_bytes % first.size:
            self.breaches.append(f"install at {dst:#x} of {len_bytes} is not whole pages")
            return errno.EINVAL, -errno.EINVAL
        addresses = range(dst, dst + len_bytes, first.size)
        if any(self._vma_of(hva) != first.vma for hva in addresses):
            return errno.ENOENT, -errno.ENOENT
        if self.short_for:
            self.short_for -= 1
            return errno.ENOMEM, -errno.ENOMEM
        if op == CONTINUE:
            return errno.EFAULT, -errno.EFAULT
        if op == ZEROPAGE and first.size != 4096:
            return errno.EINVAL, -errno.EINVAL
        done = 0
        for hva in addresses:
            page = self.mapped[hva]
            if page.content is not None:
                return (errno.EAGAIN, done) if done else (errno.EEXIST, -errno.EEXIST)
            if self.most_pages and done == self.most_pages * first.size:
                return errno.EAGAIN, done
            self._fill(op, hva, page, src + hva - dst)
            done += first.size
        return 0, len_bytes

    def _fill(self, op: int, hva: int, page: Page, src: int) -> None:
        copied = bytes(_core.ffi.buffer(_core.ffi.cast("uint8_t *", src), page.size)) if op == COPY else None
        page.content = copied or bytes(page.size)
        if page.content != page.expected and not (page.removing and not any(page.content)):
            self.breaches.append(f"page {page.number} was filled with what it must not hold")
        self._let_look_again(hva, page.size)

    def _vma_of(self, hva: int) -> int | None:
        page = self.mapped.get(hva)
        return None if page is None else page.vma

    def _wake(self, _fd: int, start: int, len_bytes: int) -> int:
        if self._alive():
            self._let_look_again(start, len_bytes)
            self._maybe_die()
        return 0

    def _read(self, _fd: int, messages: Any, len_bytes: int) -> int:
        if not self._alive():
            return -errno.EAGAIN
        batch: list[bytes] = []
        while self._faults and len(batch) < len_bytes // MESSAGE_BYTES:
            tid = self._faults.popleft()
            self.blocked[tid].pending = False
            batch.append(self._fault_message(tid))
        while self.unread and len(batch) < len_bytes // MESSAGE_BYTES:
            change = self.unread.popleft()
            batch.append(change.message)
            self.unfinished.append(change)
        data = b"".join(batch)
        _core.ffi.buffer(messages, len(data))[:] = data
        self._maybe_die()
        return len(data) or -errno.EAGAIN

    def _fault_message(self, tid: int) -> bytes:
        ptid = tid if self.thread_ids else 0
        return struct.pack("<BxHIQQI4x", EVENT_PAGEFAULT, 0, 0, 0, self.blocked[tid].hva, ptid)

    def _is_changing(self) -> bool:
        if self.unread:
            return True
        if self.unfinished:
            if self.lazy_changes:
                self.lazy_changes -= 1
                return True
            self.finish_changes()
        return False

    def finish_changes(self) -> None:
        """The threads whose events were read run on."""
        while self.unfinished:
            self.unfinished.popleft().finish()

    # ── the VMM's side ───────────────────────────────────────────────────────────────────────────────────────────

    def touch(self, tid: int, hva: int, write: bytes | None = None) -> bool:
        """Thread `tid` accesses the page at `hva`, and blocks if it is absent. False if it does."""
        page = self.mapped.get(hva)
        if page is None:  # SIGSEGV
            return True
        if page.content is None:
            self.blocked[tid] = Blocked(hva)
            self._faults.append(tid)
            return False
        if page.content != page.expected and not page.removing:
            self.breaches.append(f"thread {tid} saw page {page.number} with wrong content")
        self.seen.append((tid, page.number))
        if write is not None:
            page.content = page.expected = write * (page.size // len(write))
        return True

    def _let_look_again(self, start: int, len_bytes: int) -> None:
        for tid, waiting in list(self.blocked.items()):
            if 0 <= waiting.hva - start < len_bytes:
                if waiting.pending:
                    self._faults.remove(tid)
                del self.blocked[tid]
                self.touch(tid, waiting.hva)

    def remove(self, start: int, end: int) -> None:
        """MADV_DONTNEED: announced first; the pages go when the caller runs on."""
        pages = [page for hva, page in self.mapped.items() if start <= hva < end]
        for page in pages:
            page.removing += 1

        def zap() -> None:
            for page in pages:
                page.removing -= 1
                page.content = None
                page.expected = bytes(page.size)

        self.unread.append(Change(struct.pack("<BxHIQQ8x", EVENT_REMOVE, 0, 0, start, end), zap))

    def unmap(self, start: int, end: int) -> None:
        for hva in [hva for hva in self.mapped if start <= hva < end]:
            del self.mapped[hva]
        self.unread.append(Change(struct.pack("<BxHIQQ8x", EVENT_UNMAP, 0, 0, start, end)))

    def remap(self, start: int, to: int, len_bytes: int) -> None:
        """mremap(MREMAP_FIXED) to a free place."""
        self._vmas += 1
        for hva in [hva for hva in self.mapped if start <= hva < start + len_bytes]:
            page = self.mapped.pop(hva)
            page.vma = self._vmas * 1000 + page.vma
            self.mapped[hva - start + to] = page
        self.unread.append(Change(struct.pack("<BxHIQQQ", EVENT_REMAP, 0, 0, start, to, len_bytes)))

    def split(self, start: int, end: int) -> None:
        """mprotect of a part: the same memory in more mappings."""
        self._vmas += 1
        for hva, page in self.mapped.items():
            if start <= hva < end:
                page.vma = self._vmas * 1000 + page.vma
