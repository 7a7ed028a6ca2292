"""In which order a connection takes what it received, and that its buffer is left alone until then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from postcopyd._native import h2
from postcopyd.transport.h2_connection import H2Connection

if TYPE_CHECKING:
    from collections.abc import Callable


class Native:
    """Notes what it is fed; has nothing to say."""

    def __init__(self, log: list[str]) -> None:
        self.attention = [0]
        self._log = log

    def feed(self, len_bytes: int, now: float) -> int:
        self._log.append(f"fed {len_bytes}")
        return 0

    def fill(self) -> int:
        return 0

    def retire(self) -> None:
        self._log.append("retired")


class Transport:
    """Reads or does not."""

    def __init__(self) -> None:
        self.is_reading = True

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[H2Connection, Transport, list[str]]]:
    monkeypatch.setattr("postcopyd.transport.h2_connection.tune", lambda transport: None)

    def make(*, background: bool) -> tuple[H2Connection, Transport, list[str]]:
        log: list[str] = []
        connection = H2Connection(cast("h2.Connection", Native(log)), None, background=background)
        transport = Transport()
        connection.connection_made(cast("Any", transport))
        return connection, transport, log

    return make


async def turn() -> None:
    await asyncio.sleep(0)


async def test_the_background_waits_for_what_came_in_the_same_turn(connect: Any) -> None:
    connection, transport, log = connect(background=True)
    # The loop calls back for the background first, then for others.
    connection.buffer_updated(100)
    log.append("others")
    assert not transport.is_reading, "the buffer would be written over"
    await turn()
    assert log == ["others", "fed 100"]
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


async def test_a_reader_that_catches_up_does_not_free_a_buffer_that_is_taken(connect: Any) -> None:
    connection, transport, log = connect(background=True)
    connection.hold_reading(True)
    connection.buffer_updated(100)
    connection.hold_reading(False)
    assert not transport.is_reading
    await turn()
    assert (log, transport.is_reading) == (["fed 100"], True)


async def test_what_is_due_when_the_connection_is_lost_is_forgotten(connect: Any) -> None:
    connection, _, log = connect(background=True)
    connection.buffer_updated(100)
    connection.connection_lost(None)
    await turn()
    assert log == ["retired"], "the native end is gone"
