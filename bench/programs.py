"""The measuring programs in C: compiled when stale, run to their end for one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from placement import GUEST_CPU, server_cpu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from placement import Placement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "bench" / "native"
BUILD = ROOT / "build" / "bench"
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
RUN_TIMEOUT_S = 120.0


class BenchError(Exception):
    """A measurement could not be made, or what was moved was wrong."""


class Percentiles(msgspec.Struct, frozen=True):
    """Microseconds."""

    p50: float
    p90: float
    p99: float


class Floor(msgspec.Struct, frozen=True):
    """What `floor` prints: a remote fault in C, and its parts alone."""

    fault_us: Percentiles
    round_trip_us: Percentiles
    local_fault_us: Percentiles


def build(name: str) -> Path:
    """Return the program `name`, compiled. Raises BenchError: the compiler refused."""
    source, program = SOURCES / f"{name}.c", BUILD / name
    newest = max(path.stat().st_mtime for path in (source, *SOURCES.glob("*.h")))
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    BUILD.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["gcc", *CFLAGS, "-o", str(program), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{source.name} does not compile:\n{done.stderr}")
    return program


async def run(name: str, *arguments: object) -> bytes:
    """Run a program to its end; return what it printed. Raises BenchError: it failed or took too long."""
    process = await asyncio.create_subprocess_exec(
        str(build(name)), *map(str, arguments), stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise BenchError(f"{name} did not end within {RUN_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BenchError(f"{name} {arguments}: {err.decode(errors='replace').strip()}")
    return out


async def floor(faults: int, placement: Placement) -> Floor:
    return msgspec.json.decode(await run("floor", faults, GUEST_CPU, server_cpu(placement)), type=Floor)


async def local(what: str, *arguments: int) -> float:
    """`local pages THREADS COUNT` in pages a second, `local copy MIB` in MiB a second."""
    return await _number("local", what, *arguments)


async def remote(threads: int, count: int) -> float:
    """Pages a second from another process, in C."""
    return await _number("remote", threads, count)


async def _number(name: str, *arguments: object) -> float:
    answer: Mapping[str, float] = msgspec.json.decode(await run(name, *arguments), type=dict[str, float])
    return next(iter(answer.values()))


@contextlib.asynccontextmanager
async def pool(mib: int) -> AsyncIterator[None]:
    """Keep so much free memory warm until the end: see native/pool.c. Raises BenchError: there is not as much."""
    process = await asyncio.create_subprocess_exec(
        str(build("pool")), str(mib), stdin=asyncio.subprocess.PIPE, stdout=-1, stderr=None
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            ready = await process.stdout.readline()
        if not ready:
            raise BenchError(f"no {mib} MiB of memory could be kept warm")
        yield
    finally:
        process.stdin.close()
        await process.wait()
