"""Seeds for fuzz_h2.c: conversations that reach the deep paths. `python tests/fuzz/corpus.py server DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import struct

from h2_raw import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    answer,
    call,
    fields,
    frame,
    message,
    request_fields,
    trailers,
)

RANGE = message(struct.pack("<4I", 3, 100, 0, 0))
REPLY = message(struct.pack("<Q", 0) + bytes(92))


def server_seeds() -> list[bytes]:
    block = request_fields()
    return [
        call() + frame(DATA, END_STREAM, 1, RANGE),
        call() + frame(DATA, 0, 1, RANGE * 3) + frame(WINDOW_UPDATE, 0, 0, b"\0\0\x10\0"),
        call() + frame(DATA, END_STREAM, 1, message(struct.pack("<4I", 2, 50, 3, 0))),
        call() + frame(DATA, END_STREAM, 1, message(struct.pack("<4I", 2, 50, 2, 5))),
        call(path="/a/B") + frame(DATA, END_STREAM, 1, message(b"\5hello")),
        call(path="/x/None") + call(3) + frame(RST_STREAM, 0, 3, b"\0\0\0\x08"),
        frame(HEADERS, 0, 1, block[:20]) + frame(CONTINUATION, END_HEADERS, 1, block[20:]),
        call(grpc_timeout="5S", grpc_encoding="gzip") + frame(GOAWAY, 0, 0, bytes(8)),
        frame(PING, 0, 0, bytes(8))
        + frame(SETTINGS, 0, 0, b"\0\x04\0\0\0\x05")
        + call()
        + frame(DATA, 0, 1, RANGE),
    ]


def client_seeds() -> list[bytes]:
    hello = frame(SETTINGS, 0, 0)
    return [
        hello + answer() + frame(DATA, 0, 1, REPLY) + trailers("0"),
        hello
        + answer()
        + frame(DATA, 0, 1, REPLY[:30])
        + frame(DATA, 0, 1, REPLY[30:] + REPLY)
        + trailers("5"),
        hello + answer(3) + frame(DATA, 0, 3, message(b"") * 5 + message(b"x" * 200)) + trailers("0", 3),
        hello + answer() + trailers("9", grpc_message="an%20other%"),
        hello + frame(HEADERS, END_HEADERS, 1, fields(_status="100")) + answer(),
        hello + frame(HEADERS, END_HEADERS | END_STREAM, 1, fields(_status="503")),
        hello
        + answer()
        + frame(RST_STREAM, 0, 1, b"\0\0\0\x07")
        + frame(GOAWAY, 0, 0, b"\0\0\0\x01\0\0\0\x0btoo_many"),
        hello + answer() + frame(DATA, 0, 1, message(b"x", 1)),
    ]


def write(role: str, folder: Path) -> None:
    """Write each seed whole and in small steps: the first byte is fuzz_h2.c's step."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(server_seeds() if role == "server" else client_seeds()):
        for step in (2, 255):
            (folder / f"{role}-{number}-{step}").write_bytes(bytes([step]) + seed)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
