"""In which order a connection takes what it received, and that its buffer is left alone until then."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest

from postcopyd._native import h2
from postcopyd.transport.h2_connection import BACKGROUND_READS_MAX, YIELDS_MAX, H2Connection
from postcopyd.urgency import Urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class Native:
    """Notes what it is fed; has nothing to say. In the background each PIECE_BYTES are a message."""

    def __init__(self, log: list[str]) -> None:
        self.attention = [0]
        self.messages = [0]
        self._log = log

    def feed(self, len_bytes: int, now: float) -> int:
        self._log.append(f"fed {len_bytes}")
        return 0

    def feed_background(self, epoll: int, begin: int, end: int, now: float, look_first: bool) -> int:
        look = look_first
        while begin < end and not (look and epoll >= 0 and is_readable(epoll)):
            piece = min(h2.PIECE_BYTES, end - begin)
            self._log.append(f"fed {begin} + {piece}")
            begin += piece
            look = True
        return begin

    def fill(self) -> int:
        return 0

    def retire(self) -> None:
        self._log.append("retired")


class Transport:
    """Reads or does not."""

    def __init__(self) -> None:
        self.is_reading = True
        self.socket, self.peer = socket.socketpair()

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self.socket if name == "socket" else None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


@pytest.fixture
def connect(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[H2Connection, Transport, list[str]]]]:
    monkeypatch.setattr("postcopyd.transport.h2_connection.tune", lambda transport: None)
    transports: list[Transport] = []

    def make(*, urgent: bool = False, background: bool = False) -> tuple[H2Connection, Transport, list[str]]:
        log: list[str] = []
        native = cast("h2.Connection", Native(log))
        connection = H2Connection(native, None, urgent=urgent, background=background)
        transport = Transport()
        transports.append(transport)
        connection.connection_made(cast("Any", transport))
        return connection, transport, log

    yield make
    for transport in transports:
        transport.socket.close()
        transport.peer.close()


@pytest.fixture
def fault() -> Iterator[int]:
    """Readable or not, as a userfaultfd is."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


async def turn() -> None:
    await asyncio.sleep(0)


async def test_the_background_lets_others_come_after_a_few_buffers(connect: Any) -> None:
    connection, transport, log = connect(background=True)
    for _ in range(2):
        # The loop has more for it each time, and others that nobody waits for.
        for number in range(BACKGROUND_READS_MAX):
            assert transport.is_reading, number
            connection.buffer_updated(h2.RECEIVE_BYTES)
        assert len(log) == BACKGROUND_READS_MAX * h2.RECEIVE_BYTES // h2.PIECE_BYTES
        assert not transport.is_reading
        log.clear()
        await turn()
        assert transport.is_reading
    # One that is not full is the last of its turn.
    connection.buffer_updated(h2.RECEIVE_BYTES)
    connection.buffer_updated(100)
    for _ in range(BACKGROUND_READS_MAX - 1):
        connection.buffer_updated(h2.RECEIVE_BYTES)
    assert transport.is_reading


async def test_what_is_waited_for_is_taken_at_once(connect: Any) -> None:
    connection, transport, log = connect(background=False)
    connection.buffer_updated(100)
    assert log == ["fed 100"]
    assert transport.is_reading
    connection.buffer_updated(h2.RECEIVE_BYTES)
    assert not transport.is_reading, "there is more, and it is somebody else's turn"
    await turn()
    assert transport.is_reading


async def test_a_reader_that_catches_up_does_not_free_a_buffer_that_is_taken(
    connect: Any, fault: int
) -> None:
    connection, transport, log = connect(background=True)
    watched = Urgency.of_running_loop().watch(fault)
    os.eventfd_write(fault, 1)
    connection.hold_reading(True)
    connection.buffer_updated(100)
    connection.hold_reading(False)
    assert not transport.is_reading
    os.eventfd_read(fault)
    await turn()
    assert (log, transport.is_reading) == (["fed 0 + 100"], True)
    Urgency.of_running_loop().forget(watched)


async def test_what_is_due_when_the_connection_is_lost_is_forgotten(connect: Any, fault: int) -> None:
    connection, _, log = connect(background=True)
    watched = Urgency.of_running_loop().watch(fault)
    os.eventfd_write(fault, 1)
    connection.buffer_updated(100)
    connection.connection_lost(None)
    os.eventfd_read(fault)
    await turn()
    assert log == ["retired"], "the native end is gone"
    Urgency.of_running_loop().forget(watched)


async def test_the_background_gives_way_to_a_fault_but_not_for_ever(connect: Any, fault: int) -> None:
    connection, transport, log = connect(background=True)
    watched = Urgency.of_running_loop().watch(fault)
    os.eventfd_write(fault, 1)
    connection.buffer_updated(2 * h2.PIECE_BYTES)
    assert not transport.is_reading, "the buffer would be written over"
    for _ in range(YIELDS_MAX - 1):
        await turn()
        assert log == []
    # Whoever reads it does not come: the push goes on all the same, and gives way once more before its next message.
    await turn()
    assert log == [f"fed 0 + {h2.PIECE_BYTES}"]
    assert not transport.is_reading, "the buffer is not empty yet"
    os.eventfd_read(fault)
    await turn()
    assert log == [f"fed 0 + {h2.PIECE_BYTES}", f"fed {h2.PIECE_BYTES} + {h2.PIECE_BYTES}"]
    assert transport.is_reading
    Urgency.of_running_loop().forget(watched)


async def test_the_background_gives_way_to_a_wanted_page_that_came(connect: Any) -> None:
    connection, _, log = connect(background=True)
    demand, transport, _ = connect(urgent=True)
    transport.peer.send(b"page")
    connection.buffer_updated(100)
    assert log == []
    transport.socket.recv(4)
    await turn()
    assert log == ["fed 0 + 100"]
    # A connection that is gone stands for nobody.
    transport.peer.send(b"more")
    demand.connection_lost(None)
    assert Urgency.of_running_loop().fd == -1


async def test_a_userfaultfd_that_the_vmm_keeps_open_is_watched_no_more(fault: int) -> None:
    urgency = Urgency.of_running_loop()
    ours, other = os.dup(fault), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    watched, other_watched = urgency.watch(ours), urgency.watch(other)
    os.eventfd_write(fault, 1)
    assert is_readable(urgency.fd)
    urgency.forget(watched)
    os.close(ours)
    assert not is_readable(urgency.fd)
    urgency.forget(other_watched)
    os.close(other)
    assert urgency.fd == -1
