"""A VMM process as its parent drives it: lines of JSON in, a line of JSON out for each.

The first line out is the greeting. An answer has `ok`; a refused command has `code` and `error` too. The end
of the input is `quit`.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
import structlog

from ..errors import Code, ConfigError, MigrationError, PostcopyError
from . import stillness
from .guestmem import mapped_image
from .handoff_client import HandoffFormat, hand_off
from .state import check_memory, read_state, write_state

if TYPE_CHECKING:
    import socket

    from .._native.vmm import CheckResult
    from .machine import Machine
    from .uffd_client import Uffd

_log = structlog.get_logger(__name__)

MAX_LINE_BYTES = 64 << 10
MAX_TIMEOUT_S = 3600.0


class _Command(msgspec.Struct, frozen=True, tag_field="command", tag=str.lower, forbid_unknown_fields=True):
    pass


class Start(_Command, frozen=True):
    """Let the parked vCPUs run."""


class Pause(_Command, frozen=True):
    """Take the vCPUs out of the guest."""

    timeout_s: float = 5.0


class Wait(_Command, frozen=True):
    """Wait until every vCPU made `steps` steps since `start`, or with 0 until none runs. Answers `reached`."""

    timeout_s: float
    steps: int = 0


class Save(_Command, frozen=True):
    """Write the paused guest's registers to `path`."""

    path: str


class Load(_Command, frozen=True):
    """Read them back; on a destination before `start`."""

    path: str


class Status(_Command, frozen=True):
    """Answer the machine's status."""


class Check(_Command, frozen=True):
    """Compare all memory with what the stopped guest must have made of it.

    With `ram` and `state`, the source's memory file and saved state, check these too. Answers
    `mismatched_pages`, `first` ({page, offset} or null), `source_mismatched_pages` and `guest_errors`.
    """

    ram: str = ""
    state: str = ""


class Balloon(_Command, frozen=True):
    """Take a range from the guest; it reads zero from now on."""

    offset: int
    len_bytes: int


class Handoff(_Command, frozen=True):
    """Hand the same userfaultfd over again, as after the end of a daemon."""

    socket: str


class Stillness(_Command, frozen=True):
    """Answer `longest_s`, how long a running vCPU made no step since the last time this was asked."""


class Quit(_Command, frozen=True):
    """End the process, running guest and all."""


Command = Start | Pause | Wait | Save | Load | Status | Check | Balloon | Handoff | Stillness | Quit
_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


def _require_timeout(timeout_s: float) -> float:
    if not 0 <= timeout_s <= MAX_TIMEOUT_S:
        raise ConfigError(
            Code.GUEST_COMMAND, f"timeout_s is 0 to {MAX_TIMEOUT_S:.0f} seconds, not {timeout_s}"
        )
    return timeout_s


def _first(result: CheckResult) -> dict[str, int] | None:
    return {"page": result.first_page, "offset": result.first_offset} if result.mismatched_pages else None


class Console:
    """Executes commands on one machine.

    Args:
        uffd: the memory's userfaultfd, where it has one.
        handoff_format: spoken by `handoff`.
        must_load: registers must be loaded before the guest may start.
    """

    def __init__(
        self,
        machine: Machine,
        uffd: Uffd | None = None,
        *,
        handoff_format: HandoffFormat = HandoffFormat.FRAMED,
        regions: int = 1,
        must_load: bool = False,
    ) -> None:
        self._machine = machine
        self._uffd = uffd
        self._format = handoff_format
        self._regions = regions
        self._must_load = must_load
        self._socket: socket.socket | None = None
        self._stillness = stillness.Stillness(machine)

    def hand_off(self, path: Path) -> None:
        """Raises HandoffError; ConfigError where memory has no userfaultfd."""
        if self._uffd is None:
            raise ConfigError(
                Code.GUEST_COMMAND, "this VMM's memory has no userfaultfd; start it with --socket"
            )
        # The old socket is closed after the new hand-off: its end would mean the VMM's end.
        previous = self._socket
        self._socket = hand_off(path, self._uffd, self._machine.memory, self._format, regions=self._regions)
        if previous is not None:
            previous.close()

    def close(self) -> None:
        """End the machine, then the hand-off; idempotent."""
        self._stillness.close()
        self._machine.close()
        if self._socket is not None:
            self._socket.close()
        if self._uffd is not None:
            self._uffd.close()

    def run(self, commands: IO[bytes], answers: IO[bytes], greeting: dict[str, object]) -> None:
        """Answer every line of `commands` until `quit` or its end."""
        _answer(answers, {"ok": True} | greeting)
        while line := commands.readline(MAX_LINE_BYTES + 1):
            command: Command | None = None
            try:
                command = _decode(line)
                reply = {"ok": True} | self.execute(command)
            except PostcopyError as err:
                _log.warning("command.refused", code=err.code, error=err.message)
                reply = {"ok": False, "code": err.code, "error": err.message}
            _answer(answers, reply)
            if isinstance(command, Quit) or len(line) > MAX_LINE_BYTES:
                return

    def execute(self, command: Command) -> dict[str, object]:
        """Return what the answer says besides `ok`. Raises PostcopyError."""
        machine = self._machine
        match command:
            case Start():
                if self._must_load:
                    raise MigrationError(Code.GUEST_STATE, "load the saved registers before the guest starts")
                machine.start()
            case Pause(timeout_s):
                machine.pause(_require_timeout(timeout_s))
            case Wait(timeout_s, steps):
                return {"reached": self._wait(_require_timeout(timeout_s), steps)}
            case Save(path):
                write_state(Path(path), machine.save())
            case Load(path):
                machine.load(read_state(Path(path)))
                self._must_load = False
            case Status():
                return {"status": msgspec.to_builtins(machine.status())}
            case Check(ram, state):
                return self._check(ram, state)
            case Balloon(offset, len_bytes):
                machine.balloon(offset, len_bytes)
            case Handoff(socket=path):
                self.hand_off(Path(path))
            case Stillness():
                return {"longest_s": self._stillness.take()}
            case Quit():
                pass
        return {}

    def _wait(self, timeout_s: float, steps: int) -> bool:
        if steps:
            return self._machine.wait_steps(steps, timeout_s)
        return self._machine.wait_stopped(timeout_s)

    def _check(self, ram: str, state_path: str) -> dict[str, object]:
        if bool(ram) != bool(state_path):
            raise ConfigError(
                Code.GUEST_COMMAND, "ram and state, the source's files, only make sense together"
            )
        source_mismatched: int | None = None
        if ram:
            state = read_state(Path(state_path))
            with mapped_image(Path(ram), state.shape.memory_bytes) as address:
                source_mismatched = check_memory(state, address, state.removed).mismatched_pages
        result = self._machine.check()
        return {
            "pages": result.pages,
            "mismatched_pages": result.mismatched_pages,
            "first": _first(result),
            "source_mismatched_pages": source_mismatched,
            "guest_errors": self._machine.status().guest_errors,
        }


def _decode(line: bytes) -> Command:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(Code.GUEST_COMMAND, f"a command has at most {MAX_LINE_BYTES} bytes")
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise ConfigError(Code.GUEST_COMMAND, f"not a command: {err}") from err


def _answer(answers: IO[bytes], reply: dict[str, object]) -> None:
    answers.write(msgspec.json.encode(reply) + b"\n")
    answers.flush()
