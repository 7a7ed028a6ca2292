"""A source that ends streams, goes away, or comes back as another: the guest waits and gets no byte of another image."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import uvloop

from harness import PATIENCE_S, TRANSPORTS, LocalDaemon, LocalGuest, content_of, local_daemon
from postcopyd.errors import Code, SourceError
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE
from postcopyd.v1 import page_source_pb2 as pb
from scripted_source import EndStream, ScriptedSource, Send

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGES = 200
CONTENT = content_of(PAGES)

ENDS = {
    None: Code.SOURCE_CLOSED,
    grpc.StatusCode.NOT_FOUND: Code.SOURCE_UNKNOWN_IMAGE,
    grpc.StatusCode.FAILED_PRECONDITION: Code.SOURCE_OTHER_EPOCH,
    grpc.StatusCode.UNAVAILABLE: Code.SOURCE_UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Code.SOURCE_SILENT,
    grpc.StatusCode.CANCELLED: Code.SOURCE_CLOSED,
    grpc.StatusCode.OUT_OF_RANGE: Code.SOURCE_REFUSED,
    grpc.StatusCode.INVALID_ARGUMENT: Code.SOURCE_REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Code.SOURCE_REFUSED,
    grpc.StatusCode.DATA_LOSS: Code.SOURCE_REFUSED,
    grpc.StatusCode.INTERNAL: Code.SOURCE_REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: Code.SOURCE_REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: Code.SOURCE_REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: Code.SOURCE_REFUSED,
    grpc.StatusCode.UNKNOWN: Code.SOURCE_REFUSED,
}


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(params=TRANSPORTS)
async def daemon(request: pytest.FixtureRequest) -> AsyncIterator[LocalDaemon]:
    async with local_daemon(transport=request.param, connect_timeout_s=2.0) as daemon:
        yield daemon


@pytest.fixture
async def source() -> AsyncIterator[ScriptedSource]:
    async with ScriptedSource(CONTENT) as source:
        yield source


@pytest.fixture
async def guest() -> AsyncIterator[LocalGuest]:
    async with LocalGuest(len(CONTENT)) as guest:
        yield guest


@pytest.mark.parametrize("status", ENDS, ids=str)
async def test_a_stream_that_ends_parks_the_guest_with_its_reason_and_a_new_one_goes_on(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest, status: grpc.StatusCode | None
) -> None:
    async def ending(asked: pb.Range, send: Send) -> None:
        raise EndStream(status)

    source.script = ending
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    first = guest.reading()
    parked = await daemon.until("vm", lambda now: now.state is State.RECOVERING and now.waiting == 1)
    assert parked.error_code == ENDS[status]
    assert not first.done()
    source.script = source.right
    assert await guest.read_all() == CONTENT
    done = await daemon.until_state("vm", State.COMPLETE)
    assert done.bad_replies == 0
    assert await first == CONTENT[:PAGE_SIZE]


async def test_what_came_before_a_stream_ended_is_not_asked_for_again(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    answered: list[int] = []

    async def a_while(asked: pb.Range, send: Send) -> None:
        if len(answered) == 2:
            raise EndStream
        answered.append(asked.offset)
        await source.right(asked, send)

    source.script = a_while
    prepared = await daemon.prepare("vm", source.address)
    await guest.hand_off(prepared.socket_path)
    before = await daemon.until_state("vm", State.RECOVERING)
    assert before.pages_installed > 0
    source.asked.clear()
    source.script = source.right
    done = await daemon.until_state("vm", State.COMPLETE)
    assert sum(asked.length for asked in source.asked) == (PAGES - before.pages_installed) * PAGE_SIZE
    assert done.duplicates == 0
    assert await guest.read_all() == CONTENT


async def take_over(
    daemon: LocalDaemon, guest: LocalGuest, source: ScriptedSource, *others: str
) -> asyncio.Future[bytes]:
    """Begin a migration whose source was asked for the page of the returned read, and says nothing."""
    asked_for = asyncio.Event()

    async def notice(asked: pb.Range, send: Send) -> None:
        if asked.priority == pb.PRIORITY_DEMAND:
            asked_for.set()

    source.script = notice
    prepared = await daemon.prepare("vm", source.address, *others)
    await guest.hand_off(prepared.socket_path)
    first = guest.reading()
    async with asyncio.timeout(PATIENCE_S):
        await asked_for.wait()
    return first


async def test_a_source_that_comes_back_at_its_address_is_found_again(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    first = await take_over(daemon, guest, source)
    await source.stop()
    await daemon.until_state("vm", State.RECOVERING)
    assert not first.done()
    source.script = source.right
    await source.start()
    assert await guest.read_all() == CONTENT
    await daemon.until_state("vm", State.COMPLETE)


@pytest.mark.parametrize("change", ["epoch", "size"])
async def test_another_image_at_the_same_address_is_never_installed(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest, change: str
) -> None:
    first = await take_over(daemon, guest, source)
    await source.stop()
    other = ScriptedSource(content_of(PAGES if change == "epoch" else PAGES * 2, seed=2))
    other.epoch = source.epoch + (change == "epoch")
    other.address = source.address
    async with other:
        refused = await daemon.until("vm", lambda status: status.error_code == Code.SOURCE_OTHER_EPOCH)
        assert (refused.state, refused.pages_installed, refused.waiting) == (State.RECOVERING, 0, 1)
        assert not first.done()
        assert other.asked == []
    source.script = source.right
    await source.start()
    assert await guest.read_all() == CONTENT
    await daemon.until_state("vm", State.COMPLETE)


async def test_the_second_source_takes_over_when_the_first_goes(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    async with ScriptedSource(CONTENT) as second:
        first = await take_over(daemon, guest, source, second.address)
        await source.stop()
        assert await first == CONTENT[:PAGE_SIZE]
        done = await daemon.until_state("vm", State.COMPLETE)
        assert await guest.read_all() == CONTENT
        assert (done.source_in_use, len(second.completed)) == (second.address, 1)


async def test_a_source_that_speaks_no_http_is_refused_at_prepare_and_passed_over_later(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x01 no HTTP/2 at all\r\n" * 100)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        with pytest.raises(SourceError):
            await daemon.prepare("vm", address)
        prepared = await daemon.prepare("vm", address, source.address)
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        await daemon.until_state("vm", State.COMPLETE)


async def test_a_connection_cut_in_the_middle_of_a_page_leaves_nothing_of_it(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    """A proxy that lets 3000 bytes of page data through, the first time."""
    host, port = source.address.split(":")
    cut = asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        while not cut.is_set() and (data := await reader.read(limit if limit else 1 << 16)):
            writer.write(data)
            limit = max(0, limit - len(data))
            if limit == 0 and len(data) > 1000:
                break
        writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, back, 0), pump(there, writer, 3000), return_exceptions=True)
        cut.set()
        there.feed_eof()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    proxy = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        prepared = await daemon.prepare("vm", proxy, source.address, limits=Limits(push_rate=1))
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        done = await daemon.until("vm", lambda status: status.pages_installed == PAGES)
    assert done.source_in_use == source.address
    assert done.bad_replies == 0


async def test_a_source_that_is_gone_at_completion_changes_nothing_for_the_guest(
    daemon: LocalDaemon, source: ScriptedSource, guest: LocalGuest
) -> None:
    prepared = await daemon.prepare("vm", source.address)
    source.complete_status = grpc.StatusCode.UNAVAILABLE
    await guest.hand_off(prepared.socket_path)
    assert await guest.read_all() == CONTENT
    done = await daemon.until_state("vm", State.COMPLETE)
    assert not done.source_released
