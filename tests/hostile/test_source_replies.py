"""A source whose replies are wrong: each is counted and dropped, and its page stays absent until the right one comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop

from harness import TRANSPORTS, LocalDaemon, LocalGuest, content_of, local_daemon
from postcopyd.status import State
from postcopyd.units import PAGE_SIZE
from postcopyd.v1 import page_source_pb2 as pb
from scripted_source import ScriptedSource, Send, reply

PAGES = 200
CONTENT = content_of(PAGES)

Lie = Callable[[ScriptedSource, pb.Range], bytes]


def corrupted(source: ScriptedSource, asked: pb.Range) -> bytes:
    data = bytearray(source.run(asked).data)
    data[len(data) // 2] ^= 1
    return reply(source.run(asked, data=bytes(data)))


def from_elsewhere(source: ScriptedSource, asked: pb.Range) -> bytes:
    """A run that is right in itself, of another place, said to be the one that was asked for."""
    other = pb.Range(offset=0 if asked.offset else PAGE_SIZE, length=asked.length)
    run = source.run(other, request_id=asked.request_id)
    run.offset = asked.offset
    return reply(run)


LIES: dict[str, Lie] = {
    "corrupted": corrupted,
    "checksum of nothing": lambda s, asked: reply(s.run(asked, xxh3_64=0)),
    "page from elsewhere": from_elsewhere,
    "wrong offset": lambda s, asked: reply(s.run(asked, offset=asked.offset + PAGE_SIZE)),
    "offset of no page": lambda s, asked: reply(s.run(asked, offset=asked.offset + 1)),
    "longer than asked for": lambda s, asked: reply(
        s.run(pb.Range(request_id=asked.request_id, offset=asked.offset, length=asked.length + PAGE_SIZE))
    ),
    "zero beyond the range": lambda s, asked: reply(
        pb.Run(request_id=asked.request_id, offset=asked.offset, length=1 << 62)
    ),
    "part of a page": lambda s, asked: reply(
        s.run(pb.Range(request_id=asked.request_id, offset=asked.offset, length=PAGE_SIZE // 2))
    ),
    "less data than it says": lambda s, asked: reply(s.run(asked, data=s.run(asked).data[:-1])),
    "more data than it says": lambda s, asked: reply(s.run(asked, data=s.run(asked).data + b"x")),
    "no bytes": lambda s, asked: reply(s.run(asked, length=0, data=b"")),
    "never asked for": lambda s, asked: reply(s.run(asked, request_id=asked.request_id + (1 << 40))),
    "no protobuf": lambda s, asked: b"\xff" * 100,
    "cut short": lambda s, asked: reply(s.run(asked))[:-7],
}


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(params=TRANSPORTS)
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[LocalDaemon]:
    async with local_daemon(transport=request.param, silent_after_s=0.05) as daemon:
        yield daemon


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_nothing_wrong_is_installed_and_the_guest_completes_once_the_source_behaves(
    daemon: LocalDaemon, lie: Lie
) -> None:
    async with ScriptedSource(CONTENT) as source, LocalGuest(len(CONTENT)) as guest:

        async def lying(asked: pb.Range, send: Send) -> None:
            await send(lie(source, asked))

        source.script = lying
        prepared = await daemon.prepare("vm", source.address)
        await guest.hand_off(prepared.socket_path)
        first = guest.reading()
        lied = await daemon.until("vm", lambda status: status.bad_replies >= 3 and status.waiting == 1)
        assert lied.pages_installed == 0
        assert not first.done()
        source.script = source.right
        assert await first == CONTENT[:PAGE_SIZE]
        assert await guest.read_all() == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
    assert done.pages_demand + done.pages_pushed == PAGES
    assert source.completed[0].pages_installed == PAGES


async def test_a_source_that_only_lies_is_left_and_the_next_one_serves(daemon: LocalDaemon) -> None:
    async with (
        ScriptedSource(CONTENT) as liar,
        ScriptedSource(CONTENT) as honest,
        LocalGuest(len(CONTENT)) as guest,
    ):

        async def lying(asked: pb.Range, send: Send) -> None:
            await send(corrupted(liar, asked))

        liar.script = lying
        prepared = await daemon.prepare("vm", liar.address, honest.address)
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
    assert done.reconnects == 1
    assert done.source_in_use == honest.address
    assert (len(liar.completed), len(honest.completed)) == (0, 1)


async def test_a_few_wrong_replies_among_right_ones_cost_no_connection(daemon: LocalDaemon) -> None:
    """Every third range is answered wrongly once."""
    async with ScriptedSource(CONTENT) as source, LocalGuest(len(CONTENT)) as guest:
        wrong: set[int] = set()

        async def careless(asked: pb.Range, send: Send) -> None:
            if len(source.asked) % 3 == 0 and asked.offset not in wrong:
                wrong.add(asked.offset)
                await send(corrupted(source, asked))
            else:
                await source.right(asked, send)

        source.script = careless
        prepared = await daemon.prepare("vm", source.address)
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
    assert done.bad_replies == len(wrong) > 0
    assert done.reconnects == 0


async def test_a_range_answered_in_pieces_of_data_and_zero_is_whole(daemon: LocalDaemon) -> None:
    """What the protocol allows is no lie: runs of one page, zero pages without data, several in a message."""
    async with ScriptedSource(CONTENT) as source, LocalGuest(len(CONTENT)) as guest:

        async def in_pieces(asked: pb.Range, send: Send) -> None:
            runs = []
            for offset in range(asked.offset, asked.offset + asked.length, PAGE_SIZE):
                piece = pb.Range(request_id=asked.request_id, offset=offset, length=PAGE_SIZE)
                run = source.run(piece)
                runs.append(
                    run
                    if any(run.data)
                    else pb.Run(request_id=asked.request_id, offset=offset, length=PAGE_SIZE)
                )
            await send(reply(*runs[:3]))
            for run in runs[3:]:
                await send(reply(run))

        source.script = in_pieces
        prepared = await daemon.prepare("vm", source.address)
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
    assert (done.bad_replies, done.pages_zero) == (0, CONTENT.count(bytes(PAGE_SIZE)) and PAGES // 8)
