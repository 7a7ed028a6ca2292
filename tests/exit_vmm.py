"""A VMM that reports faults through an exit ring, byte by byte as docs/exit-ring.md has it, well or badly.

Its vCPUs are numbers: what they wait for is whatever a test posts. Memory, userfaultfd and readers are a LocalGuest's.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING

from harness import PATIENCE_S, LocalGuest
from postcopyd.units import PAGE_SIZE
from postcopyd.vmm.handoff_client import HandoffFormat, encode, regions_of
from support_handoff import framed, send

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEADER_BYTES, LANE_BYTES, ENTRY_BYTES, ENTRIES = 768, 1280, 32, 16
LANE_OFFSET = 1024
RESIDENCY = 1
STATE_AT, ARMED_AT, PENDING_AT = 72, 128, 256
FAULT_HEAD, DONE_TAIL, SLEEPING, DONE_HEAD, WAKE, FAULTS, COMPLETIONS = 0, 4, 8, 68, 128, 192, 704
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
RESOLVED = 0
DESCRIPTORS = ("uffd", "exit_ring", "exit_notify")

_FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
_FUTEX_WAIT = 0
_GEOMETRY = struct.Struct("<QIIQQIIQQQ")
_FAULT = struct.Struct("<QQIIQ")
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class RingMemory:
    """The shared memory and its doorbell. `lies`: fields of the header that a good VMM would not write so."""

    def __init__(
        self,
        vcpus: int,
        pages: int,
        *,
        size: int = 0,
        seals: int = SEALS,
        lies: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.vcpus = vcpus
        self.residency_at = -(-(LANE_OFFSET + vcpus * LANE_BYTES) // PAGE_SIZE) * PAGE_SIZE
        total = self.residency_at + -(-pages // (8 * PAGE_SIZE)) * PAGE_SIZE
        self.fd = os.memfd_create("exit-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size or total)
        if seals:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.memory = mmap.mmap(self.fd, size or total)
        fields = {
            "magic": int.from_bytes(b"EXITRING", "little"),
            "version": 1,
            "vcpus": vcpus,
            "total_bytes": total,
            "features": RESIDENCY,
            "entries": ENTRIES,
            "lane_bytes": LANE_BYTES,
            "lane_offset": LANE_OFFSET,
            "residency_offset": self.residency_at,
            "residency_pages": pages,
        }
        assert lies.keys() <= fields.keys()
        self.memory[: _GEOMETRY.size] = _GEOMETRY.pack(*{**fields, **lies}.values())

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)
        os.close(self.doorbell)

    def get(self, at: int) -> int:
        word: int = struct.unpack_from("<I", self.memory, at)[0]
        return word

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.memory, at, value & 0xFFFFFFFF)

    def lane(self, vcpu: int, field: int) -> int:
        """Where a field of a vCPU's lane lies."""
        return LANE_OFFSET + vcpu * LANE_BYTES + field

    def ring(self) -> None:
        """Say that there is something new in every lane, and wake the daemon whether it sleeps or not."""
        for first in range(0, self.vcpus, 64):
            bits = (1 << min(64, self.vcpus - first)) - 1
            struct.pack_into("<Q", self.memory, PENDING_AT + first // 8, bits)
        os.eventfd_write(self.doorbell, 1)

    def write_fault(
        self, vcpu: int, index: int, gpa: int, *, flags: int = 0, named: int | None = None
    ) -> None:
        """Fill a slot. named: the vCPU that the entry names, if another."""
        entry = _FAULT.pack(gpa, index, flags, vcpu if named is None else named, 0)
        at = self.lane(vcpu, FAULTS) + index % ENTRIES * ENTRY_BYTES
        self.memory[at : at + ENTRY_BYTES] = entry

    def post(self, vcpu: int, gpas: Sequence[int], **entry: int) -> None:
        """Post a batch into an idle lane."""
        head = self.get(self.lane(vcpu, FAULT_HEAD))
        for index, gpa in enumerate(gpas, head):
            self.write_fault(vcpu, index, gpa, **entry)
        self.put(self.lane(vcpu, FAULT_HEAD), head + len(gpas))
        self.ring()

    def answered(self, vcpu: int) -> int:
        """Completions of the batch under way."""
        return self.get(self.lane(vcpu, DONE_HEAD)) - self.get(self.lane(vcpu, DONE_TAIL))

    def release(self, vcpu: int) -> None:
        """Let the batch go."""
        self.put(self.lane(vcpu, DONE_TAIL), self.get(self.lane(vcpu, FAULT_HEAD)))

    def is_resident(self, page: int) -> bool:
        return bool(self.memory[self.residency_at + page // 8] >> page % 8 & 1)

    def sleep_until_woken(self, vcpu: int) -> list[int]:
        """Wait as a vCPU does, on its futex; return the batch's statuses and let it go. Blocks: for a thread."""
        posted = self.get(self.lane(vcpu, FAULT_HEAD)) - self.get(self.lane(vcpu, DONE_TAIL))
        word = ctypes.c_uint32.from_buffer(self.memory, self.lane(vcpu, WAKE))
        try:
            self.put(self.lane(vcpu, SLEEPING), 1)
            while True:
                before = word.value
                if self.answered(vcpu) == posted:
                    break
                limit = _Timespec(int(PATIENCE_S), 0)
                woken = _libc.syscall(
                    _FUTEX, ctypes.byref(word), _FUTEX_WAIT, before, ctypes.byref(limit), None, 0
                )
                assert woken == 0 or self.get(self.lane(vcpu, WAKE)) != before, "nobody woke the vCPU"
        finally:
            self.put(self.lane(vcpu, SLEEPING), 0)
            del word
        first = self.get(self.lane(vcpu, DONE_TAIL))
        statuses = [
            self.get(self.lane(vcpu, COMPLETIONS) + (first + n) % ENTRIES * ENTRY_BYTES + 16)
            for n in range(posted)
        ]
        self.release(vcpu)
        return statuses


class ExitGuest(LocalGuest):
    """Memory that is handed over together with a ring."""

    def __init__(self, len_bytes: int, ring: RingMemory) -> None:
        super().__init__(len_bytes)
        self.ring = ring
        self.gpa = regions_of(self.memory)[0].gpa

    async def __aexit__(self, *details: object) -> None:
        await super().__aexit__(*details)
        self.ring.close()

    def gpa_of(self, page: int) -> int:
        return self.gpa + page * PAGE_SIZE

    def message(self, **changes: object) -> bytes:
        body = json.loads(encode(HandoffFormat.FRAMED, regions_of(self.memory), PAGE_SIZE)[4:])
        return framed({**body, "descriptors": DESCRIPTORS, "vcpus": self.ring.vcpus, **changes})

    async def hand_off_with_ring(
        self, path: str, *, fds: Sequence[int] | None = None, **changes: object
    ) -> bytes:
        """Hand over; return what the daemon said: one byte, or nothing if it refused. fds: instead of the right ones."""
        chosen = [self.uffd.fileno(), self.ring.fd, self.ring.doorbell] if fds is None else fds
        return await asyncio.to_thread(self._hand_off, path, self.message(**changes), chosen)

    def _hand_off(self, path: str, message: bytes, fds: Sequence[int]) -> bytes:
        sock = socket.socket(socket.AF_UNIX)
        self._socket = sock
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        send(sock, message, fds)
        return sock.recv(1)

    async def answers(self, vcpu: int) -> list[int]:
        """Wait for the end of the vCPU's batch; return its statuses."""
        return await asyncio.to_thread(self.ring.sleep_until_woken, vcpu)
