"""A supervisor whose daemons die where a test says: the n-th of them at the n-th point of a plan."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from harness import PATIENCE_S
from postcopyd.control.client import ControlClient
from postcopyd.demo.processes import Child
from postcopyd.errors import Code, PostcopyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AsyncExitStack

Answer = TypeVar("Answer")

# A line of `plan` for each start, and a line in `starts`.
NEXT_START = """
n=$(wc -l < starts)
echo >> starts
export POSTCOPYD_CRASH_AT=$(sed -n $((n + 1))p plan)
exec "$@"
"""


class Supervised:
    """A supervised daemon with its sockets in `folder`."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child = child
        self.folder = folder
        self.control = str(folder / "control.sock")

    @classmethod
    async def start(
        cls, stack: AsyncExitStack, folder: Path, plan: Sequence[str] = (), **settings: str
    ) -> Supervised:
        """`plan`: crash points, each as NAME or NAME:N. `settings`: configuration keys."""
        _write_plan(folder, plan)
        variables = {"transport": "native", "http": "", "state_dir": str(folder), **settings}
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        child = await Child.start(
            "supervise",
            folder,
            *("supervised_main", "/bin/sh", "-c", f"cd {folder}{NEXT_START}", "next-start"),
            *(sys.executable, "-m", "postcopyd", "run"),
            env={
                "PYTHONPATH": path,
                **{f"POSTCOPYD_{key.upper()}": value for key, value in variables.items()},
            },
        )
        stack.push_async_callback(child.process.wait)
        stack.callback(cls._kill, child)
        return cls(child, folder)

    @staticmethod
    def _kill(child: Child) -> None:
        """The daemon follows: its last descriptors are closed with it, whatever state its guests are in."""
        if child.process.returncode is None:
            for task in Path(f"/proc/{child.process.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    child.process.kill()
                    os.kill(int(pid), 9)
            child.process.kill()

    @property
    def daemon_pid(self) -> int:
        """Of the daemon that runs now."""
        pid = self.child.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    @property
    def starts(self) -> int:
        return len((self.folder / "starts").read_text().splitlines())

    async def started(self, times: int) -> None:
        """Return when so many daemons were started. There is nobody to tell."""
        async with asyncio.timeout(PATIENCE_S):
            while self.starts < times:  # noqa: ASYNC110 - another process counts
                await asyncio.sleep(0.02)

    async def call(self, action: Callable[[ControlClient], Awaitable[Answer]]) -> Answer:
        """Ask the daemon; again if it died over the question, or is not there yet."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with ControlClient(self.control) as client:
                        return await action(client)
                except PostcopyError as error:
                    if error.code is not Code.CONTROL_UNREACHABLE:
                        raise
                    assert self.child.process.returncode is None, self.child.failure("it ended")
                    await asyncio.sleep(0.02)

    async def drained(self) -> list[str]:
        """Stop it, which lasts until no guest needs a daemon; return the names of what is still stored then."""
        self.child.process.terminate()
        end = await self.child.line(PATIENCE_S)
        await self.child.process.wait()
        return cast("list[str]", end["held"])


def _write_plan(folder: Path, plan: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "plan").write_text("".join(f"{point}\n" for point in plan))
    (folder / "starts").touch()
