"""A short run of the exit ring's fuzz targets; a long one is `FUZZ_SECONDS=3600 pytest tests/fuzz`."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "daemon" / "native"
LIBRARY = ROOT / "daemon" / "libpostcopy"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "4"))

RING_SOURCES = [NATIVE / "exit_ring.c", NATIVE / "exit_ring_vmm.c"]
RESOLVER_PARTS = ("adapt", "guard", "memory", "mmio", "operands", "registers", "resolve", "stack", "walk")
RESOLVER_SOURCES = [*(LIBRARY / f"{part}.c" for part in RESOLVER_PARTS), NATIVE / "exit_ring_vmm.c"]
FLAGS = ["-std=gnu11", "-g", "-O1", f"-I{NATIVE}", "-fsanitize=fuzzer,address,undefined"]


def fuzz(folder: Path, target: str, sources: list[Path], libraries: list[str], seeds: list[bytes]) -> None:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang with libFuzzer is not installed")
    program, corpus = folder / "fuzz", folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    files = [str(Path(__file__).with_name(target)), *map(str, sources)]
    subprocess.run(
        [clang, *FLAGS, "-fno-sanitize-recover=undefined", *files, *libraries, "-o", str(program)], check=True
    )
    limits = ["-seed=1", f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=1024"]
    done = subprocess.run(
        [str(program), *limits, str(corpus)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def step(kind: int, vcpu: int = 0, slot: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBBBIQ", kind, vcpu, slot, 0, 0, value)


@pytest.mark.timeout(SECONDS + 120)
def test_no_vmm_leads_the_daemon_out_of_its_ring(tmp_path: Path) -> None:
    post, drain, complete, restart, collect = 3, 4, 5, 8, 9
    talk = step(post, slot=3, value=7) + step(drain) + step(complete) * 4 + step(collect)
    seeds = [
        talk * 3,
        step(post, 1, 5) + step(drain) + step(complete) + step(restart) + talk,
        step(1, 0, 0, 17) + talk,
    ]
    fuzz(tmp_path, "fuzz_exit_ring.c", RING_SOURCES, [], seeds)


@pytest.mark.timeout(SECONDS + 120)
def test_no_guest_leads_the_resolver_out_of_its_memory(tmp_path: Path) -> None:
    registers = struct.pack("<18Q", *range(0x1000, 0x7000, 0x600), 0, 0)[: 18 * 8]
    instructions = [
        "488b07",
        "f3a4",
        "ff37",
        "c8100003",
        "480fab07",
        "62f17c481007",
        "0fae27",
        "c4e26d92048f",
        "67d7",
    ]
    seeds = [
        bytes([mode | 128, 1]) + registers + bytes.fromhex(code)
        for mode in (1, 2, 0, 13, 14)
        for code in instructions
    ]
    fuzz(tmp_path, "fuzz_exit_resolver.c", RESOLVER_SOURCES, ["-lcapstone", "-Wl,--wrap=ioctl"], seeds)
