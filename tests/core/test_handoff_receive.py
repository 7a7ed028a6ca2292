"""A hand-off over a real socket, with a real userfaultfd, under both event loops."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from postcopyd.errors import Code, HandoffError, InvariantError
from postcopyd.handoff import MAX_MESSAGE_BYTES, OwnedFd, peer, receive_handoff
from postcopyd.handoff.framed import parse_event
from postcopyd.units import MIB
from support_handoff import (
    ADD_REGION,
    ADD_REGION_BODY,
    FIRECRACKER_1_1,
    FIRECRACKER_1_7,
    FIRECRACKER_1_12,
    FRAMED,
    drained,
    framed,
    framed_with,
    no_descriptor_left,
    pair,
    refused_with,
    send,
)
from support_uffd import open_uffd

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    Run = Callable[[Coroutine[Any, Any, None]], None]

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


@pytest.fixture
def uffd() -> Iterator[int]:
    fd = open_uffd()
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (FIRECRACKER_1_1, "firecracker-1.1"),
        (FIRECRACKER_1_7, "firecracker-1.7"),
        (FIRECRACKER_1_12, "firecracker-1.12"),
        (FRAMED, "framed"),
    ],
)
def test_each_format_arrives_with_its_userfaultfd_and_its_peer(
    run: Run, uffd: int, data: bytes, name: str
) -> None:
    async def body() -> None:
        with pair() as (vmm, ours), no_descriptor_left():
            send(vmm, data, [uffd])
            handoff = await receive_handoff(ours.dup())
            assert handoff.format_name == name
            assert os.readlink(f"/proc/self/fd/{handoff.uffd.fileno()}") == "anon_inode:[userfaultfd]"
            assert not os.get_inheritable(handoff.uffd.fileno())
            assert handoff.vmm_pid == os.getpid()
            assert handoff.pidfd is not None
            assert os.readlink(f"/proc/self/fd/{handoff.pidfd.fileno()}") == "anon_inode:[pidfd]"
            handoff.close()
            handoff.close()

    run(body())


@pytest.mark.parametrize("data", [FIRECRACKER_1_12, FRAMED], ids=["array", "framed"])
def test_bytes_and_descriptor_may_come_in_any_pieces(run: Run, uffd: int, data: bytes) -> None:
    async def body() -> None:
        for cut in range(1, len(data)):
            for first, second in (([uffd], []), ([], [uffd])):
                with pair() as (vmm, ours):
                    receiving = asyncio.create_task(receive_handoff(ours.dup()))
                    send(vmm, data[:cut], first)
                    await drained(vmm)
                    assert not receiving.done()
                    send(vmm, data[cut:], second)
                    with await receiving as handoff:
                        assert len(handoff.regions) == 1

    with no_descriptor_left():
        run(body())


@pytest.mark.parametrize(
    ("data", "tail"), [(FIRECRACKER_1_1, b"\n"), (FRAMED, ADD_REGION)], ids=["array", "framed"]
)
def test_the_descriptor_may_come_after_the_message(run: Run, uffd: int, data: bytes, tail: bytes) -> None:
    async def body() -> None:
        with pair() as (vmm, ours):
            receiving = asyncio.create_task(receive_handoff(ours.dup()))
            send(vmm, data)
            await drained(vmm)
            send(vmm, tail, [uffd])
            with await receiving as handoff:
                assert handoff.message.leftover == tail.strip()

    run(body())


def test_a_message_that_drips_in_byte_by_byte_arrives(uffd: int, run: Run) -> None:
    async def body() -> None:
        with pair() as (vmm, ours):
            receiving = asyncio.create_task(receive_handoff(ours.dup()))
            for at in range(len(FRAMED)):
                send(vmm, FRAMED[at : at + 1], [uffd] if at == 7 else [])
                await drained(vmm)
            (await receiving).close()

    run(body())


def test_a_firecracker_that_closes_at_once_is_still_served(run: Run, uffd: int) -> None:
    async def body() -> None:
        with pair() as (vmm, ours):
            send(vmm, FIRECRACKER_1_1, [uffd])
            vmm.close()
            with await receive_handoff(ours.dup()) as handoff:
                assert not handoff.socket_is_liveness
                assert await handoff.receive_event() is None

    run(body())


def test_a_blocking_userfaultfd_is_made_non_blocking() -> None:
    async def body() -> None:
        blocking = open_uffd(os.O_CLOEXEC)
        with pair() as (vmm, ours):
            send(vmm, FRAMED, [blocking])
            os.close(blocking)
            with await receive_handoff(ours.dup()) as handoff:
                assert not os.get_blocking(handoff.uffd.fileno())

    asyncio.run(body())


async def test_firecrackers_memfd_is_closed_because_it_would_keep_guest_memory_allocated(uffd: int) -> None:
    memfd = os.memfd_create("guest")
    with pair() as (vmm, ours):
        send(vmm, FIRECRACKER_1_7, [uffd, memfd])
        os.close(memfd)
        with await receive_handoff(ours.dup()) as handoff:
            assert not handoff.extras
            assert not [
                name for name in map(_link, os.listdir("/proc/self/fd")) if name.startswith("/memfd:guest")
            ]


def _link(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""


async def test_named_descriptors_arrive_under_their_names(uffd: int) -> None:
    ledger = os.memfd_create("ledger")
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, framed_with(descriptors=["ledger", "uffd"]), [ledger, uffd])
        with await receive_handoff(ours.dup(), served={"uffd", "ledger"}) as handoff:
            assert list(handoff.extras) == ["ledger"]
            assert os.fstat(handoff.extras["ledger"].fileno()).st_ino == os.fstat(ledger).st_ino
            os.close(handoff.uffd.take())
    os.close(ledger)


def test_an_acknowledgement_is_one_byte(run: Run, uffd: int) -> None:
    async def body() -> None:
        with pair() as (vmm, ours):
            send(vmm, FRAMED, [uffd])
            with await receive_handoff(ours.dup()) as handoff:
                await handoff.acknowledge()
            ours.close()
            assert len(vmm.recv(16)) == 1
            assert vmm.recv(16) == b""

    run(body())


async def test_a_refused_vmm_reads_end_of_file_and_no_byte(uffd: int) -> None:
    with pair() as (vmm, ours):
        send(vmm, FRAMED, [uffd])
        handoff = await receive_handoff(ours.dup())
        ours.close()
        handoff.refuse(HandoffError(Code.HANDOFF_BUSY, "another VMM is there"))
        assert vmm.recv(16) == b""


async def test_firecracker_is_sent_nothing(uffd: int) -> None:
    with pair() as (vmm, ours):
        send(vmm, FIRECRACKER_1_12, [uffd])
        with await receive_handoff(ours.dup()) as handoff:
            await handoff.acknowledge()
        ours.close()
        assert vmm.recv(16) == b""


async def test_acknowledging_a_vmm_that_is_gone_says_so(uffd: int) -> None:
    with pair() as (vmm, ours):
        send(vmm, FRAMED, [uffd])
        with await receive_handoff(ours.dup()) as handoff:
            vmm.close()
            with refused_with(Code.VMM_GONE):
                await handoff.acknowledge()


async def test_a_vmm_that_does_not_read_cannot_hold_the_acknowledgement_up(uffd: int) -> None:
    with pair() as (vmm, ours):
        send(vmm, FRAMED, [uffd])
        with await receive_handoff(ours.dup()) as handoff:
            while True:
                try:
                    handoff.sock.send(bytes(4096))
                except BlockingIOError:
                    break
            with refused_with(Code.HANDOFF_TIMEOUT):
                await handoff.acknowledge(timeout_s=0.02)


def test_regions_are_added_one_by_one_and_each_is_answered(run: Run, uffd: int) -> None:
    async def body() -> None:
        with pair() as (vmm, ours):
            send(vmm, FRAMED + ADD_REGION + ADD_REGION[:50], [uffd])
            with await receive_handoff(ours.dup()) as handoff:
                assert await handoff.receive_event() == parse_event(ADD_REGION_BODY)
                await handoff.acknowledge()
                assert len(vmm.recv(16)) == 1
                waiting = asyncio.create_task(handoff.receive_event())
                await asyncio.sleep(0)
                assert not waiting.done()
                send(vmm, ADD_REGION[50:])
                assert await waiting == parse_event(ADD_REGION_BODY)
                vmm.close()
                assert await handoff.receive_event() is None

    run(body())


@pytest.mark.parametrize(
    ("first", "then", "count", "code"),
    [
        (FIRECRACKER_1_12, b"no_exitless_apf", 0, Code.HANDOFF_UNEXPECTED),
        (FRAMED, ADD_REGION, 1, Code.HANDOFF_UNEXPECTED),
        (FRAMED, framed(b'{"type":"stop"}'), 0, Code.HANDOFF_UNEXPECTED),
        (FRAMED, bytes([0, 0, 1, 0]), 0, Code.HANDOFF_TOO_LARGE),
    ],
    ids=["firecracker goes on", "a descriptor with an event", "unknown event", "event too long"],
)
async def test_what_no_format_knows_after_a_handoff_is_refused(
    uffd: int, first: bytes, then: bytes, count: int, code: Code
) -> None:
    with pair() as (vmm, ours), no_descriptor_left():
        send(vmm, first, [uffd])
        with await receive_handoff(ours.dup()) as handoff:
            send(vmm, then, [uffd] * count)
            with refused_with(code):
                await handoff.receive_event()


async def test_memory_is_held_against_the_image(uffd: int) -> None:
    with pair() as (vmm, ours):
        send(vmm, FRAMED, [uffd])
        with await receive_handoff(ours.dup()) as handoff:
            handoff.check_image(256 * MIB)
            with refused_with(Code.HANDOFF_BEYOND_IMAGE):
                handoff.check_image(255 * MIB)


async def test_the_pidfd_is_of_the_process_that_connected(
    uffd: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = str(tmp_path_factory.mktemp("s") / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        child = await asyncio.create_subprocess_exec(
            "python3",
            "-c",
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()",
            path,
            stdin=asyncio.subprocess.PIPE,
        )
        listener.settimeout(20)
        ours, _ = await asyncio.to_thread(listener.accept)
    with ours:
        who = peer.peer_of(ours)
        assert (who.pid, who.uid, who.gid) == (child.pid, os.geteuid(), os.getegid())
        pidfd = peer.open_pidfd(ours, who)
        assert pidfd is not None
        assert not select.select([pidfd.fileno()], [], [], 0)[0]
        await child.communicate(b"")
        assert select.select([pidfd.fileno()], [], [], 0)[0]
        pidfd.close()


def test_a_kernel_without_peer_pidfds_gives_one_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "SO_PEERPIDFD", 9999)
    with pair() as (_, ours):
        pidfd = peer.open_pidfd(ours, peer.peer_of(ours))
        assert pidfd is not None
        assert os.readlink(f"/proc/self/fd/{pidfd.fileno()}") == "anon_inode:[pidfd]"
        pidfd.close()


def test_a_peer_in_another_pid_name_space_has_no_pidfd_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "SO_PEERPIDFD", 9999)
    with pair() as (_, ours):
        assert peer.open_pidfd(ours, peer.Peer(0, 0, 0)) is None


def test_a_descriptor_is_closed_once_and_never_after_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr("postcopyd.handoff.descriptors.os.close", closed.append)
    owned, taken = OwnedFd(1001), OwnedFd(1002)
    owned.close()
    owned.close()
    assert taken.take() == 1002
    taken.close()
    assert closed == [1001]
    assert not owned.is_open
    for gone in (owned, taken):
        with pytest.raises(InvariantError):
            gone.fileno()


def test_a_descriptor_whose_close_fails_does_not_keep_others_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(5, "EIO")

    monkeypatch.setattr("postcopyd.handoff.descriptors.os.close", refuse)
    owned = OwnedFd(1001)
    owned.close()
    assert not owned.is_open


async def test_the_longest_message_fits(uffd: int) -> None:
    data = framed_with(note="x")
    data = framed_with(note="x" * (MAX_MESSAGE_BYTES - len(data) + 1))
    assert len(data) == MAX_MESSAGE_BYTES
    with pair() as (vmm, ours):
        receiving = asyncio.create_task(receive_handoff(ours.dup()))
        send(vmm, data[:4096], [uffd])
        vmm.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(vmm, data[4096:])
        (await receiving).close()
