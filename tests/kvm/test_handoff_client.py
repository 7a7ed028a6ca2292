"""The VMM's hand-off: the exact bytes of every format, a descriptor that works, and refusals that are errors."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from handoff_peer import HandoffPeer
from local_resolver import LocalResolver

from postcopyd.errors import Code, HandoffError
from postcopyd.vmm.guestmem import GuestMemory, MemoryKind
from postcopyd.vmm.handoff_client import HandoffFormat, encode, hand_off, regions_of
from postcopyd.vmm.uffd_client import register_memory
from support import require_uffd

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
GIB_4 = 4 << 30


def body_of(fmt: HandoffFormat, message: bytes) -> object:
    if fmt.is_framed:
        assert struct.unpack("<I", message[:4])[0] == len(message) - 4
        message = message[4:]
    return json.loads(message)


def test_each_format_has_exactly_the_fields_of_its_version() -> None:
    with GuestMemory(MemoryKind.ANONYMOUS, 3 * MIB) as memory:
        base = memory.address
        regions = regions_of(memory, 1)
        plain = {"base_host_virt_addr": base, "size": 3 * MIB, "offset": 0}
        expected = {
            HandoffFormat.FIRECRACKER_1_1: [plain],
            HandoffFormat.FIRECRACKER_1_7: [plain | {"page_size_kib": 4096}],
            HandoffFormat.FIRECRACKER_1_12: [plain | {"page_size": 4096, "page_size_kib": 4096}],
            HandoffFormat.FRAMED: {
                "type": "handoff",
                "version": 0,
                "vmm_pid": os.getpid(),
                "mode": "MISSING",
                "regions": [
                    {
                        "guest_phys_addr": GIB_4,
                        "host_virt_addr": base,
                        "size": 3 * MIB,
                        "backing_file_offset": 0,
                        "page_size": 4096,
                    }
                ],
            },
        }
        for fmt in HandoffFormat:
            assert body_of(fmt, encode(fmt, regions, 4096)) == expected[fmt]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_regions_cover_memory_without_gap_or_overlap(count: int) -> None:
    with GuestMemory(MemoryKind.ANONYMOUS, 5 * 4096) as memory:
        at = 0
        for region in regions_of(memory, count):
            assert (region.offset, region.address, region.gpa) == (at, memory.address + at, GIB_4 + at)
            assert region.size > 0
            assert region.size % 4096 == 0
            at += region.size
        assert at == memory.len_bytes


@pytest.mark.parametrize("fmt", list(HandoffFormat))
def test_the_descriptor_handed_over_serves_the_memory(fmt: HandoffFormat, tmp_path: Path) -> None:
    require_uffd()
    path = tmp_path / "socket"
    content = os.urandom(MIB)
    with (
        GuestMemory(MemoryKind.ANONYMOUS, MIB) as memory,
        register_memory(memory) as uffd,
        HandoffPeer(path) as peer,
    ):
        sock = hand_off(path, uffd, memory, fmt, regions=2)
        peer.wait()
        assert body_of(fmt, peer.message) == body_of(fmt, encode(fmt, regions_of(memory, 2), 4096))
        (fd,) = peer.fds
        with LocalResolver(fd, memory.address, MIB, lambda at, size: content[at : at + size]):
            assert memory.read(0, MIB) == content
        assert (sock is not None) == fmt.keeps_socket
        if sock is not None:
            sock.close()


def test_a_refused_hand_off_is_an_error(tmp_path: Path) -> None:
    require_uffd()
    path = tmp_path / "socket"
    with (
        GuestMemory(MemoryKind.ANONYMOUS, MIB) as memory,
        register_memory(memory) as uffd,
        HandoffPeer(path, answer=b""),
        pytest.raises(HandoffError) as caught,
    ):
        hand_off(path, uffd, memory)
    assert caught.value.code is Code.VMM_HANDOFF_UNANSWERED


def test_a_hand_off_that_nobody_takes_is_an_error(tmp_path: Path) -> None:
    require_uffd()
    with GuestMemory(MemoryKind.ANONYMOUS, MIB) as memory, register_memory(memory) as uffd:
        with pytest.raises(HandoffError, match="No such file"):
            hand_off(tmp_path / "none", uffd, memory)
        path = tmp_path / "silent"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            with pytest.raises(HandoffError, match="timed out"):
                hand_off(path, uffd, memory, timeout_s=0.05)
