"""A real Linux guest: Debian's kernel with a few files of our own, which fills memory and hashes it again and again.

The workload is in the initial file system: a file of random bytes in memory, its hash, and then the same hash for ever.
A page that was lost or is another changes the hash, or stops the kernel. MD5, as an interpreted processor has to do it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import msgspec

from ...errors import Code, ConfigError
from ...units import MIB

KERNEL_PACKAGE = "linux-image-cloud-amd64"
SHELL_PACKAGE = "busybox-static"

INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t tmpfs -o size={file_mib}m none /mem
exec >/dev/ttyS0 2>&1
dd if=/dev/urandom of=/mem/file bs=1M count={file_mib} 2>/dev/null
first=$(md5sum /mem/file)
echo GUEST-READY
while true; do
    if [ "$(md5sum /mem/file)" = "$first" ]; then echo HASH-RIGHT; else echo HASH-WRONG; fi
done
"""


class LinuxGuest(msgspec.Struct, frozen=True):
    """kernel, initrd: files. It fills an eighth of its memory."""

    kernel: Path
    initrd: Path
    memory_bytes: int = 256 * MIB

    says_round: ClassVar[bytes] = b"HASH-RIGHT"
    says_wrong: ClassVar[bytes] = b"HASH-WRONG"

    def arguments(self, folder: Path) -> list[str]:
        """QEMU's arguments for this guest."""
        append = "console=ttyS0 panic=-1 quiet random.trust_cpu=1"
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", append, "-no-reboot"]


def make_linux(folder: Path, memory_bytes: int = 256 * MIB) -> LinuxGuest:
    """Get kernel and shell from Debian's archive, by its own tools, unless `folder` has them; install nothing.

    Raises:
        ConfigError: there is no Debian here, or its archive cannot be reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernel, shell = folder / "vmlinuz", folder / "busybox"
    if not kernel.exists() or not shell.exists():
        _download(folder, kernel, shell)
    initrd = folder / "initrd"
    init = INIT.format(file_mib=memory_bytes // 8 // MIB)
    initrd.write_bytes(_archive({"init": init.encode(), "bin/busybox": shell.read_bytes()}))
    return LinuxGuest(kernel, initrd, memory_bytes)


def _download(folder: Path, kernel: Path, shell: Path) -> None:
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ConfigError(
                Code.ARGUMENT_INVALID, f"the Linux guest comes from Debian's archive; no {program} here"
            )
    unpacked = folder / "unpacked"
    try:
        depends = _run(folder, "apt-cache", "depends", KERNEL_PACKAGE)
        names = [w for w in depends.split() if w.startswith("linux-image-") and w != KERNEL_PACKAGE]
        _run(folder, "apt-get", "download", *names[:1], SHELL_PACKAGE)
        for package in folder.glob("*.deb"):
            _run(folder, "dpkg-deb", "-x", package.name, unpacked.name)
            package.unlink()
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            Code.ARGUMENT_INVALID,
            f"the Linux guest cannot be had from Debian's archive: {error.stderr.strip()[-300:]}",
        ) from error
    found = sorted(unpacked.glob("boot/vmlinuz-*"))
    if not found:
        raise ConfigError(Code.ARGUMENT_INVALID, f"Debian's package {KERNEL_PACKAGE} brought no kernel")
    found[-1].replace(kernel)
    (unpacked / "bin" / "busybox").replace(shell)
    shutil.rmtree(unpacked)


def _run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def _archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive of executables, with the folders they need. Source: Linux, initramfs buffer format."""
    folders = ["bin", "dev", "mem"]
    entries = [_entry(name, 0o40755, b"") for name in folders]
    entries += [_entry(name, 0o100755, content) for name, content in files.items()]
    return b"".join([*entries, _entry("TRAILER!!!", 0, b"")])


def _entry(name: str, mode: int, content: bytes) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)
