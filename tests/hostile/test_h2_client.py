"""Page sources that break HTTP/2, gRPC or good manners: the client names what happened, and takes no harm."""

from __future__ import annotations

import asyncio
import struct

import pytest

from h2_double import ReplyDouble, request
from h2_raw import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    Peer,
    answer,
    field,
    fields,
    frame,
    listen,
    message,
    trailers,
)
from postcopyd.errors import Code, SourceError
from postcopyd.transport.h2_connection import KeepAlive
from postcopyd.transport.native import NativeTransport

HELLO = frame(SETTINGS, 0, 0)
REPLY = message(struct.pack("<Q", 0) + bytes(8))


async def end_of(
    peer: Peer, sink: ReplyDouble | None = None, keepalive: KeepAlive | None = None
) -> SourceError:
    """The error that a page stream with `peer` ends with."""
    server, port = await listen(peer)
    transport = NativeTransport(f"127.0.0.1:{port}", keepalive=keepalive)

    async def run() -> None:
        stream = await transport.open_stream(request(1, 16), sink or ReplyDouble(), demand=True)
        await asyncio.wait_for(stream.wait_closed(), 10)

    async with server:
        with pytest.raises(SourceError) as caught:
            await run()
        await transport.close()
    return caught.value


def sends(data: bytes, *, then_close: bool = False) -> Peer:
    """A peer that waits for the call, sends `data`, and perhaps closes."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PRI")
        writer.write(data)
        await writer.drain()
        if not then_close:
            await reader.read()

    return peer


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        bytes(range(256)) * 40,
        HELLO + frame(DATA, 0, 1, b"x"),
        HELLO + frame(DATA, 0, 3, b"x"),
        HELLO + answer(2),
        HELLO + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\x02" + fields(_method="GET", _path="/")),
        HELLO + frame(SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
        HELLO + b"\xff\xff\xff\0\0\0\0\0\1",
    ],
)
async def test_what_is_no_http2_is_a_bad_reply(data: bytes) -> None:
    # Over before the call was sent, or after: it is the peer's fault either way.
    assert (await end_of(sends(data, then_close=True))).code in (Code.SOURCE_BAD_REPLY, Code.SOURCE_CLOSED)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (trailers("5", _status="200"), Code.SOURCE_BAD_REPLY, "reset"),
        (answer() + trailers("5"), Code.SOURCE_UNKNOWN_IMAGE, "NOT_FOUND"),
        (
            answer() + trailers("9", grpc_message="an%20other %e2%82%ac epoch%"),
            Code.SOURCE_OTHER_EPOCH,
            "an other € epoch%",
        ),
        (answer() + trailers("99"), Code.SOURCE_REFUSED, "UNKNOWN"),
        (answer() + trailers("-1"), Code.SOURCE_REFUSED, "UNKNOWN"),
        (answer() + trailers("0"), Code.SOURCE_CLOSED, "ended"),
        (answer() + frame(DATA, END_STREAM, 1), Code.SOURCE_BAD_REPLY, "without a gRPC status"),
        (answer() + frame(DATA, 0, 1, REPLY[:7]) + trailers("0"), Code.SOURCE_BAD_REPLY, "within a message"),
        (answer() + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff"), Code.SOURCE_BAD_REPLY, "longer than the limit"),
        (answer() + frame(DATA, 0, 1, message(b"x", 1)), Code.SOURCE_BAD_REPLY, "compressed"),
        (answer() + frame(RST_STREAM, 0, 1, b"\0\0\0\x07"), Code.SOURCE_UNREACHABLE, "reset by the peer"),
        (answer() + frame(RST_STREAM, 0, 1, b"\0\0\0\x08"), Code.SOURCE_CLOSED, "reset by the peer"),
        (frame(HEADERS, END_HEADERS, 1, fields(_status="503")), Code.SOURCE_UNREACHABLE, "HTTP status 503"),
        (frame(HEADERS, END_HEADERS, 1, fields(_status="404")), Code.SOURCE_REFUSED, "HTTP status 404"),
        (
            frame(HEADERS, END_HEADERS, 1, fields(_status="200", content_type="text/html")),
            Code.SOURCE_BAD_REPLY,
            "content-type",
        ),
        (
            frame(HEADERS, END_HEADERS, 1, fields(_status="100")) + answer() + trailers("5"),
            Code.SOURCE_UNKNOWN_IMAGE,
            "NOT_FOUND",
        ),
        (
            frame(HEADERS, END_HEADERS | END_STREAM, 1, fields(_status="200") + field("grpc-status", "5")),
            Code.SOURCE_UNKNOWN_IMAGE,
            "NOT_FOUND",
        ),
        (answer() + frame(GOAWAY, 0, 0, bytes(8)), Code.SOURCE_UNREACHABLE, "REFUSED_STREAM"),
    ],
)
async def test_how_a_source_ended_the_stream_is_named(data: bytes, code: Code, words: str) -> None:
    error = await end_of(awaiting_call(HELLO + data))
    assert (error.code, words in error.message) == (code, True), error


def awaiting_call(data: bytes) -> Peer:
    """A peer that sends `data` once the call's request has arrived whole."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(request(1, 16))
        writer.write(data)
        await reader.read()

    return peer


async def test_goaway_lets_a_begun_stream_go_on_and_its_end_is_told() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(request(1, 16))
        writer.write(HELLO + frame(GOAWAY, 0, 0, b"\0\0\0\x01\0\0\0\0going") + answer())
        writer.write(frame(DATA, 0, 1, REPLY))
        await writer.drain()

    sink = ReplyDouble()
    assert (await end_of(peer, sink)).code is Code.SOURCE_CLOSED
    assert (sink.state.messages, sink.state.wrong) == (1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13])
async def test_a_reply_in_crumbs_arrives_whole(size: int) -> None:
    data = HELLO + answer() + frame(DATA, 0, 1, REPLY[:9]) + frame(DATA, 0, 1, REPLY[9:]) + trailers("0")

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(request(1, 16))
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
        await reader.read()

    sink = ReplyDouble()
    assert (await end_of(peer, sink)).code is Code.SOURCE_CLOSED
    assert (sink.state.messages, sink.state.wrong) == (1, 0)


async def test_a_source_that_falls_silent_is_named() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO + answer())
        await reader.read()

    error = await end_of(peer, keepalive=KeepAlive(interval_s=0.05, timeout_s=0.05))
    assert error.code is Code.SOURCE_SILENT


async def test_a_source_that_dies_is_named() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(request(1, 16))
        writer.transport.abort()

    assert (await end_of(peer)).code is Code.SOURCE_CLOSED


async def test_a_source_that_reads_nothing_is_named_not_waited_for() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await reader.read()

    server, port = await listen(peer)
    transport = NativeTransport(f"127.0.0.1:{port}")
    async with server:
        stream = await transport.open_stream(request(1, 16), ReplyDouble(), demand=True)
        for _ in range(100):
            stream.send(bytes(100_000))
        with pytest.raises(SourceError) as caught:
            await stream.wait_closed()
        assert caught.value.code is Code.SOURCE_SILENT
        await transport.close()


async def test_too_many_pings_slows_the_next_connection() -> None:
    complaint = frame(GOAWAY, 0, 0, b"\0\0\0\x01\0\0\0\x0btoo_many_pings")
    server, port = await listen(awaiting_call(HELLO + answer() + complaint + trailers("14")))
    transport = NativeTransport(f"127.0.0.1:{port}", keepalive=KeepAlive(interval_s=3.0))
    async with server:
        stream = await transport.open_stream(request(1, 16), ReplyDouble(), demand=True)
        with pytest.raises(SourceError):
            await stream.wait_closed()
        await transport.close()
    assert transport.keepalive.interval_s == 6.0


@pytest.mark.parametrize("target", ["", "host", "host:", ":1", "host:99999", "host:-1"])
def test_a_target_that_is_none_is_named(target: str) -> None:
    with pytest.raises(SourceError) as caught:
        NativeTransport(target)
    assert caught.value.code is Code.SOURCE_UNREACHABLE
