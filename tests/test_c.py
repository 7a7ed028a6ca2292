"""Compiles every C test with the sanitizers and runs it.

A test names the files of daemon/native that it needs in its first line, `// sources: a.c b.c`, and libraries, if
any, in its second, `// libs: -lfoo`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "daemon" / "native"
TESTS = sorted((ROOT / "tests" / "c").glob("test_*.c"))

CFLAGS = [
    "-std=gnu11",
    "-g",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{NATIVE}",
]


def header(source: Path, line: int, key: str) -> list[str]:
    """Return the words after `// key:` in the given line, nothing if the line is another."""
    lines = source.read_text().splitlines()
    prefix = f"// {key}:"
    if line >= len(lines) or not lines[line].startswith(prefix):
        return []
    return shlex.split(lines[line].removeprefix(prefix))


def run(command: list[str], **env: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, env={**os.environ, **env}
    )
    if done.returncode != 0:
        pytest.fail(
            f"{shlex.join(command)}\nexit status {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False
        )


@pytest.mark.parametrize("source", TESTS, ids=lambda path: path.stem)
def test_c(source: Path, tmp_path: Path) -> None:
    program = tmp_path / source.stem
    files = [str(NATIVE / name) for name in header(source, 0, "sources")]
    assert files, f"{source.name}: the first line must be `// sources: …`"
    run(["gcc", *CFLAGS, "-o", str(program), str(source), *files, *header(source, 1, "libs")])
    run([str(program)], ASAN_OPTIONS="detect_leaks=1:abort_on_error=0")


def test_the_runner_fails_what_a_sanitizer_finds(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("#include <stdlib.h>\nint main(void) { char *p = malloc(1); free(p); return p[0]; }\n")
    program = tmp_path / "bad"
    run(["gcc", *CFLAGS, "-Wno-use-after-free", "-o", str(program), str(source)])
    with pytest.raises(pytest.fail.Exception, match="heap-use-after-free"):
        run([str(program)])
