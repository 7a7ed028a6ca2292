"""A short run of each fuzz target from its seeds; a long one is `FUZZ_SECONDS=3600 pytest tests/fuzz`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fuzz.corpus import write

ROOT = Path(__file__).resolve().parents[2]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "4"))


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("role", ["server", "client"])
def test_no_input_breaks_an_end(role: str, tmp_path: Path) -> None:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang with libFuzzer is not installed")
    program, corpus = tmp_path / "fuzz", tmp_path / "corpus"
    sources = sorted((ROOT / "daemon" / "native").glob("h2_*.c"))
    flags = ["-std=gnu11", "-g", "-O1", f"-DFUZZ_SERVER={int(role == 'server')}"]
    sanitizers = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    target = [str(Path(__file__).with_name("fuzz_h2.c")), *map(str, sources), "-lnghttp2", "-o", str(program)]
    subprocess.run([clang, *flags, *sanitizers, *target], check=True)
    write(role, corpus)
    run = [
        str(program),
        "-seed=1",
        f"-max_total_time={SECONDS}",
        "-max_len=8192",
        "-timeout=5",
        "-rss_limit_mb=1024",
    ]
    done = subprocess.run([*run, str(corpus)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
