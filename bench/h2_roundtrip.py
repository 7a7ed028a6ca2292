"""How fast the native transport is, next to a raw socket protocol of the same event loop in the same run.

A server process and this one, on loopback. Round trips: 16 bytes up, 4 KiB down, one at a time. Rate: 4 KiB
messages, 32 in flight. Bandwidth: 256 KiB messages, 8 in flight. Absolute numbers are the machine's; the ratio to
the raw socket is ours.

    python bench/h2_roundtrip.py [--seconds 2] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from h2_double import PageDouble, ReplyDouble, request
from postcopyd.source.native_server import NativeServer
from postcopyd.transport.native import NativePageStream, NativeTransport

if TYPE_CHECKING:
    from collections.abc import Callable

KIB = 1 << 10
PAGE = 4 * KIB


class RawServer(asyncio.Protocol):
    """A page for each 16 bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.page = bytes(PAGE)
        self.owed = 0

    def data_received(self, data: bytes) -> None:
        self.owed += len(data)
        pages, self.owed = divmod(self.owed, 16)
        self.transport.write(self.page * pages)


class RawClient(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = 0
        self.on_pages: Callable[[], object] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.on_pages()


async def serve(ports: Any) -> None:
    loop = asyncio.get_running_loop()
    raw = await loop.create_server(RawServer, "127.0.0.1", 0)
    native = NativeServer(PageDouble, {})
    ports.send((raw.sockets[0].getsockname()[1], await native.start("127.0.0.1", 0)))
    await asyncio.Event().wait()


def run_server(ports: Any) -> None:
    uvloop.run(serve(ports))


class Side(Protocol):
    """One of the two ends that are compared."""

    def ask(self, count: int) -> None:
        """Ask for `count` messages."""

    def answered(self) -> int:
        """How many came so far."""

    def when_answered(self, callback: Callable[[], object]) -> None: ...


class RawSide:
    def __init__(self, client: RawClient) -> None:
        self.client = client

    def ask(self, count: int) -> None:
        self.client.transport.write(bytes(16 * count))

    def answered(self) -> int:
        return self.client.received // PAGE

    def when_answered(self, callback: Callable[[], object]) -> None:
        self.client.on_pages = callback


class NativeSide:
    """A page stream of messages of `length` bytes."""

    def __init__(self, sink: ReplyDouble, stream: NativePageStream, length: int) -> None:
        self.sink = sink
        self.stream = stream
        self.message = request(1, length)

    @classmethod
    async def open(cls, transport: NativeTransport, length: int, *, demand: bool) -> NativeSide:
        sink = ReplyDouble()
        return cls(sink, await transport.open_stream(request(0, 0), sink, demand=demand), length)

    def ask(self, count: int) -> None:
        for _ in range(count):
            self.stream.send(self.message)

    def answered(self) -> int:
        return int(self.sink.state.messages)

    def when_answered(self, callback: Callable[[], object]) -> None:
        self.sink.on_fed = callback


async def keep_going(side: Side, depth: int, seconds: float) -> tuple[float, float]:
    """Keep `depth` requests open for `seconds`; return messages a second, and at depth 1 the median wait in µs."""
    done = asyncio.get_running_loop().create_future()
    first, sent = side.answered(), depth
    began = asked = time.perf_counter()
    waits = []

    def on_answers() -> None:
        nonlocal sent, asked
        now = time.perf_counter()
        answered = side.answered() - first
        if depth == 1 and answered == sent:
            waits.append(now - asked)
        if now - began > seconds:
            if answered == sent and not done.done():
                done.set_result(None)
            return
        more = answered + depth - sent
        if more > 0:
            sent += more
            asked = time.perf_counter()
            side.ask(more)

    side.when_answered(on_answers)
    side.ask(depth)
    await done
    took = time.perf_counter() - began
    return (side.answered() - first) / took, statistics.median(waits) * 1e6 if waits else 0.0


async def measure(ports: tuple[int, int], seconds: float) -> dict[str, float]:
    _, client = await asyncio.get_running_loop().create_connection(RawClient, "127.0.0.1", ports[0])
    raw = RawSide(client)
    transport = NativeTransport(f"127.0.0.1:{ports[1]}")
    demand = await NativeSide.open(transport, PAGE, demand=True)
    pages = await NativeSide.open(transport, PAGE, demand=False)
    push = await NativeSide.open(transport, 256 * KIB, demand=False)
    raw_us, native_us = [], []
    # In turns, so that what else the machine does hits both.
    for _ in range(10):
        raw_us.append((await keep_going(raw, 1, seconds / 10))[1])
        native_us.append((await keep_going(demand, 1, seconds / 10))[1])
    result = {
        "raw_round_trip_us": statistics.median(raw_us),
        "native_round_trip_us": statistics.median(native_us),
        "round_trip_ratio": statistics.median(n / r for n, r in zip(native_us, raw_us, strict=True)),
        "raw_pages_per_s": (await keep_going(raw, 32, seconds))[0],
        "native_pages_per_s": (await keep_going(pages, 32, seconds))[0],
        "native_gib_per_s": (await keep_going(push, 8, seconds))[0] / 4096,
    }
    await transport.close()
    client.transport.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=run_server, args=(there,), daemon=True)
    server.start()
    try:
        result = uvloop.run(measure(here.recv(), options.seconds))
    finally:
        server.terminate()
        server.join()
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value:12.2f}")


if __name__ == "__main__":
    main()
