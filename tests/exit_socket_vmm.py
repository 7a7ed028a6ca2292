"""A VMM that forwards its vCPUs' faults over the hand-off socket, in the test's own process.

A "vCPU" here asks for a page, waits for the reply, and then looks at memory the way KVM would: through the mapping, or
for a guest_memfd through the file and only if the page's bit is clear. A plain memfd stands for the guest_memfd.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import json
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Self

from harness import PATIENCE_S, LocalGuest
from postcopyd._native import vmm as native
from postcopyd.handoff.exit_frames import (
    FaultReply,
    FaultRequest,
    Form,
    decode_reply,
    encode_json_request,
    encode_request,
)
from postcopyd.units import PAGE_SIZE
from postcopyd.vmm.guestmem import MemoryKind
from postcopyd.vmm.uffd_client import UFFDIO_REGISTER, Feature, Uffd

if TYPE_CHECKING:
    from postcopyd.units import Hva

GPA = 1 << 32
USERFAULT = 16
NO_EXITLESS = b"no_exitless_apf"

_MISSING_AND_MINOR = 1 | 4
_MINOR_SHMEM = 1 << 10


def frame(request: FaultRequest, form: Form = Form.BITCODE) -> bytes:
    if form is Form.JSON:
        return encode_json_request(request)
    payload = encode_request(request)
    return struct.pack("<I", len(payload)) + payload


class ExitSocketVmm:
    """Its end of the socket. `replies`: what came and nobody waited for; a daemon that died may have said it twice."""

    def __init__(self, form: Form = Form.BITCODE) -> None:
        self.form = form
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.replies: list[FaultReply] = []
        self._waiting: dict[tuple[object, ...], asyncio.Future[FaultReply]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self.sock.close()

    async def hand_off(self, path: str, address: int, size: int, fds: list[int], behind: bytes = b"") -> None:
        entry = {
            "base_host_virt_addr": address,
            "size": size,
            "offset": 0,
            "page_size": PAGE_SIZE,
            "page_size_kib": PAGE_SIZE,
            "gpa_start": GPA,
            "is_guest_memfd": len(fds) > 1,
        }
        await asyncio.get_running_loop().sock_connect(self.sock, path)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.sock.sendmsg([json.dumps([entry]).encode() + behind], rights)

    def listen(self) -> None:
        """Begin to read replies."""
        self._reading = asyncio.ensure_future(self._read())

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def request(self, vcpu: int, page: int) -> FaultRequest:
        if self.form is Form.JSON:
            return FaultRequest(vcpu, page * PAGE_SIZE, USERFAULT, token=vcpu + 100)
        return FaultRequest(vcpu, 0, USERFAULT, GPA + page * PAGE_SIZE)

    async def resolve(self, vcpu: int, page: int) -> FaultReply:
        """Ask for a page and return what came; `vcpu` asks for nothing else meanwhile."""
        request = self.request(vcpu, page)
        answered = self._waiting[_key(request)] = asyncio.get_running_loop().create_future()
        await self.send(frame(request, self.form))
        async with asyncio.timeout(PATIENCE_S):
            reply = await answered
        assert (reply.flags, reply.len_bytes) == (USERFAULT, PAGE_SIZE)
        return reply

    async def _read(self) -> None:
        data = b""
        while chunk := await asyncio.get_running_loop().sock_recv(self.sock, 65536):
            data += chunk
            while (cut := self._cut(data)) is not None:
                reply, data = cut
                waiting = self._waiting.pop(_key(reply), None)
                if waiting is None:
                    self.replies.append(reply)
                else:
                    waiting.set_result(reply)

    def _cut(self, data: bytes) -> tuple[FaultReply, bytes] | None:
        if self.form is Form.JSON:
            if b"}" not in data:
                return None
            text, _, rest = data.partition(b"}")
            values = json.loads(text + b"}")
            values["len_bytes"] = values.pop("len")
            return FaultReply(**values, gpa=None), rest
        if len(data) < 4 or len(data) < 4 + (length := struct.unpack_from("<I", data)[0]):
            return None
        return decode_reply(data[4 : 4 + length]), data[4 + length :]


def _key(message: FaultRequest | FaultReply) -> tuple[object, ...]:
    """What a reply has of its request."""
    return message.vcpu, message.gpa, message.offset, message.token


class MemfdGuest(LocalGuest):
    """Guest memory in a memfd that is handed over with a bitmap, and registered for missing and minor faults."""

    def __init__(self, len_bytes: int) -> None:
        self.file = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, len_bytes)
        self.bitmap = os.memfd_create("bitmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.bitmap, (len_bytes // PAGE_SIZE + 63) // 64 * 8)
        self.bits = mmap.mmap(self.bitmap, 0)
        super().__init__(PAGE_SIZE)
        self.uffd.unregister(self.memory.address, PAGE_SIZE)
        self.uffd.close()
        native.unmap(self.memory.address, PAGE_SIZE)
        self.memory.kind = MemoryKind.MEMFD
        self.memory.len_bytes = len_bytes
        self.memory.address = native.map_memory(native.MapCode.FILE, len_bytes, self.file)
        self.uffd = _register(self.memory.address, len_bytes)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        self.bits.close()
        os.close(self.file)
        os.close(self.bitmap)

    @property
    def descriptors(self) -> list[int]:
        return [self.uffd.fileno(), self.file, self.bitmap]

    def fill_bitmap(self, exempt: tuple[int, ...] = ()) -> None:
        self.bits[:] = b"\xff" * len(self.bits)
        for page in exempt:
            self.bits[page // 8] &= ~(1 << page % 8)

    def would_exit(self, page: int) -> bool:
        return bool(self.bits[page // 8] >> page % 8 & 1)

    def kvm_reads(self, page: int) -> bytes:
        """What a vCPU sees: the file, never the mapping; it must not be there before its bit is clear."""
        assert not self.would_exit(page)
        return os.pread(self.file, PAGE_SIZE, page * PAGE_SIZE)


def _register(address: Hva, len_bytes: int) -> Uffd:
    uffd = Uffd(Feature.MISSING_SHMEM | Feature.THREAD_ID | Feature.EVENT_REMOVE | Feature(_MINOR_SHMEM))
    fcntl.ioctl(
        uffd.fileno(), UFFDIO_REGISTER, struct.pack("=QQQQ", address, len_bytes, _MISSING_AND_MINOR, 0)
    )
    return uffd
