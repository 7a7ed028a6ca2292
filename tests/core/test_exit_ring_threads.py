"""The exit ring under ThreadSanitizer, which sees its entries as plain memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "daemon" / "native"
PROGRAM = ROOT / "tests" / "c" / "test_exit_ring_stress.c"
PARTS = ("exit_ring.c", "exit_ring_map.c", "exit_ring_vmm.c")
FAULTS_A_VCPU = "50000"


def build_and_run(folder: Path, native: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "stress"
    subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread"]
        + [f"-I{native}", f"-I{PROGRAM.parent}", "-o", str(program), str(PROGRAM)]
        + [str(native / part) for part in PARTS],
        check=True,
    )
    # The sanitizer needs its part of the address space, which randomisation may take.
    return subprocess.run(
        ["setarch", "-R", str(program), "threads", FAULTS_A_VCPU],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={"TSAN_OPTIONS": "halt_on_error=1"},
    )


def test_no_entry_is_read_while_it_is_written(tmp_path: Path) -> None:
    done = build_and_run(tmp_path, NATIVE)
    assert done.returncode == 0, done.stderr


def test_the_sanitizer_would_see_an_entry_published_too_early(tmp_path: Path) -> None:
    for source in NATIVE.glob("exit_ring*"):
        text = source.read_text()
        if source.name == "exit_ring.c":
            before = "WRITE_RELEASE(shared->done_head, lane->done)"
            assert before in text
            text = text.replace(before, "__atomic_store_n(&shared->done_head, lane->done, __ATOMIC_RELAXED)")
        (tmp_path / source.name).write_text(text)
    done = build_and_run(tmp_path, tmp_path)
    assert "data race" in done.stderr
