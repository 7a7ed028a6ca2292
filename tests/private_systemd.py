"""A real systemd, PID 1 of name spaces of its own, that runs the real unit files with this checkout's program.

It is gone with the test, with all that it started. Needs root and cgroup v2.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

import postcopyd
from postcopyd.demo.processes import Child

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]
INSIDE = Path(__file__).with_name("systemd") / "inside.sh"
SOURCES = Path(postcopyd.__file__).parents[1]
PATIENCE_S = 30.0

INTERPRETER = os.path.realpath(sys.executable)
PYTHON = "/opt/venv/bin/python"
ENVIRONMENT = {
    "LD_LIBRARY_PATH": "/opt/python/lib",
    "PYTHONPATH": "/opt/postcopyd",
    "PYTHONPYCACHEPREFIX": "/opt/pycache",
    "PYTHONUNBUFFERED": "1",
}
"""How the program runs inside, where services do not see the home directories that it may be installed in."""

STANDBY_STEPS = frozenset({"standby.claimed", "standby.named", "standby.main"})
"""Where a standby may die on its way to being the main process."""

PROGRAM = (
    "postcopyd.entry", "postcopyd.launch", "postcopyd.daemon", "postcopyd.transport.native", "uvloop",
    "postcopyd.control.server", "postcopyd.cli", "postcopyd.source.cli", "postcopyd.source.native_listener",
    "postcopyd.vmm.__main__", "postcopyd.standby.process", "postcopyd.standby.keeper",
)  # fmt: skip


def require_systemd() -> None:
    """Skip where no private systemd can be had; fail instead with REQUIRE_SYSTEMD=1."""
    missing = [name for name in ("unshare", "nsenter", "systemctl") if shutil.which(name) is None]
    reason = (
        "not root"
        if os.geteuid() != 0
        else f"missing: {', '.join(missing)}"
        if missing
        else "no cgroup v2 is mounted"
        if _cgroup_root() is None
        else ""
    )
    if reason and os.environ.get("REQUIRE_SYSTEMD") == "1":
        pytest.fail(f"REQUIRE_SYSTEMD=1, but {reason}")
    if reason:
        pytest.skip(reason)


def _cgroup_root() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    return None


class ChildInside(Child):
    """A process in other name spaces, and the nsenter that waits for it: one session."""

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


class PrivateSystemd:
    """Started by `async with`.

    Args:
        folder: for files of ours.
        files: below /etc, by path.
        network: name of a network name space (ip-netns(8)); empty: the host's.
    """

    def __init__(self, folder: Path, files: Mapping[str, str] | None = None, network: str = "") -> None:
        self._folder = folder
        self._files = dict(files or {})
        self._network = network
        self._outer: asyncio.subprocess.Process | None = None
        self._cgroup = Path()
        self.pid = 0

    async def __aenter__(self) -> Self:
        root = _cgroup_root()
        assert root is not None
        self._cgroup = root / f"postcopyd-test-{os.getpid()}-{id(self):x}"
        self._cgroup.mkdir()
        try:
            await self._boot()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._outer is not None and self._outer.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # unshare kills what it started, and PID 1 takes all others with it.
                self._outer.send_signal(signal.SIGKILL)
            await self._outer.wait()
        async with asyncio.timeout(PATIENCE_S):
            while self._cgroup.exists():
                for folder in sorted(self._cgroup.rglob("*/"), key=lambda path: -len(path.parts)):
                    _try_rmdir(folder)
                _try_rmdir(self._cgroup)
                await asyncio.sleep(0.02)

    async def _boot(self) -> None:
        etc, work = self._folder / "etc", self._folder / "work"
        work.mkdir()
        self._write_files(etc)
        enter = [f"--net=/run/netns/{self._network}"] if self._network else []
        log = (self._folder / "systemd.log").open("wb")
        with log:
            self._outer = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"', "sh"),
                *("nsenter", *enter, "--"),
                *("unshare", "--fork", "--kill-child=SIGKILL", "--pid", "--mount", "--mount-proc"),
                *("--cgroup", "--uts", "--ipc", "--"),
                *("/bin/bash", str(INSIDE), str(work), str(etc)),
                *(INTERPRETER, sys.base_prefix, sysconfig.get_path("purelib"), str(SOURCES)),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_up():
                assert self._outer.returncode is None, (self._folder / "systemd.log").read_text()
                await asyncio.sleep(0.02)
        # Services cannot write byte code, and without it a start takes seconds.
        await self.run(*self._program("-c", "import " + ", ".join(PROGRAM)))

    async def _is_up(self) -> bool:
        assert self._outer is not None
        self.pid = _pid_one(self._outer.pid)
        if not self.pid:
            return False
        _, state, _ = await self.run("systemctl", "is-system-running", check=False)
        return state.strip() in ("running", "degraded")

    def _write_files(self, etc: Path) -> None:
        units = etc / "systemd" / "system"
        shutil.copytree(ROOT / "systemd", units)
        for name, text in self._files.items():
            (etc / name).parent.mkdir(parents=True, exist_ok=True)
            (etc / name).write_text(text)
        variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        for unit in units.glob("*.service"):
            start = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
            command = start.removeprefix("ExecStart=").removeprefix("/usr/bin/postcopyd")
            folder = units / f"{unit.name}.d"
            folder.mkdir()
            (folder / "10-program.conf").write_text(
                f"[Service]\nExecStart=\nExecStart={PYTHON} -m postcopyd{command}\nEnvironment={variables}\n"
            )

    async def configure(self, unit: str, *lines: str) -> None:
        """Add these lines to a unit's [Service], instead of those of an earlier call."""
        text = "\\n".join(["[Service]", *lines, ""])
        folder = f"/run/systemd/system/{unit}.d"
        await self.run("sh", "-c", f"mkdir -p {folder}; printf '{text}' > {folder}/90-test.conf")
        await self.run("systemctl", "daemon-reload")

    def argv(self, *command: str) -> list[str]:
        """`command`, run inside by root outside of every unit."""
        return ["nsenter", "--target", str(self.pid), *("-m", "-p", "-C", "-u", "-i", "-n", "--"), *command]

    async def run(self, *command: str, check: bool = True) -> tuple[int, str, str]:
        """Run `command` inside to its end; return status, output and errors."""
        process = await asyncio.create_subprocess_exec(
            *self.argv(*command),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
        assert not check or process.returncode == 0, f"{command}: {err.decode()}{out.decode()}"
        return process.returncode or 0, out.decode(), err.decode()

    async def program(self, name: str, *argv: str) -> Child:
        """Start `python -m argv…` inside, with pipes; the caller ends it."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *self.argv(*self._program("-m", *argv)),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return ChildInside(name, process, self._folder / f"{name}.log")

    @staticmethod
    def _program(*argv: str) -> list[str]:
        variables = (f"{key}={value}" for key, value in ENVIRONMENT.items())
        return ["env", "-u", "PYTHONDONTWRITEBYTECODE", *variables, PYTHON, *argv]

    async def properties(self, unit: str, *names: str) -> dict[str, str]:
        _, out, _ = await self.run("systemctl", "show", unit, *(f"-p{name}" for name in names))
        return dict(line.split("=", 1) for line in out.splitlines())

    async def main_pid(self, unit: str) -> int:
        """The number of its main process inside, 0 if there is none."""
        return int((await self.properties(unit, "MainPID"))["MainPID"])

    async def processes(self, unit: str) -> set[int]:
        """The numbers, inside, of all its processes."""
        path = f"/sys/fs/cgroup/system.slice/{unit}/cgroup.procs"
        status, out, _ = await self.run("cat", path, check=False)
        return {int(line) for line in out.split()} if status == 0 else set()

    async def kill(self, unit: str, name: str = "KILL") -> None:
        """Send the main process a signal."""
        await self.run("systemctl", "kill", "--kill-who=main", "-s", name, unit)

    async def journal(self, unit: str) -> str:
        return (await self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit))[1]


def _pid_one(outer: int) -> int:
    """The child of unshare, once it has become systemd; else 0."""
    try:
        child = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        return int(child) if Path(f"/proc/{child}/comm").read_text() == "systemd\n" else 0
    except (FileNotFoundError, IndexError):
        return 0


def _try_rmdir(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
