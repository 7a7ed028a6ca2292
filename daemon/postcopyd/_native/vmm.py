"""Typed binding of daemon/native/vmm.h: the values its functions take and give, and one class for a machine.

Every call releases the GIL, so a call that waits for a page does not keep the thread that would bring it from
running.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, cast

import msgspec

from ..errors import Code, ConfigError, KernelError
from ..units import PAGE_SIZE, Gpa, Hva
from ._vmm import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cffi import FFI

MAX_VCPUS = 64
MEMORY_GPA = Gpa(4 << 30)
"""Guest physical address of the first byte of memory."""


class _Lib(Protocol):
    """vmm.h as cffi shows it; pointers are CData."""

    def vmm_shape_check(self, shape: FFI.CData, /) -> int: ...
    def vmm_create(
        self, shape: FFI.CData, memory: FFI.CData, guest: int, out: FFI.CData, op: FFI.CData, /
    ) -> int: ...
    def vmm_destroy(self, vm: FFI.CData, /) -> None: ...
    def vmm_use_exits(self, vm: FFI.CData, path: bytes, uffd: int, page_size: int, /) -> int: ...
    def vmm_start_device(self, vm: FFI.CData, /) -> int: ...
    def vmm_exits_status(self, vm: FFI.CData, status: FFI.CData, /) -> None: ...
    def vmm_start(self, vm: FFI.CData, /) -> None: ...
    def vmm_pause(self, vm: FFI.CData, timeout_ms: int, /) -> int: ...
    def vmm_wait(self, vm: FFI.CData, timeout_ms: int, /) -> int: ...
    def vmm_status(self, vm: FFI.CData, vcpu: int, status: FFI.CData, /) -> None: ...
    def vmm_state_bytes(self, guest: int, /) -> int: ...
    def vmm_save(self, vm: FFI.CData, vcpu: int, state: FFI.CData, /) -> int: ...
    def vmm_load(self, vm: FFI.CData, vcpu: int, state: FFI.CData, /) -> int: ...
    def vmm_state_walk(self, guest: int, state: FFI.CData, walk: FFI.CData, /) -> None: ...
    def vmm_program_id(self, guest: int, /) -> int: ...
    def vmm_fill(self, shape: FFI.CData, memory: FFI.CData, /) -> None: ...
    def vmm_check(
        self, shape: FFI.CData, memory: FFI.CData, walks: FFI.CData, removed: FFI.CData, result: FFI.CData, /
    ) -> None: ...
    def vmm_map(self, kind: int, len_bytes: int, fd: int, out: FFI.CData, /) -> int: ...
    def vmm_map_readonly(self, len_bytes: int, fd: int, out: FFI.CData, /) -> int: ...
    def vmm_unmap(self, memory: FFI.CData, len_bytes: int, /) -> None: ...
    def vmm_discard(self, kind: int, memory: FFI.CData, len_bytes: int, /) -> int: ...
    def vmm_read(self, memory: FFI.CData, offset: int, out: FFI.CData, len_bytes: int, /) -> None: ...
    def vmm_write(self, memory: FFI.CData, offset: int, data: FFI.CData, len_bytes: int, /) -> None: ...
    def vmm_userfaultfd(self, user_mode_only: int, /) -> int: ...


class _Walk(Protocol):
    tick: int
    visited: int


_lib = cast("_Lib", lib)
_ffi = cast("FFI", ffi)


class GuestCode(IntEnum):
    KVM = 0
    PROCESS = 1


class OrderCode(IntEnum):
    SEQUENTIAL = 0
    RANDOM = 1


class MapCode(IntEnum):
    PRIVATE = 0
    SHARED = 1
    FILE = 2
    HUGETLB = 3


class PhaseCode(IntEnum):
    PARKED = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3


class RawShape(msgspec.Struct, frozen=True):
    """struct vmm_shape. Sizes in bytes, multiples of 4096."""

    memory_bytes: int
    spare_bytes: int
    seed: int
    passes: int
    vcpus: int
    order: OrderCode


class Walk(msgspec.Struct, frozen=True):
    """struct vmm_walk: where one vCPU's walk is."""

    tick: int
    visited: bool


class RawVcpuStatus(msgspec.Struct, frozen=True):
    """struct vmm_vcpu_status."""

    phase: PhaseCode
    tid: int
    tick: int
    passes: int
    guest_errors: int
    first_error_page: int
    first_error_kind: int
    run_errno: int
    exit_reason: int
    suberror: int
    rip: int


class ExitsStatus(msgspec.Struct, frozen=True):
    """struct vmm_exits_status: exits by shape, reads of the device, and whether all pages are in place."""

    annotated: int = 0
    bare: int = 0
    mmio: int = 0
    emulation: int = 0
    device_reads: int = 0
    complete: bool = False


class CheckResult(msgspec.Struct, frozen=True):
    """struct vmm_check_result. The first mismatch is meaningful where there is one."""

    pages: int
    mismatched_pages: int
    first_page: int
    first_offset: int


def _c_shape(shape: RawShape) -> FFI.CData:
    """Raises ConfigError where no guest can have this shape."""
    try:
        c_shape = _ffi.new("struct vmm_shape *", msgspec.structs.asdict(shape))
    except OverflowError as err:
        raise ConfigError(Code.ARGUMENT_INVALID, f"a guest cannot have this shape: {err}") from err
    if _lib.vmm_shape_check(c_shape) != 0:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"no guest can have {shape.vcpus} vCPUs, {shape.memory_bytes} bytes of memory,"
            f" {shape.spare_bytes} of them spare, and {shape.passes} passes: it takes 1 to {MAX_VCPUS} vCPUs,"
            " a page or more for each, whole pages, and at most 256 GiB",
        )
    return c_shape


def _pointer(address: Hva) -> FFI.CData:
    return _ffi.cast("uint8_t *", address)


class NativeMachine:
    """struct vmm. The caller keeps the memory mapped until `destroy`."""

    def __init__(self, shape: RawShape, address: Hva, guest: GuestCode) -> None:
        """Raises KernelError, naming what was refused, or ConfigError."""
        out = _ffi.new("struct vmm **")
        op = _ffi.new("char **")
        c_shape = _c_shape(shape)
        result = _lib.vmm_create(c_shape, _pointer(address), guest, out, op)
        if result != 0:
            name = cast("bytes", _ffi.string(op[0])).decode()
            raise KernelError(name, address, shape.memory_bytes, -result)
        self._vm: FFI.CData = out[0]
        self._vcpus = shape.vcpus
        self._guest = guest

    def destroy(self) -> None:
        """End the vCPU threads; idempotent."""
        vm, self._vm = self._vm, _ffi.NULL
        _lib.vmm_destroy(vm)

    def _checked(self, vcpu: int = 0) -> FFI.CData:
        if self._vm == _ffi.NULL or not 0 <= vcpu < self._vcpus:
            raise IndexError(f"no vCPU {vcpu}: destroyed, or beyond {self._vcpus}")
        return self._vm

    def use_exits(self, path: str, uffd: int, page_size: int) -> int:
        """Return 0 or an errno; see vmm_use_exits."""
        return -_lib.vmm_use_exits(self._checked(), path.encode(), uffd, page_size)

    def start_device(self) -> None:
        """Raises KernelError: no thread could be started, or the machine does not use exits."""
        result = _lib.vmm_start_device(self._checked())
        if result != 0:
            raise KernelError("starting the device's thread", 0, 0, -result)

    def exits_status(self) -> ExitsStatus:
        status = _ffi.new("struct vmm_exits_status *")
        _lib.vmm_exits_status(self._checked(), status)
        values = {name: getattr(status, name) for name in ExitsStatus.__struct_fields__}
        return msgspec.convert(values, ExitsStatus, strict=False)

    def start(self) -> None:
        _lib.vmm_start(self._checked())

    def pause(self, timeout_ms: int) -> int:
        """Return how many vCPUs still run."""
        return _lib.vmm_pause(self._checked(), timeout_ms)

    def wait(self, timeout_ms: int) -> int:
        """Return how many vCPUs still run when none did, or after the time."""
        return _lib.vmm_wait(self._checked(), timeout_ms)

    def status(self, vcpu: int) -> RawVcpuStatus:
        status = _ffi.new("struct vmm_vcpu_status *")
        _lib.vmm_status(self._checked(vcpu), vcpu, status)
        values = {name: int(getattr(status, name)) for name in RawVcpuStatus.__struct_fields__}
        return msgspec.convert(values, RawVcpuStatus)

    def save(self, vcpu: int) -> bytes:
        """Raises KernelError; EBUSY while the vCPU runs."""
        len_bytes = _lib.vmm_state_bytes(self._guest)
        state = _ffi.new("uint8_t[]", len_bytes)
        result = _lib.vmm_save(self._checked(vcpu), vcpu, state)
        if result != 0:
            raise KernelError(f"saving the registers of vCPU {vcpu}", 0, len_bytes, -result)
        return bytes(_ffi.buffer(state, len_bytes))

    def load(self, vcpu: int, state: bytes) -> None:
        """`state` has `state_bytes(guest)` bytes. Raises KernelError; EBUSY while the vCPU runs."""
        result = _lib.vmm_load(self._checked(vcpu), vcpu, _ffi.from_buffer("uint8_t[]", state))
        if result != 0:
            raise KernelError(f"loading the registers of vCPU {vcpu}", 0, len(state), -result)


def state_bytes(guest: GuestCode) -> int:
    return _lib.vmm_state_bytes(guest)


def state_walk(guest: GuestCode, state: bytes) -> Walk:
    """`state` has `state_bytes(guest)` bytes."""
    c_walk = _ffi.new("struct vmm_walk *")
    _lib.vmm_state_walk(guest, _ffi.from_buffer("uint8_t[]", state), c_walk)
    walk = cast("_Walk", c_walk)
    return Walk(tick=walk.tick, visited=bool(walk.visited))


def program_id(guest: GuestCode) -> int:
    return _lib.vmm_program_id(guest)


def check_shape(shape: RawShape) -> None:
    """Raises ConfigError where no guest can have this shape."""
    _c_shape(shape)


def fill(shape: RawShape, address: Hva) -> None:
    _lib.vmm_fill(_c_shape(shape), _pointer(address))


def check(shape: RawShape, address: Hva, walks: Sequence[Walk], removed: bytearray | None) -> CheckResult:
    """One walk a vCPU; `removed` has one byte a page. Raises ConfigError."""
    c_shape = _c_shape(shape)
    if len(walks) != shape.vcpus or (removed is not None and len(removed) != shape.memory_bytes // PAGE_SIZE):
        raise ConfigError(
            Code.ARGUMENT_INVALID, "one walk a vCPU and one byte a page are needed to check memory"
        )
    c_walks = _ffi.new("struct vmm_walk[]", [(walk.tick, int(walk.visited)) for walk in walks])
    c_removed = _ffi.NULL if removed is None else _ffi.from_buffer("uint8_t[]", removed)
    result = _ffi.new("struct vmm_check_result *")
    _lib.vmm_check(c_shape, _pointer(address), c_walks, c_removed, result)
    return CheckResult(*(int(getattr(result, name)) for name in CheckResult.__struct_fields__))


def map_memory(kind: MapCode, len_bytes: int, fd: int) -> Hva:
    """Raises KernelError."""
    out = _ffi.new("uint8_t **")
    result = _lib.vmm_map(kind, len_bytes, fd, out)
    if result != 0:
        raise KernelError("mapping guest memory", 0, len_bytes, -result)
    return Hva(int(_ffi.cast("uintptr_t", out[0])))


def map_readonly(len_bytes: int, fd: int) -> Hva:
    """Raises KernelError."""
    out = _ffi.new("uint8_t **")
    result = _lib.vmm_map_readonly(len_bytes, fd, out)
    if result != 0:
        raise KernelError("mapping an image", 0, len_bytes, -result)
    return Hva(int(_ffi.cast("uintptr_t", out[0])))


def unmap(address: Hva, len_bytes: int) -> None:
    _lib.vmm_unmap(_pointer(address), len_bytes)


def discard(kind: MapCode, address: Hva, len_bytes: int) -> None:
    """Blocks until the REMOVE event is read, where the userfaultfd asked for it. Raises KernelError."""
    result = _lib.vmm_discard(kind, _pointer(address), len_bytes)
    if result != 0:
        raise KernelError("discarding guest memory", address, len_bytes, -result)


def read(address: Hva, offset: int, len_bytes: int) -> bytes:
    """Blocks while a page of the range is absent."""
    out = _ffi.new("uint8_t[]", len_bytes)
    _lib.vmm_read(_pointer(address), offset, out, len_bytes)
    return bytes(_ffi.buffer(out, len_bytes))


def write(address: Hva, offset: int, data: bytes) -> None:
    """Blocks while a page of the range is absent."""
    _lib.vmm_write(_pointer(address), offset, _ffi.from_buffer("uint8_t[]", data), len(data))


def userfaultfd(*, user_mode_only: bool) -> int:
    """Return a new descriptor. Raises KernelError."""
    result = _lib.vmm_userfaultfd(int(user_mode_only))
    if result < 0:
        raise KernelError("opening a userfaultfd", 0, 0, -result)
    return result
