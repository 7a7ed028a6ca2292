"""Clients that break HTTP/2, gRPC or good manners: a named end, no crash, and others are served meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from h2_double import ReplyDouble, request
from h2_raw import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call,
    error_codes,
    exchange,
    field,
    frame,
    message,
    outcome,
    parse,
    request_fields,
)
from h2_service import NativeService, until
from postcopyd._native import h2
from postcopyd.transport.h2_connection import KeepAlive
from postcopyd.transport.native import NativeTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HELLO = PREFACE + frame(SETTINGS, 0, 0)
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM = 1, 3, 6, 11


@pytest.fixture
async def port() -> AsyncIterator[int]:
    service = NativeService()
    port = await service.start()
    yield port
    await still_serves(port)
    assert all(page.is_closed for page in service.pages[:-1])
    await service.stop()


async def still_serves(port: int) -> None:
    transport, sink = NativeTransport(f"127.0.0.1:{port}"), ReplyDouble()
    await transport.open_stream(request(5, 10_000), sink, demand=True)
    await until(sink, 5)
    assert sink.state.wrong == 0
    await transport.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(range(256)) * 40,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX",
    ],
    ids=["http1", "tls", "noise", "almost-a-preface"],
)
async def test_what_is_no_http2_is_closed(port: int, data: bytes) -> None:
    await exchange(port, data)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR),
        (HELLO + frame(DATA, 0, 1, b"x"), PROTOCOL_ERROR),
        (HELLO + call(2), PROTOCOL_ERROR),
        (HELLO + frame(PING, 0, 0, b"short"), FRAME_SIZE_ERROR),
        (HELLO + frame(SETTINGS, 0, 0, b"12345"), FRAME_SIZE_ERROR),
        (HELLO + frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
        (HELLO + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), PROTOCOL_ERROR),
        (HELLO + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), FLOW_CONTROL_ERROR),
        (HELLO + frame(RST_STREAM, 0, 9, bytes(4)), PROTOCOL_ERROR),
        (HELLO + frame(CONTINUATION, END_HEADERS, 1, b""), PROTOCOL_ERROR),
        (HELLO + b"\xff\xff\xff\0\0\0\0\0\1", FRAME_SIZE_ERROR),
        (HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"), 9),
    ],
)
async def test_a_broken_rule_is_named_in_goaway(port: int, data: bytes, error: int) -> None:
    assert error_codes(await exchange(port, data), GOAWAY) == [error]


@pytest.mark.parametrize(
    "payload",
    [message(b"")[:3], message(b"x" * 100)[:50], message(request(1, 16))[:-1]],
    ids=["prefix", "message", "last-byte"],
)
async def test_a_stream_that_ends_within_a_message_gets_internal(port: int, payload: bytes) -> None:
    reply = await asyncio.wait_for(
        exchange(port, HELLO + call() + frame(DATA, END_STREAM, 1, payload) + frame(GOAWAY, 0, 0, bytes(8))),
        10,
    )
    assert (outcome(reply).status, outcome(reply).text) == (13, "the stream ended within a message")


@pytest.mark.parametrize(
    ("payload", "status", "words"),
    [
        (b"\0\xff\xff\xff\xff", 8, "longer than the limit"),
        (message(b"x", flag=1), 12, "compressed"),
        (message(b"x", flag=7), 13, "flag byte"),
        (message(b"not a request"), 3, "the double says no"),
    ],
)
async def test_a_bad_message_gets_a_status_and_its_reason(
    port: int, payload: bytes, status: int, words: str
) -> None:
    goodbye = frame(GOAWAY, 0, 0, bytes(8))
    ended = outcome(await exchange(port, HELLO + call() + frame(DATA, 0, 1, payload) + goodbye))
    assert (ended.status, words in ended.text) == (status, True), ended


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        (call(path="/no.such/Method"), 12, "no such method"),
        (call(path="/" + "x" * 5000), 12, "no such method"),
        (call(grpc_timeout="soon"), 13, "grpc-timeout"),
        (call(grpc_encoding="gzip"), 12, "compression"),
        (call(content_type="text/html"), 2, "HTTP status 415"),
        (
            frame(HEADERS, END_HEADERS, 1, request_fields().replace(b"\x04POST", b"\x03GET")),
            2,
            "HTTP status 405",
        ),
    ],
)
async def test_a_call_that_cannot_be_served_is_refused(
    port: int, headers: bytes, status: int, words: str
) -> None:
    ended = outcome(await exchange(port, HELLO + headers + frame(GOAWAY, 0, 0, bytes(8))))
    assert (ended.status, words in ended.text) == (status, True), ended


async def test_headers_beyond_the_limit_are_refused(port: int) -> None:
    many = b"".join(field(f"x-{n}", "y" * 1000) for n in range(h2.SERVER_LIMITS.max_header_bytes // 1000 + 1))
    block = request_fields() + many
    headers = frame(HEADERS, 0, 1, block[:16000]) + frame(CONTINUATION, END_HEADERS, 1, block[16000:])
    ended = outcome(await exchange(port, HELLO + headers + frame(GOAWAY, 0, 0, bytes(8))))
    assert (ended.status, "header list" in ended.text) == (8, True), ended


async def test_an_hpack_bomb_ends_the_connection(port: int) -> None:
    """One indexed field of 4000 bytes, named again by one byte each."""
    entry = b"\x40\x01a" + b"\x7f" + bytes([(3900 - 127) % 128 + 128, (3900 - 127) // 128]) + b"b" * 3900
    bomb = frame(HEADERS, END_HEADERS, 1, request_fields() + entry + b"\xbe" * 10_000)
    assert error_codes(await exchange(port, HELLO + bomb), RST_STREAM) == []


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING, 0, 0, bytes(8)),
        frame(SETTINGS, 0, 0),
        frame(2, 0, 1, bytes(5)),
        frame(0x77, 0, 0, b"unknown"),
    ],
    ids=["ping", "settings", "priority", "unknown"],
)
async def test_a_flood_of_cheap_frames_ends_in_enhance_your_calm(port: int, flood: bytes) -> None:
    reply = await exchange(port, HELLO + call() + flood * 5000)
    assert error_codes(reply, GOAWAY) == [ENHANCE_YOUR_CALM]


async def test_empty_data_frames_end_in_enhance_your_calm(port: int) -> None:
    reply = await exchange(port, HELLO + call() + frame(DATA, 0, 1) * 5000)
    assert error_codes(reply, GOAWAY) == [ENHANCE_YOUR_CALM]


async def test_a_continuation_flood_ends_in_enhance_your_calm(port: int) -> None:
    flood = frame(HEADERS, 0, 1, request_fields()) + frame(CONTINUATION, 0, 1) * 9
    assert error_codes(await exchange(port, HELLO + flood), GOAWAY) == [ENHANCE_YOUR_CALM]


async def test_rapid_reset_ends_in_enhance_your_calm(port: int) -> None:
    """CVE-2023-44487: calls that are reset at once never count as concurrent."""
    flood = b"".join(call(n) + frame(RST_STREAM, 0, n, b"\0\0\0\x08") for n in range(1, 2001, 2))
    assert error_codes(await exchange(port, HELLO + flood), GOAWAY) == [ENHANCE_YOUR_CALM]


async def test_calls_beyond_the_limit_are_refused_and_the_others_go_on(port: int) -> None:
    limit = h2.SERVER_LIMITS.max_streams
    calls = b"".join(call(n) for n in range(1, 2 * (limit + 3), 2))
    reply = await exchange(
        port,
        HELLO + calls + frame(DATA, END_STREAM, 1, message(request(1, 16))) + frame(GOAWAY, 0, 0, bytes(8)),
        end=True,
    )
    refused = [stream_id for kind, _, stream_id, _ in parse(reply) if kind == RST_STREAM]
    assert refused == [2 * limit + 1, 2 * limit + 3, 2 * limit + 5]
    assert any(kind == DATA and stream_id == 1 and payload for kind, _, stream_id, payload in parse(reply))


@pytest.mark.parametrize("cut", range(0, 140, 7))
async def test_a_cut_connection_leaves_nothing_behind(port: int, cut: int) -> None:
    whole = HELLO + call() + frame(DATA, 0, 1, message(request(1, 16)))
    await exchange(port, whole[: len(whole) - cut], end=True)


async def test_a_peer_that_never_answers_is_given_up() -> None:
    service = NativeService(keepalive=KeepAlive(interval_s=0.05, timeout_s=0.05))
    port = await service.start()
    reply = await exchange(port, HELLO + call())
    assert any(kind == PING and not flags & ACK for kind, flags, _, _ in parse(reply))
    await service.stop()


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    service = NativeService(max_connections=2)
    port = await service.start()
    held = [NativeTransport(f"127.0.0.1:{port}") for _ in range(2)]
    for transport in held:
        await transport.describe("image")
    assert await exchange(port, HELLO) == b""
    for transport in held:
        assert (await transport.describe("image")).epoch == 7
        await transport.close()
    await service.stop()
