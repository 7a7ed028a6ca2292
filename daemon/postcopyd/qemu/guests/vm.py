"""A QEMU that runs one of our guests, for measurements and tests: started, listened to, ended by its pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from ...errors import Code, ConfigError, MigrationError
from ...units import MIB

QEMU = "qemu-system-x86_64"
PATIENCE_S = 120.0


class Guest(Protocol):
    """says_round, says_wrong: what it prints on its serial port when all was right, and when something was not."""

    @property
    def memory_bytes(self) -> int: ...
    @property
    def says_round(self) -> bytes: ...
    @property
    def says_wrong(self) -> bytes: ...
    def arguments(self, folder: Path) -> list[str]: ...


class VmOptions(msgspec.Struct, frozen=True, kw_only=True):
    """ram: a file for its memory, None for memory of its own. incoming: it waits for a guest, as in `-incoming`.

    Without `accel` QEMU interprets: a guest that touches a page every few instructions is then about as fast as on
    hardware, and needs none.
    """

    name: str
    ram: Path | None = None
    incoming: str = ""
    accel: str = "tcg"
    vcpus: int = 1
    variables: Mapping[str, str] = {}
    extra: tuple[str, ...] = ()


class GuestVm:
    """One machine. rounds, wrong: how often its guest said so."""

    def __init__(self, guest: Guest, qmp: Path, log: Path, process: asyncio.subprocess.Process) -> None:
        self.qmp = str(qmp)
        self.process = process
        self.rounds = 0
        self.wrong = 0
        self.said = b""
        self._guest = guest
        self._log = log
        self._spoke = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, guest: Guest, folder: Path, options: VmOptions) -> GuestVm:
        """Raises ConfigError: there is no QEMU here; MigrationError: it does not start."""
        if shutil.which(QEMU) is None:
            raise ConfigError(Code.ARGUMENT_INVALID, f"no {QEMU} here; install qemu-system-x86")
        qmp, log = folder / f"{options.name}.qmp", folder / f"{options.name}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                QEMU,
                *_arguments(guest, folder, options, qmp),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **options.variables},
            )
        vm = cls(guest, qmp, log, process)
        try:
            await vm._until_monitor()
        except BaseException:
            await vm.end()
            raise
        return vm

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def until_rounds(self, rounds: int) -> None:
        """Wait until the guest said so often that all was right. Raises MigrationError: it ended, or takes too long."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.rounds < rounds:
                    if self._listening.done():
                        raise MigrationError(Code.DEMO_FAILED, f"QEMU ended; its log: {self.log[-2000:]}")
                    self._spoke.clear()
                    await self._spoke.wait()
        except TimeoutError:
            raise MigrationError(
                Code.DEMO_FAILED,
                f"the guest did {self.rounds} rounds in {PATIENCE_S:g} s; it said {self.said!r}",
            ) from None

    async def end(self) -> None:
        """Kill it, if it has not ended; idempotent."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        await self._listening

    async def _listen(self) -> None:
        assert self.process.stdout is not None
        tail = b""
        while said := await self.process.stdout.read(4096):
            # A word may come in two pieces, and must be counted once.
            text, keep = tail + said, max(len(self._guest.says_round), len(self._guest.says_wrong)) - 1
            self.rounds += _new(text, self._guest.says_round, len(tail))
            self.wrong += _new(text, self._guest.says_wrong, len(tail))
            tail = text[-keep:] if keep else b""
            self.said = (self.said + said)[-2000:]
            self._spoke.set()
        self._spoke.set()

    async def _until_monitor(self) -> None:
        """Return when its monitor listens."""
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(os.path.exists, self.qmp):
                if self.process.returncode is not None:
                    raise MigrationError(Code.DEMO_FAILED, f"QEMU did not start; its log: {self.log[-2000:]}")
                await asyncio.sleep(0.01)


def _new(text: bytes, word: bytes, before: int) -> int:
    """How often `word` is in `text`, but not within its first `before` bytes alone."""
    return text.count(word) - text[:before].count(word)


def _arguments(guest: Guest, folder: Path, options: VmOptions, qmp: Path) -> list[str]:
    size = guest.memory_bytes
    memory = ["-machine", "pc", "-m", str(size // MIB)]
    if options.ram is not None:
        backend = f"memory-backend-file,id=ram0,size={size},mem-path={options.ram},share=on"
        memory = ["-object", backend, "-machine", "pc,memory-backend=ram0", "-m", str(size // MIB)]
    return [
        *("-accel", options.accel, *memory, "-smp", str(options.vcpus)),
        *("-nodefaults", "-display", "none", "-net", "none", "-serial", "file:/dev/stdout"),
        *("-qmp", f"unix:{qmp},server,nowait", *guest.arguments(folder), *options.extra),
        *(("-incoming", options.incoming) if options.incoming else ()),
    ]
