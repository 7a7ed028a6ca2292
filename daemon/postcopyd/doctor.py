"""`postcopyd doctor`: what this host can do for post-copy, and what to change where it cannot.

What can be tried is tried: versions and capability numbers say little (docs/kernel-policy.md). Nothing is changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from .errors import KernelError
from .qemu.preload import library_path
from .units import GIB, MIB, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API, UFFDIO_COPY, UFFD_API = 0xC018AA3F, 0xC028AA03, 0xAA
KVM_GET_API_VERSION, KVM_API = 0xAE00, 12

NEEDED_FEATURES = {
    "EVENT_REMAP": 2,
    "EVENT_REMOVE": 3,
    "MISSING_HUGETLBFS": 4,
    "MISSING_SHMEM": 5,
    "EVENT_UNMAP": 6,
}
USEFUL_FEATURES = {"THREAD_ID": 8, "EXACT_ADDRESS": 11, "POISON": 14}

LEAST_KERNEL = (5, 11)
DESCRIPTORS_A_GUEST = 8
ENOUGH_DESCRIPTORS = 4096
QEMU = "qemu-system-x86_64"


class Level(StrEnum):
    """OK; NOTE: something optional is missing; PROBLEM: guests cannot be served."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One check's result; advice is what to do unless it is ok."""

    check: str
    level: Level
    found: str
    advice: str = ""


class HostView(msgspec.Struct, frozen=True):
    """Where the host is looked at; a test shows another."""

    root: Path = Path("/")

    def read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return None


def check_kernel(host: HostView) -> Finding:
    text = host.read("proc/sys/kernel/osrelease") or platform.release()
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < LEAST_KERNEL:
        return Finding("kernel", Level.PROBLEM, text, "Linux 5.11 or later is needed.")
    return Finding("kernel", Level.OK, text)


def check_uffd_device(host: HostView) -> Finding:
    """The way that needs only a file's permission. Source: userfaultfd(2), /dev/userfaultfd, Linux 6.1."""
    name, path = "userfaultfd device", host.root / "dev/userfaultfd"
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = "a VMM then needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1"
        if error.errno == errno.EACCES:
            return Finding(
                name, Level.NOTE, "no permission", f"Give the VMM's user access to {path}; {advice}."
            )
        return Finding(
            name, Level.NOTE, os.strerror(error.errno or 0), f"Linux 6.1 has it; without, {advice}."
        )
    try:
        os.close(fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return Finding(name, Level.NOTE, os.strerror(error.errno or 0), "Another device is in its place.")
    finally:
        os.close(device)
    return Finding(name, Level.OK, "opens")


def check_uffd(host: HostView) -> Finding:
    """A page of a memory file is missed, copied in and read."""
    from .vmm.guestmem import GuestMemory, MemoryKind
    from .vmm.uffd_client import Feature, register_memory

    name = "userfaultfd"
    memory = GuestMemory(MemoryKind.MEMFD, PAGE_SIZE)
    page = GuestMemory(MemoryKind.ANONYMOUS, PAGE_SIZE)
    try:
        with register_memory(memory, Feature.EVENT_REMOVE) as uffd:
            page.write(0, b"x" * PAGE_SIZE)
            request = struct.pack("=QQQQq", memory.address, page.address, PAGE_SIZE, 0, 0)
            fcntl.ioctl(uffd.fileno(), UFFDIO_COPY, request)
            good = memory.read(0, PAGE_SIZE) == b"x" * PAGE_SIZE
    except KernelError as error:
        allowed = host.read("proc/sys/vm/unprivileged_userfaultfd")
        return Finding(
            name,
            Level.PROBLEM,
            f"{error.op}: {errno.errorcode.get(error.errno, error.errno)}",
            f"vm.unprivileged_userfaultfd is {allowed}: give access to /dev/userfaultfd, or CAP_SYS_PTRACE.",
        )
    except OSError as error:
        return Finding(name, Level.PROBLEM, f"UFFDIO_COPY: {error.strerror}", "This kernel cannot be used.")
    finally:
        memory.close()
        page.close()
    if not good:
        return Finding(name, Level.PROBLEM, "a page came with another content", "This kernel cannot be used.")
    return Finding(name, Level.OK, "a page was missed, copied in and read")


def check_uffd_features(host: HostView) -> Finding:
    from ._native import vmm as native

    name = "userfaultfd features"
    try:
        fd = native.userfaultfd(user_mode_only=True)
    except KernelError as error:
        return Finding(name, Level.PROBLEM, str(errno.errorcode.get(error.errno)), "See userfaultfd.")
    try:
        answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", UFFD_API, 0, 0))
    except OSError as error:
        return Finding(name, Level.PROBLEM, f"UFFDIO_API: {error.strerror}", "This kernel cannot be used.")
    finally:
        os.close(fd)
    has = struct.unpack("=QQQ", answer)[1]
    missing = [feature for feature, bit in NEEDED_FEATURES.items() if not has >> bit & 1]
    if missing:
        return Finding(name, Level.PROBLEM, f"lacks {', '.join(missing)}", "A newer kernel is needed.")
    lacks = [feature for feature, bit in USEFUL_FEATURES.items() if not has >> bit & 1]
    if lacks:
        advice = "Without THREAD_ID no block time per vCPU, without POISON no --on-loss poison."
        return Finding(name, Level.NOTE, f"lacks {', '.join(lacks)}", advice)
    return Finding(name, Level.OK, "all that are used")


def check_kvm(host: HostView) -> Finding:
    try:
        kvm = os.open(host.root / "dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = (
            "VMMs cannot use hardware; postcopyd itself does not need it. Load the module, or give access."
        )
        return Finding("kvm", Level.NOTE, f"/dev/kvm: {error.strerror}", advice)
    try:
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    except OSError as error:
        return Finding("kvm", Level.NOTE, f"/dev/kvm: {error.strerror}", "It is no KVM.")
    finally:
        os.close(kvm)
    if version != KVM_API:
        return Finding("kvm", Level.NOTE, f"API version {version}", "VMMs expect 12.")
    return Finding("kvm", Level.OK, "opens")


def check_paging(host: HostView) -> Finding:
    """Whether the hardware walks guest page tables; if not, exit mode needs them pinned (docs/libpostcopy.md)."""
    for module, parameter in (("kvm_intel", "ept"), ("kvm_amd", "npt")):
        value = host.read(f"sys/module/{module}/parameters/{parameter}")
        if value in ("Y", "1"):
            return Finding("paging", Level.OK, f"hardware ({parameter})")
    if not (host.root / "sys/module/kvm").is_dir():
        return Finding("paging", Level.NOTE, "unknown", "No KVM is loaded.")
    return Finding(
        "paging",
        Level.NOTE,
        "shadow",
        "Faults by messages work as ever; VMMs that use vCPU exits must pin guest page tables (docs/libpostcopy.md).",
    )


def check_memory_folder(host: HostView) -> Finding:
    path = host.root / "dev/shm"
    if not path.is_dir():
        return Finding("/dev/shm", Level.NOTE, "absent", "Guest RAM in files needs a tmpfs or hugetlbfs.")
    usage = shutil.disk_usage(path)
    found = f"{format_size(usage.free)} of {format_size(usage.total)} free"
    if usage.free < GIB:
        return Finding(
            "/dev/shm", Level.NOTE, found, "RAM files lie there: mount -o remount,size=… /dev/shm."
        )
    return Finding("/dev/shm", Level.OK, found)


def check_memory(host: HostView) -> Finding:
    text = host.read("proc/meminfo") or ""
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    available = found.get("MemAvailable", 0)
    line = f"{format_size(available)} available"
    if available < 256 * MIB:
        advice = "Pages that arrive have no place: vCPUs wait (`memory.short`) until memory is free."
        return Finding("memory", Level.PROBLEM, line, advice)
    return Finding("memory", Level.OK, line)


def check_huge_pages(host: HostView) -> Finding:
    pools = []
    for pool in sorted((host.root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        relative = pool.relative_to(host.root)
        total, free = (host.read(f"{relative}/{name}_hugepages") for name in ("nr", "free"))
        if total not in (None, "0"):
            pools.append(f"{free} of {total} pages of {pool.name.removeprefix('hugepages-')} free")
    if pools:
        return Finding("huge pages", Level.OK, ", ".join(pools))
    advice = "Only guests whose RAM is in huge pages need them: reserve with vm.nr_hugepages."
    return Finding("huge pages", Level.NOTE, "none reserved", advice)


def check_descriptors(host: HostView) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (at most {hard}), enough for {soft // DESCRIPTORS_A_GUEST} guests"
    if soft < ENOUGH_DESCRIPTORS:
        return Finding("open files", Level.NOTE, found, "LimitNOFILE= of the unit, or ulimit -n, raises it.")
    return Finding("open files", Level.OK, found)


def check_supervision(host: HostView) -> Finding:
    if (host.root / "run/systemd/system").is_dir():
        return Finding("service manager", Level.OK, "systemd keeps descriptors over a restart")
    advice = "Run `postcopyd supervise`, so that a crash of the daemon costs no guest."
    return Finding("service manager", Level.NOTE, "no systemd", advice)


def check_shim(host: HostView) -> Finding:
    path = library_path()
    if not path.is_file():
        return Finding("preload shim", Level.NOTE, f"{path} is absent", "Build it: make build.")
    return Finding("preload shim", Level.OK, str(path))


def check_qemu(host: HostView) -> Finding:
    program = shutil.which(QEMU)
    if program is None:
        return Finding("qemu", Level.NOTE, f"no {QEMU}", "Only `postcopyd qemu` needs one.")
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("qemu", Level.NOTE, f"{program} does not run: {error}", "Look into its installation.")
    return Finding("qemu", Level.OK, said.splitlines()[0] if said else program)


CHECKS: tuple[Callable[[HostView], Finding], ...] = (
    check_kernel,
    check_uffd_device,
    check_uffd,
    check_uffd_features,
    check_kvm,
    check_paging,
    check_memory,
    check_memory_folder,
    check_huge_pages,
    check_descriptors,
    check_supervision,
    check_shim,
    check_qemu,
)


def examine(host: HostView | None = None) -> list[Finding]:
    """Run every check, each once."""
    return [check(host or HostView()) for check in CHECKS]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what this host can do for post-copy, and what to change where it cannot.

    Exit status 1 if guests cannot be served here.
    """
    findings = examine()
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        for finding in findings:
            click.echo(f"{finding.level.upper():8} {finding.check:21} {finding.found}")
            if finding.advice:
                click.echo(f"{'':8} {'':21} → {finding.advice}")
    sys.exit(any(finding.level is Level.PROBLEM for finding in findings))
