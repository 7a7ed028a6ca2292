"""One body for every client and server: {grpcio, native} × {grpcio, native} × {plain text, mutual TLS}."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import uvloop

from h2_double import FAIL, REFUSE, STALL, ReplyDouble, request
from h2_service import HOLES, GrpcioService, NativeService, until
from postcopyd._native import h2
from postcopyd.errors import Code, SourceError
from postcopyd.source.native_server import HEALTH_CHECK, PAGES
from postcopyd.transport.grpcio import GrpcioTransport
from postcopyd.transport.native import NativeTransport
from tls_support import Certificates, make_certificates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KIB, MIB = 1 << 10, 1 << 20
Service = NativeService | GrpcioService
Transport = NativeTransport | GrpcioTransport


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "mtls"])
def tls(request: pytest.FixtureRequest) -> Certificates | None:
    return request.getfixturevalue("certificates") if request.param == "mtls" else None


@pytest.fixture(params=["grpcio-server", "native-server"])
async def service(
    request: pytest.FixtureRequest, tls: Certificates | None
) -> AsyncIterator[tuple[Service, int]]:
    service = NativeService(tls) if request.param == "native-server" else GrpcioService(tls)
    port = await service.start()
    yield service, port
    await service.stop()


@pytest.fixture(params=["grpcio-client", "native-client"])
async def client(
    request: pytest.FixtureRequest, service: tuple[Service, int], tls: Certificates | None
) -> AsyncIterator[Transport]:
    target = f"127.0.0.1:{service[1]}"
    transport: Transport
    if request.param == "native-client":
        transport = NativeTransport(target, tls=tls.context("client") if tls else None)
    else:
        transport = GrpcioTransport(target, credentials=tls.channel_credentials() if tls else None)
    yield transport
    await transport.close()


@pytest.fixture
async def native() -> AsyncIterator[NativeService]:
    service = NativeService()
    service.port = await service.start()  # type: ignore[attr-defined]
    yield service
    await service.stop()


def target_of(service: NativeService) -> str:
    return f"127.0.0.1:{service.port}"  # type: ignore[attr-defined]


def raw_channel(service: NativeService, **options: Any) -> Any:
    """A grpcio channel for messages as bytes: without serialisers its methods have no type."""
    return grpc.aio.insecure_channel(target_of(service), **options)


async def closed_with(stream: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await stream.wait_closed()
    return caught.value


async def test_many_small_messages_arrive_in_order(client: Transport) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(1, 16), sink, demand=True)
    for count in (1, 100, 899):
        stream.send(request(count, 16))
    await until(sink, 1001)
    assert (sink.state.wrong, sink.state.bytes) == (0, 1001 * 16)
    await stream.close()


async def test_messages_longer_than_frames_and_windows_arrive_whole(client: Transport) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(1, 16), sink, demand=False)
    for length in (16 * KIB - 5, 16 * KIB, 256 * KIB, 2 * MIB):
        stream.send(request(9, length))
    await until(sink, 37)
    assert sink.state.wrong == 0
    await stream.close()


async def test_more_than_a_window_flows_without_end(client: Transport) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(96, MIB), sink, demand=False)
    await until(sink, 96)
    assert (sink.state.wrong, sink.state.bytes) == (0, 96 * MIB)
    await stream.close()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (5, Code.SOURCE_UNKNOWN_IMAGE),
        (9, Code.SOURCE_OTHER_EPOCH),
        (3, Code.SOURCE_REFUSED),
        (15, Code.SOURCE_REFUSED),
        (14, Code.SOURCE_UNREACHABLE),
    ],
)
@pytest.mark.parametrize("mode", [REFUSE, FAIL])
async def test_the_sources_status_and_words_arrive(
    client: Transport, mode: int, status: int, code: Code
) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(3, 16), sink, demand=True)
    await until(sink, 3)
    stream.send(request(1, 16, mode, status))
    error = await closed_with(stream)
    assert error.code is code
    assert "the double says no: 100 %" in error.message


async def test_a_refused_opening_names_the_reason(client: Transport) -> None:
    stream = await client.open_stream(request(1, 16, REFUSE, 5), ReplyDouble(), demand=True)
    assert (await closed_with(stream)).code is Code.SOURCE_UNKNOWN_IMAGE


async def test_streams_of_one_transport_do_not_mix(client: Transport) -> None:
    sinks = [ReplyDouble() for _ in range(4)]
    streams = [
        await client.open_stream(request(50, 1000 * (i + 1)), sink, demand=i == 0)
        for i, sink in enumerate(sinks)
    ]
    for i, sink in enumerate(sinks):
        await until(sink, 50)
        assert (sink.state.wrong, sink.state.bytes) == (0, 50_000 * (i + 1))
    for stream in streams:
        await stream.close()


async def test_close_ends_a_stream_without_an_error(client: Transport) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(1, 16), sink, demand=True)
    await until(sink, 1)
    await stream.close()
    await stream.wait_closed()
    await stream.close()


async def test_unary_calls_work_beside_a_stream(client: Transport) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(1, 16), sink, demand=True)
    image = await client.describe("image")
    assert (image.image_id, image.epoch, image.size_bytes, image.has_holes) == ("image", 7, 1 << 40, True)
    assert await client.complete("image", 7, 60, 40)
    assert not await client.complete("image", 7, 60, 41)
    with pytest.raises(SourceError) as caught:
        await client.describe("another")
    assert caught.value.code is Code.SOURCE_UNKNOWN_IMAGE
    assert "no image 'another'" in caught.value.message
    await stream.close()


async def test_all_holes_arrive_in_order(client: Transport) -> None:
    got = [hole async for batch in client.holes("image", 7) for hole in batch]
    assert got == [(n * 8192, 4096) for n in range(HOLES)]
    with pytest.raises(SourceError) as caught:
        _ = [batch async for batch in client.holes("image", 8)]
    assert caught.value.code is Code.SOURCE_OTHER_EPOCH


async def test_the_servers_end_is_told(client: Transport, service: tuple[Service, int]) -> None:
    sink = ReplyDouble()
    stream = await client.open_stream(request(1, 16), sink, demand=True)
    await until(sink, 1)
    stopping = asyncio.ensure_future(service[0].stop())
    assert (await closed_with(stream)).code in (Code.SOURCE_CLOSED, Code.SOURCE_UNREACHABLE)
    await stopping


# What only the native ends promise.


async def test_nobody_listening_is_unreachable(native: NativeService) -> None:
    await native.stop()
    with pytest.raises(SourceError) as caught:
        await NativeTransport(target_of(native)).describe("image")
    assert caught.value.code is Code.SOURCE_UNREACHABLE


async def test_a_stalled_read_is_done_in_a_thread_and_the_stream_goes_on(native: NativeService) -> None:
    transport, sink = NativeTransport(target_of(native)), ReplyDouble()
    stream = await transport.open_stream(request(2, 4096, STALL), sink, demand=True)
    await until(sink, 2)
    assert (native.pages[0].reads, sink.state.wrong) == (1, 0)
    await transport.close()
    await stream.close()


async def test_half_close_ends_the_stream_after_the_last_reply(native: NativeService) -> None:
    async with raw_channel(native) as channel:
        call = channel.stream_stream(PAGES)()
        await call.write(request(300, 10_000))
        await call.done_writing()
        assert [len(message) async for message in call] == [10_000] * 300
        assert await call.code() is grpc.StatusCode.OK


async def test_a_deadline_passes_with_its_status(native: NativeService) -> None:
    async with raw_channel(native) as channel:
        call = channel.unary_unary("/postcopyd.v1.PageSource/Describe")(b"\x0a\x04slow", timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_silent_answer_is_source_silent(native: NativeService) -> None:
    transport = NativeTransport(target_of(native), call_timeout_s=0.2)
    with pytest.raises(SourceError) as caught:
        await transport.describe("slow")
    assert caught.value.code is Code.SOURCE_SILENT
    assert (await transport.describe("image")).epoch == 7
    await transport.close()


async def test_health_check_answers_any_client(native: NativeService) -> None:
    async with raw_channel(native) as channel:
        check = channel.unary_unary(HEALTH_CHECK)
        assert await check(b"") == b"\x08\x01"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(b"\x0a\x07nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/no.such/Method")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_longer_than_the_limit_is_resource_exhausted(native: NativeService) -> None:
    async with raw_channel(native) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/postcopyd.v1.PageSource/Describe")(
                bytes(h2.SERVER_LIMITS.max_message_bytes + 1)
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_compression_is_unimplemented(native: NativeService) -> None:
    async with raw_channel(native, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/postcopyd.v1.PageSource/Describe")(bytes(1000))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_refusing_sink_ends_the_stream(native: NativeService) -> None:
    transport = NativeTransport(target_of(native))
    stream = await transport.open_stream(request(10, 100), ReplyDouble(refuse_at=4), demand=True)
    assert (await closed_with(stream)).code is Code.SOURCE_BAD_REPLY
    await transport.close()


async def test_ended_streams_close_their_page_streams(native: NativeService) -> None:
    transport, sink = NativeTransport(target_of(native)), ReplyDouble()
    stream = await transport.open_stream(request(1, 16), sink, demand=True)
    await until(sink, 1)
    (connection,) = native.server.connections
    await stream.close()
    await connection.wait_lost()
    assert native.pages[0].is_closed
    await transport.close()


async def test_a_closed_connection_gives_its_memory_back_at_once(native: NativeService) -> None:
    gc.disable()
    try:
        transport = NativeTransport(target_of(native))
        await transport.describe("image")
        (served,) = (weakref.ref(connection) for connection in native.server.connections)
        lost = asyncio.ensure_future(served().wait_lost())  # type: ignore[union-attr]
        await transport.close()
        await lost
        del lost
        # The transport lets go of the connection in the turns of the loop that follow.
        for _ in range(5):
            await asyncio.sleep(0)
        assert served() is None
    finally:
        gc.enable()


async def test_a_client_that_does_not_read_keeps_the_servers_memory_bounded(native: NativeService) -> None:
    """200 MiB are asked for by a peer that reads nothing: only windows and one block are ever produced."""
    limits = h2.CLIENT_LIMITS
    end = h2.Connection(limits)
    stream_id = end.call(PAGES, "x", "http")
    end.send(stream_id, request(200, MIB))
    reader, writer = await asyncio.open_connection("127.0.0.1", native.port, limit=1024)  # type: ignore[attr-defined]
    while (len_bytes := end.fill()) > 0:
        writer.write(bytes(end.block[:len_bytes]))
    await writer.drain()
    other, sink = NativeTransport(target_of(native)), ReplyDouble()
    await other.open_stream(request(50, MIB), sink, demand=False)
    await until(sink, 50)
    await other.describe("image")
    (stuck,) = [page for page in native.pages if page.state.count]
    assert 0 < stuck.state.bytes_produced < limits.window_bytes + 4 * MIB
    for connection in native.server.connections:
        assert connection.native.statistics.queued_peak <= 2 * h2.SERVER_LIMITS.max_produced_bytes
    writer.transport.abort()
    await other.close()
    assert reader is not None


async def test_no_object_is_made_for_a_message(native: NativeService) -> None:
    transport, sink = NativeTransport(target_of(native)), ReplyDouble()
    stream = await transport.open_stream(request(1000, 64), sink, demand=False)
    await until(sink, 1000)
    before = sys.getallocatedblocks()
    peak = 0

    def observe() -> None:
        nonlocal peak
        peak = max(peak, sys.getallocatedblocks() - before)

    done = asyncio.Event()

    def fed() -> None:
        observe()
        if sink.state.messages == 101_000:
            done.set()

    sink.on_fed = fed
    stream.send(request(100_000, 64))
    await done.wait()
    assert sink.state.wrong == 0
    assert peak < 2000
    assert sys.getallocatedblocks() - before < 500
    await transport.close()


async def test_demand_is_answered_beside_a_full_push(native: NativeService) -> None:
    """Both on one loop: between two demand answers the push never takes more than a few buffers."""
    transport = NativeTransport(target_of(native))
    push, demand = ReplyDouble(), ReplyDouble()
    await transport.open_stream(request(400, MIB), push, demand=False)
    await until(push, 1)
    stream = await transport.open_stream(request(1, 16), demand, demand=True)
    await until(demand, 1)
    worst = 0
    for n in range(2, 22):
        before = push.state.bytes
        stream.send(request(1, 4096))
        await until(demand, n)
        worst = max(worst, push.state.bytes - before)
    assert push.state.messages < 400
    assert worst <= 16 * MIB
    await transport.close()
