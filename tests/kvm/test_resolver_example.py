"""libpostcopy as its users meet it: built, installed, found by pkg-config, and the example run against a daemon."""

from __future__ import annotations

import asyncio
import random
import re
import struct
import subprocess
from pathlib import Path

import pytest

from harness import PATIENCE_S, Host
from postcopyd.status import Limits
from support import require_kvm

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "daemon" / "native"
LIBRARY = ROOT / "daemon" / "libpostcopy"
RAM_WORDS_READ = (1 << 20) // 8
PAGES_READ = (1 << 20) // 4096
RAM_BYTES = 2 << 20


def output(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env=env or None,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library's prefix."""
    folder = tmp_path_factory.mktemp("libpostcopy")
    prefix = folder / "prefix"
    output("make", "-s", "-C", LIBRARY, f"BUILD={folder / 'build'}", f"PREFIX={prefix}", "install")
    return prefix


@pytest.fixture(scope="module")
def example(installed: Path) -> Path:
    program = installed / "minimal"
    flags = output(
        "pkg-config", "--cflags", "--libs", "postcopy",
        PATH="/usr/bin:/bin", PKG_CONFIG_PATH=str(installed / "lib" / "pkgconfig"),
    ).split()  # fmt: skip
    source = LIBRARY / "examples" / "minimal.c"
    warnings = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    output("gcc", *warnings, "-o", program, source, *flags, f"-Wl,-rpath,{installed / 'lib'}")
    return program


def test_the_library_exports_what_its_header_declares(installed: Path) -> None:
    header = (installed / "include" / "libpostcopy.h").read_text()
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = set(re.findall(r"\b(postcopy_\w+)\(", code))
    symbols = output("nm", "-D", "--defined-only", "--format=posix", installed / "lib" / "libpostcopy.so")
    assert {line.split()[0] for line in symbols.splitlines()} == declared


def test_the_header_stands_alone_in_c_and_cpp(installed: Path, tmp_path: Path) -> None:
    include = installed / "include"
    for compiler, suffix in (("gcc", "c"), ("g++", "cpp")):
        source = tmp_path / f"alone.{suffix}"
        source.write_text("#include <libpostcopy.h>\nint main(void) { return 0; }\n")
        output(compiler, "-Wall", "-Wextra", "-Werror", f"-I{include}", "-fsyntax-only", source)


def test_the_example_runs_on_memory_that_comes_late(example: Path, tmp_path: Path) -> None:
    require_kvm()
    daemon = tmp_path / "example_daemon"
    sources = [ROOT / "tests" / "kvm" / "example_daemon.c", ROOT / "tests" / "doubles" / "exit_daemon.c"]
    parts = [NATIVE / "exit_ring.c", NATIVE / "exit_ring_map.c"]
    output("gcc", "-std=gnu11", f"-I{NATIVE}", "-o", daemon, *sources, *parts, "-pthread")
    socket = tmp_path / "socket"
    with subprocess.Popen(
        [daemon, socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "listening\n"
        assert output(example, socket) == f"sum {RAM_WORDS_READ:#x}\n"
        faults, _ = serving.communicate(timeout=30)
    assert int(faults) == PAGES_READ


@pytest.mark.parametrize("at_hand", ["the source's file", "a copy of it"])
async def test_with_the_image_at_hand_vcpus_install_by_themselves(example: Path, at_hand: str) -> None:
    require_kvm()
    content = random.Random(7).randbytes(RAM_BYTES)
    read = struct.unpack(f"<{RAM_WORDS_READ}Q", content[: RAM_WORDS_READ * 8])
    async with Host() as host:
        image = host.image("memory", content)
        _, source = await host.page_server(f"vm={image}")
        daemon = await host.daemon()
        # The push is held: what comes is what vCPUs asked for.
        prepared = await daemon.client.prepare("vm", [source], limits=Limits(push_rate=1))
        file = image if at_hand == "the source's file" else host.image("copy", content)
        vmm = await asyncio.create_subprocess_exec(example, prepared.socket_path, file, stdout=-1)
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await vmm.communicate()
        assert (vmm.returncode, said.decode()) == (0, f"sum {sum(read) % (1 << 64):#x}\n")
        ended = await daemon.until("vm", lambda status: status.state.is_final)
    if file is image:
        # But for those that came before the daemon had looked at the userfaultfd for the first time.
        assert ended.exits < PAGES_READ // 4
    else:
        # Nobody could know that its content is the same.
        assert ended.exits > PAGES_READ // 2
