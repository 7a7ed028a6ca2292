"""HTTP/2 frames by hand, for peers that break the rules."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

from postcopyd._native import h2

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PAGES_PATH = "/postcopyd.v1.PageSource/Pages"


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def field(name: str, value: str) -> bytes:
    """A header field for HPACK: literal, not indexed, not Huffman-coded. RFC 7541, 6.2.2."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


def _text(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    out, rest = bytearray([127]), len(text) - 127
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes([*out, rest]) + text


def fields(**values: str) -> bytes:
    """`content_type="x"` is the field content-type, `_status="200"` the pseudo-field :status."""
    return b"".join(
        field(":" + name[1:] if name.startswith("_") else name.replace("_", "-"), value)
        for name, value in values.items()
    )


def request_fields(path: str = PAGES_PATH, **more: str) -> bytes:
    return fields(
        _method="POST",
        _scheme="http",
        _path=path,
        _authority="x",
        te="trailers",
        **{"content_type": "application/grpc", **more},
    )


def call(stream_id: int = 1, path: str = PAGES_PATH, flags: int = END_HEADERS, **more: str) -> bytes:
    return frame(HEADERS, flags, stream_id, request_fields(path, **more))


def answer(stream_id: int = 1) -> bytes:
    return frame(HEADERS, END_HEADERS, stream_id, fields(_status="200", content_type="application/grpc"))


def trailers(status: str, stream_id: int = 1, **more: str) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream_id, fields(grpc_status=status, **more))


def message(payload: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + struct.pack(">I", len(payload)) + payload


def parse(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return the whole frames in `data` as (type, flags, stream id, payload)."""
    frames = []
    while len(data) >= 9:
        length = int.from_bytes(data[:3], "big")
        kind, flags, stream_id = struct.unpack(">BBI", data[3:9])
        frames.append((kind, flags, stream_id, data[9 : 9 + length]))
        data = data[9 + length :]
    return frames


def error_codes(data: bytes, kind: int) -> list[int]:
    """The HTTP/2 error codes of the GOAWAY or RST_STREAM frames in `data`."""
    at = 4 if kind == GOAWAY else 0
    return [int.from_bytes(payload[at : at + 4], "big") for k, _, _, payload in parse(data) if k == kind]


async def exchange(port: int, data: bytes, *, end: bool = False) -> bytes:
    """Send `data`, perhaps then FIN; return all that the server sends until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(data)
        if end:
            writer.write_eof()
        while chunk := await reader.read(1 << 16):
            got += chunk
    except ConnectionResetError:
        # A server that closes with our bytes unread resets; what it sent before counts.
        return got
    finally:
        writer.close()
    return got


def outcome(reply: bytes) -> h2.Event:
    """What a server's bytes mean to the client that has stream 1."""
    client = h2.Connection(h2.CLIENT_LIMITS)
    assert client.call(PAGES_PATH, "x", "http") == 1
    client.fill()
    client.receive[: len(reply)] = reply
    client.feed(len(reply), 0.0)
    (ended,) = [event for event in client.events() if event.kind == h2.ENDED]
    return ended


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def listen(peer: Peer) -> tuple[asyncio.Server, int]:
    """A server that answers each connection with `peer`, and its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            # The client under test has hung up, which is its right.
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]
