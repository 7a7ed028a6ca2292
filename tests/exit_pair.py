"""Both ends of an exit ring, driven step by step: the project's own C, compiled for the tests."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "daemon" / "native"
ENTRIES = 16
NOT_OWED = -11


class LaneState(IntEnum):
    """enum exit_lane_state"""

    IDLE = 0
    WAITING = 1
    POISONED = 2
    BROKEN = 3


@functools.cache
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="exit-pair-")
    atexit.register(shutil.rmtree, folder)
    library = Path(folder) / "exit_pair.so"
    sources = [ROOT / "tests" / "doubles" / "exit_pair.c", NATIVE / "exit_ring.c", NATIVE / "exit_ring_vmm.c"]
    flags = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{NATIVE}"]
    subprocess.run(["gcc", *flags, "-o", str(library), *map(str, sources)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.pair_new.restype = ctypes.c_void_p
    return loaded


class ExitPair:
    """One ring with `vcpus` lanes, whose indices begin at `start`."""

    def __init__(self, vcpus: int, start: int) -> None:
        self._lib = _library()
        pointer: int | None = self._lib.pair_new(ctypes.c_uint32(vcpus), ctypes.c_uint32(start))
        assert pointer is not None, "the ring was not attached"
        self._pair = ctypes.c_void_p(pointer)

    def close(self) -> None:
        self._lib.pair_free(self._pair)

    def restart(self) -> int:
        return int(self._lib.pair_restart(self._pair))

    def post(self, vcpu: int, gpas: list[int]) -> bool:
        array = (ctypes.c_uint64 * len(gpas))(*gpas)
        return bool(self._lib.pair_post(self._pair, ctypes.c_uint32(vcpu), array, ctypes.c_uint32(len(gpas))))

    def collect(self, vcpu: int) -> LaneState:
        return LaneState(self._lib.pair_collect(self._pair, ctypes.c_uint32(vcpu)))

    def drain(self, limit: int) -> list[tuple[int, int, int]]:
        """Return (vcpu, gpa, sequence) of each fault taken, at most `limit` (≤ 64)."""
        out = (ctypes.c_uint64 * 3 * limit)()
        count = int(self._lib.pair_drain(self._pair, out, ctypes.c_uint(limit)))
        assert count >= 0, f"drain failed: {count}"
        return [(row[0], row[1], row[2]) for row in out[:count]]

    def complete(self, vcpu: int, gpa: int, sequence: int, status: int) -> int:
        return int(
            self._lib.pair_complete(
                self._pair,
                ctypes.c_uint32(vcpu),
                ctypes.c_uint64(gpa),
                ctypes.c_uint64(sequence),
                ctypes.c_uint32(status),
            )
        )

    def arm(self) -> bool:
        return bool(self._lib.pair_arm(self._pair))
