"""Builds the C extension modules in place: `python daemon/postcopyd/_native/build.py`.

API mode: the compiler checks every declaration against the kernel headers and ours. Each module has its declarations
for cffi in daemon/native/<name>.cdef.h and its C beside them. A module is built again only when one of its inputs is
newer than its result.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from cffi import FFI

PACKAGE = Path(__file__).resolve().parent
NATIVE = PACKAGE.parent.parent / "native"
LIBRARY = NATIVE.parent / "libpostcopy"
BUILD = NATIVE.parent.parent / "build" / "native"

CFLAGS = [
    "-std=gnu11",
    "-O2",
    "-g",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
    # In code that cffi generates:
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-missing-field-initializers",
]


@dataclass(frozen=True)
class Module:
    """One extension module: its C files below daemon/native, and what it links with."""

    name: str
    headers: tuple[str, ...]
    sources: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    @property
    def cdef(self) -> Path:
        return NATIVE / f"{self.name}.cdef.h"

    @property
    def target(self) -> Path:
        return PACKAGE / f"_{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def inputs(self) -> list[Path]:
        return [
            Path(__file__),
            self.cdef,
            *(NATIVE / s for s in self.sources),
            *NATIVE.glob("*.h"),
            *NATIVE.glob("../libpostcopy/*.h"),
        ]

    def is_stale(self) -> bool:
        if not self.target.exists():
            return True
        built = self.target.stat().st_mtime
        return any(path.stat().st_mtime > built for path in self.inputs())

    def build(self) -> None:
        """Compile and link; the result replaces the old one in a single step, so a running process keeps its own."""
        ffi = FFI()
        ffi.cdef(self.cdef.read_text())
        ffi.set_source(
            f"postcopyd._native._{self.name}",
            "".join(f'#include "{h}"\n' for h in self.headers),
            sources=[str((NATIVE / s).resolve()) for s in self.sources],
            include_dirs=[str(NATIVE), str(NATIVE.parent / "libpostcopy")],
            libraries=list(self.libraries),
            extra_compile_args=CFLAGS + shlex.split(os.environ.get("POSTCOPYD_CFLAGS", "")),
            extra_link_args=shlex.split(os.environ.get("POSTCOPYD_LDFLAGS", "")),
        )
        workdir = BUILD / self.name
        workdir.mkdir(parents=True, exist_ok=True)
        result = Path(ffi.compile(tmpdir=str(workdir), verbose=False))
        staged = self.target.with_suffix(".new")
        shutil.copy2(result, staged)
        staged.touch()
        staged.replace(self.target)


@dataclass(frozen=True)
class SharedLibrary:
    """A library that no Python imports, carried beside the modules: files below daemon/libpostcopy, and others."""

    name: str
    sources: tuple[str, ...]

    @property
    def target(self) -> Path:
        return PACKAGE / f"{self.name}.so"

    def is_stale(self) -> bool:
        if not self.target.exists():
            return True
        built = self.target.stat().st_mtime
        inputs = [
            Path(__file__),
            *(LIBRARY / s for s in self.sources),
            *LIBRARY.glob("*.h"),
            *NATIVE.glob("*.h"),
        ]
        return any(path.stat().st_mtime > built for path in inputs)

    def build(self) -> None:
        """Compile and link in one step, then replace the old one."""
        staged = self.target.with_suffix(".new")
        flags = [*CFLAGS, *shlex.split(os.environ.get("POSTCOPYD_CFLAGS", ""))]
        command = [
            "gcc",
            *flags,
            "-fPIC",
            "-shared",
            "-pthread",
            f"-I{NATIVE}",
            f"-I{LIBRARY}",
            "-o",
            str(staged),
        ]
        subprocess.run([*command, *(str(LIBRARY / s) for s in self.sources)], check=True)
        staged.replace(self.target)


# The preload shim replaces mmap(2): it must not get into any module.
LIBPOSTCOPY = tuple(
    f"../libpostcopy/{path.name}"
    for path in sorted(LIBRARY.glob("*.c"))
    if not path.name.startswith("preload")
)

PRELOAD = SharedLibrary(
    "libpostcopy-preload",
    sources=(
        "preload.c",
        "preload_block.c",
        "preload_config.c",
        "preload_handoff.c",
        "preload_keeper.c",
        "preload_present.c",
        "../native/uffd.c",
    ),
)

MODULES = (
    Module(
        "core",
        headers=("stdbool.h", "crash.h", "pager.h", "edge_guest_memfd.h", "file_epoch.h"),
        sources=(
            "checksum.c",
            "checksum_avx2.c",
            "crash.c",
            "edge_guest_memfd.c",
            "ledger.c",
            "extents.c",
            "state.c",
            "uffd.c",
            "histogram.c",
            "inflight.c",
            "waiters.c",
            "wire.c",
            "pager.c",
            "pager_install.c",
            "pager_request.c",
            "pager_exits.c",
            "pager_present.c",
            "exit_ring.c",
            "exit_ring_map.c",
            "file_epoch.c",
        ),
    ),
    Module(
        "image",
        headers=("image.h", "image_catalog.h", "page_stream.h"),
        sources=(
            "file_epoch.c",
            "image.c",
            "image_catalog.c",
            "image_view.c",
            "zero.c",
            "cold_read.c",
            "range_queue.c",
            "server_wire.c",
            "page_stream.c",
            "checksum.c",
            "checksum_avx2.c",
        ),
    ),
    Module(
        "vmm",
        headers=("vmm.h",),
        sources=(
            "vmm.c",
            "vmm_walk.c",
            "vmm_guest.c",
            "vmm_kvm.c",
            "vmm_exits.c",
            "vmm_process.c",
            "vmm_image.c",
            "vmm_host.c",
            "exit_ring_vmm.c",
            *LIBPOSTCOPY,
        ),
        libraries=("pthread", "capstone"),
    ),
    Module(
        "h2",
        headers=("h2.h", "urgency.h"),
        sources=(
            "h2_assembler.c",
            "h2_bytes.c",
            "h2_call.c",
            "h2_conn.c",
            "h2_events.c",
            "h2_guard.c",
            "h2_head.c",
            "h2_in.c",
            "h2_out.c",
            "h2_pages.c",
            "h2_server.c",
            "h2_stream.c",
            "urgency.c",
        ),
        libraries=("nghttp2",),
    ),
)


def main(names: list[str]) -> None:
    """Build the named modules, or all, where stale. Modules whose C is absent are named and skipped."""
    for result in (*MODULES, PRELOAD):
        if names and result.name not in names:
            continue
        if result.is_stale():
            print(f"building {result.target.name}", flush=True)
            result.build()


if __name__ == "__main__":
    main(sys.argv[1:])
