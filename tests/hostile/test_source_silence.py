"""A source that is late or says nothing: it is given up, the guest waits, and goes on when a source answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from harness import PATIENCE_S, TRANSPORTS, LocalDaemon, LocalGuest, content_of, local_daemon
from postcopyd.errors import Code, SourceError
from postcopyd.status import Limits, MigrationStatus, State
from postcopyd.units import PAGE_SIZE
from postcopyd.v1 import page_source_pb2 as pb
from scripted_source import ScriptedSource, Send, reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGES = 200
CONTENT = content_of(PAGES)
SILENT_AFTER_S = 0.1


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(params=TRANSPORTS)
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[LocalDaemon]:
    async with local_daemon(transport=request.param, silent_after_s=SILENT_AFTER_S) as daemon:
        yield daemon


@pytest.fixture
async def source() -> AsyncIterator[ScriptedSource]:
    async with ScriptedSource(CONTENT) as source:
        yield source


@pytest.fixture
async def guest() -> AsyncIterator[LocalGuest]:
    async with LocalGuest(len(CONTENT)) as guest:
        yield guest


def is_given_up(status: MigrationStatus) -> bool:
    return status.state is State.RECOVERING and status.error_code == Code.SOURCE_SILENT


async def test_a_silent_source_is_given_up_and_the_guest_waits_until_it_answers(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    source.script = source.silent
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    first = guest.reading()
    await daemon.until("vm", lambda status: is_given_up(status) and status.waiting == 1)
    assert not first.done()
    source.script = source.right
    assert await first == CONTENT[:PAGE_SIZE]
    assert await guest.read_all() == CONTENT
    await daemon.until_state("vm", State.COMPLETE)


async def test_the_next_source_takes_over_from_a_silent_one(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    source.script = source.silent
    async with ScriptedSource(CONTENT) as other:
        prepared = await daemon.prepare("vm", source.address, other.address)
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        done = await daemon.until_state("vm", State.COMPLETE)
    assert done.source_in_use == other.address


async def test_a_source_that_goes_silent_is_given_up_though_no_vcpu_waits(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    """Only the push has requests open: otherwise the rest of memory would never come."""
    source.script = source.silent
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    assert (await daemon.until("vm", is_given_up)).waiting == 0
    source.script = source.right
    await daemon.until_state("vm", State.COMPLETE)
    assert await guest.read_all() == CONTENT


async def test_a_source_that_answers_half_a_range_and_then_nothing_is_given_up(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    async def half(asked: pb.Range, send: Send) -> None:
        length = asked.length // PAGE_SIZE // 2 * PAGE_SIZE
        part = pb.Range(request_id=asked.request_id, offset=asked.offset, length=length)
        if length:
            await send(reply(source.run(part)))

    source.script = half
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    assert (await daemon.until("vm", is_given_up)).pages_installed > 0
    source.script = source.right
    assert await guest.read_all() == CONTENT
    await daemon.until_state("vm", State.COMPLETE)


async def test_a_push_that_flows_does_not_hide_that_demand_is_not_answered(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    async def starving(asked: pb.Range, send: Send) -> None:
        """The push gets a page now and then, often enough never to be silent itself, for 10 s."""
        if asked.priority == pb.PRIORITY_DEMAND:
            return
        for offset in range(asked.offset, asked.offset + asked.length, PAGE_SIZE):
            page = pb.Range(request_id=asked.request_id, offset=offset, length=PAGE_SIZE)
            await send(reply(source.run(page)))
            await asyncio.sleep(SILENT_AFTER_S / 2)

    source.script = starving
    prepared = await daemon.prepare("vm", source.address)
    first = guest.reading()
    await guest.hand_off(prepared.socket_path)
    given_up = await daemon.until("vm", is_given_up)
    assert (given_up.waiting, given_up.pages_demand) == (1, 0)
    assert given_up.pages_pushed < PAGES // 2
    source.script = source.right
    assert await first == CONTENT[:PAGE_SIZE]
    await daemon.until_state("vm", State.COMPLETE)


async def test_an_answer_that_comes_after_its_source_was_given_up_does_no_harm(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    late = asyncio.Event()

    async def waiting(asked: pb.Range, send: Send) -> None:
        await late.wait()
        await source.right(asked, send)

    source.script = waiting
    prepared = await daemon.prepare("vm", source.address, limits=Limits(push_rate=1))
    await guest.hand_off(prepared.socket_path)
    reading = asyncio.ensure_future(guest.read_all())
    await daemon.until("vm", is_given_up)
    late.set()
    assert await reading == CONTENT
    done = await daemon.until("vm", lambda status: status.pages_installed == PAGES)
    assert done.bad_replies == 0


async def test_a_source_that_is_silent_about_holes_still_pushes_everything(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    async def no_holes() -> AsyncIterator[pb.HolesReply]:
        await asyncio.Event().wait()
        yield pb.HolesReply()

    source.holes = no_holes
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    await daemon.until_state("vm", State.COMPLETE)
    assert await guest.read_all() == CONTENT


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_source_that_never_ends_its_holes_still_pushes_everything(
    source: ScriptedSource, guest: LocalGuest, transport: str
) -> None:
    """Holes ascend, so the same one again and again is no list of holes, and nobody waits for its end."""
    hole = CONTENT.index(bytes(PAGE_SIZE))

    async def endless() -> AsyncIterator[pb.HolesReply]:
        while True:
            yield pb.HolesReply(holes=[pb.Extent(offset=hole, length=PAGE_SIZE)])
            # Far too often to be silent.
            await asyncio.sleep(0.02)

    source.holes = endless
    async with local_daemon(transport=transport, silent_after_s=2 * PATIENCE_S) as daemon:
        prepared = await daemon.prepare("vm", source.address)
        await guest.hand_off(prepared.socket_path)
        await daemon.until_state("vm", State.COMPLETE)
        assert await guest.read_all() == CONTENT


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_source_that_is_silent_about_its_image_is_refused_at_prepare(
    source: ScriptedSource, transport: str
) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    source.describe = never
    async with local_daemon(transport=transport, connect_timeout_s=0.2) as daemon:
        with pytest.raises(SourceError) as caught:
            await daemon.prepare("vm", source.address)
        assert caught.value.code is Code.SOURCE_SILENT
        assert daemon.manager.list() == []
