"""`postcopyd supervise`: the daemon is replaced, killed and stopped, and its guests notice nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, Host, LocalGuest, content_of
from postcopyd.errors import Code, PostcopyError
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE
from supervised import Supervised

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from postcopyd.status import MigrationStatus

CONTENT = content_of(1024)
SLOW = Limits(push_rate=PAGE_SIZE)


@dataclass
class Site:
    host: Host
    daemon: Supervised
    address: str

    async def prepare(self, limits: Limits = SLOW) -> MigrationStatus:
        return await self.daemon.call(lambda client: client.prepare("vm", [self.address], limits=limits))

    async def get(self) -> MigrationStatus:
        return await self.daemon.call(lambda client: client.get("vm"))

    async def kill_daemon(self) -> None:
        """And return when the next one answers."""
        starts, pid = self.daemon.starts, self.daemon.daemon_pid
        os.kill(pid, signal.SIGKILL)
        await self.daemon.started(starts + 1)
        await self.daemon.call(lambda client: client.list())


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Host() as host, AsyncExitStack() as stack:
        _, address = await host.page_server(f"vm={host.image('image', CONTENT)}")
        yield Site(host, await Supervised.start(stack, host.folder / "d"), address)


async def test_a_hang_up_replaces_the_daemon_under_a_running_migration(site: Site) -> None:
    prepared = await site.prepare()
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(prepared.socket_path)
        assert await guest.reading(500 * PAGE_SIZE) == CONTENT[500 * PAGE_SIZE : 501 * PAGE_SIZE]
        site.daemon.child.process.send_signal(signal.SIGHUP)
        await site.daemon.started(2)
        assert await guest.reading(900 * PAGE_SIZE) == CONTENT[900 * PAGE_SIZE : 901 * PAGE_SIZE]
        assert await site.daemon.drained() == []
        assert await guest.read_all() == CONTENT


async def test_a_prepared_migration_outlives_the_daemon(site: Site) -> None:
    prepared = await site.prepare(Limits())
    await site.kill_daemon()
    again = await site.get()
    assert (again.state, again.socket_path) == (State.PREPARED, prepared.socket_path)
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(prepared.socket_path)
        assert await guest.read_all() == CONTENT
        assert await site.daemon.drained() == []


async def test_limits_that_were_changed_outlive_the_daemon(site: Site) -> None:
    prepared = await site.prepare()
    changed = Limits(push_rate=3 * PAGE_SIZE, weight=7)
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(prepared.socket_path)
        await site.daemon.call(lambda client: client.set_limits("vm", changed))
        await site.kill_daemon()
        assert (await site.get()).limits == changed
        assert await site.daemon.drained() == []


async def test_a_cancelled_migration_is_not_prepared_again(site: Site) -> None:
    await site.prepare()
    await site.daemon.call(lambda client: client.cancel("vm"))
    await site.kill_daemon()
    with pytest.raises(PostcopyError) as raised:
        await site.get()
    assert raised.value.code is Code.MIGRATION_UNKNOWN


async def test_drain_returns_when_no_guest_needs_the_daemon_and_takes_no_new_one(site: Site) -> None:
    prepared = await site.prepare()
    async with LocalGuest(len(CONTENT)) as guest:
        await guest.hand_off(prepared.socket_path)
        status, out, err = await site.host.cli("drain", "--control", site.daemon.control)
        assert (status, out) == (0, ""), err
        assert (await site.get()).state is State.COMPLETE
        assert await guest.read_all() == CONTENT
    with pytest.raises(PostcopyError) as raised:
        await site.daemon.call(lambda client: client.prepare("vm2", [site.address]))
    assert raised.value.code is Code.MIGRATION_EXISTS


async def test_a_daemon_that_cannot_start_does_not_keep_its_supervisor_from_ending(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        daemon = await Supervised.start(stack, tmp_path, transport="nonsense")
        await daemon.started(2)
        assert await daemon.drained() == []


def test_descriptors_come_back_by_name_newest_first(tmp_path: Path) -> None:
    """Whatever numbers they had, and however many there are."""
    script = """
import os, socket, array, sys
def send(*fields, fds=()):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        sock.sendmsg(["\\n".join(fields).encode()], rights)
names = os.environ["LISTEN_FDNAMES"].split(":") if os.environ["LISTEN_FDS"] != "0" else []
if not names:
    for number in range(40):
        with open(f"f{number}", "w+") as file:
            send("FDSTORE=1", f"FDNAME=f{number}", fds=[file.fileno()])
    send("FDSTOREREMOVE=1", "FDNAME=f7")
    os.kill(os.getpid(), 9)
assert os.environ["LISTEN_PID"] == str(os.getpid())
found = [os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) for fd in range(3, 3 + len(names))]
assert found == names == [f"f{n}" for n in reversed(range(40)) if n != 7], (found, names)
for name in names:
    send("FDSTOREREMOVE=1", f"FDNAME={name}")
os.kill(os.getppid(), 15)
send("READY=1")
"""
    (tmp_path / "child.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "supervised_main", sys.executable, "child.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"held": []' in done.stdout, done.stdout + done.stderr
