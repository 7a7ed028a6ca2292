"""systemd's protocol against a notification socket of our own."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from postcopyd.errors import ConfigError, InvariantError, KernelError
from postcopyd.sdnotify import Notifier, Watchdog, listen_fds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.address = address

    def receive(self) -> tuple[list[str], list[int]]:
        data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
        fds = array.array("i")
        for _, _, body in ancillary:
            fds.frombytes(body)
        return data.decode().split("\n"), list(fds)

    async def received(self) -> tuple[list[str], list[int]]:
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.socket, arrived.set)
        await arrived.wait()
        loop.remove_reader(self.socket)
        return self.receive()

    def fill(self) -> int:
        """Send until the queue is full, and return the number of messages in it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.connect(self.socket.getsockname())
            count = 0
            try:
                while True:
                    sender.send(b"X=1")
                    count += 1
            except BlockingIOError:
                return count


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = tmp_path / "notify" if request.param == "path" else f"@postcopyd-test-{os.getpid()}"
    manager = Manager(str(name))
    yield manager
    manager.socket.close()


def test_notify_sends_assignments(manager: Manager) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": manager.address})
    assert notifier.notify(READY=1, STATUS="2 migrations\nFDSTORE=1")
    assert manager.receive() == (["READY=1", "STATUS=2 migrations FDSTORE=1"], [])


async def test_without_a_manager_all_is_silent() -> None:
    notifier = Notifier.from_environ({})
    assert not notifier.enabled
    assert not notifier.notify(READY=1)
    await notifier.store("x", [0])
    await notifier.remove("x")
    await notifier.barrier()


async def test_store_passes_duplicates_under_a_name_and_without_polling(manager: Manager) -> None:
    read_end, write_end = os.pipe()
    await Notifier(manager.address).store("vm-1.uffd", [read_end, write_end])
    lines, fds = manager.receive()
    assert lines == ["FDSTORE=1", "FDNAME=vm-1.uffd", "FDPOLL=0"]
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in (read_end, write_end)]
    await Notifier(manager.address).remove("vm-1.uffd")
    assert manager.receive() == (["FDSTOREREMOVE=1", "FDNAME=vm-1.uffd"], [])
    for fd in (*fds, read_end, write_end):
        os.close(fd)


@pytest.mark.parametrize("name", ["", "a:b", "x" * 256, "a\nb", "ü"])
async def test_a_name_that_the_manager_would_lose_is_refused(name: str) -> None:
    with pytest.raises(InvariantError):
        await Notifier("/nowhere").store(name, [0])


async def test_barrier_returns_only_when_the_manager_closed_its_end(manager: Manager) -> None:
    waiting = asyncio.create_task(Notifier(manager.address).barrier(timeout_s=30))
    lines, fds = await manager.received()
    assert lines == ["BARRIER=1"]
    assert len(fds) == 1
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    os.close(fds[0])
    await waiting


async def test_a_barrier_that_nobody_answers_fails(manager: Manager) -> None:
    with pytest.raises(KernelError) as caught:
        await Notifier(manager.address).barrier(timeout_s=0.01)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_store_waits_for_room_instead_of_blocking_the_loop(manager: Manager) -> None:
    queued = manager.fill()
    storing = asyncio.create_task(Notifier(manager.address).store("x", [0]))
    await asyncio.sleep(0)
    assert not storing.done()
    assert not Notifier(manager.address).notify(STATUS="dropped"), "what is of the moment does not wait"
    for _ in range(queued):
        assert manager.receive()[0] == ["X=1"]
    await storing
    lines, fds = manager.receive()
    assert lines[0] == "FDSTORE=1"
    os.close(fds[0])


async def test_a_manager_that_is_gone_fails_a_store_but_not_a_status(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "absent"))
    assert not notifier.notify(STATUS="x")
    with pytest.raises(KernelError) as caught:
        await notifier.store("x", [0])
    assert caught.value.errno == errno.ENOENT


async def test_the_watchdog_is_fed_from_the_loop(manager: Manager) -> None:
    environ = {"WATCHDOG_USEC": "2000", "WATCHDOG_PID": str(os.getpid())}
    watchdog = Watchdog.from_environ(Notifier(manager.address), environ)
    assert watchdog is not None
    assert watchdog.interval_s == 0.001
    task = asyncio.create_task(watchdog.run())
    for _ in range(3):
        assert await manager.received() == (["WATCHDOG=1"], [])
    task.cancel()


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}],
)
def test_no_watchdog_unless_it_is_meant_for_this_process(environ: dict[str, str]) -> None:
    assert Watchdog.from_environ(Notifier("/x"), environ) is None


def test_listen_fds_come_by_name_and_do_not_leak_into_children() -> None:
    first, second = os.pipe()
    os.set_inheritable(first, True)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "vmm"}
    assert listen_fds(environ, start=first) == [(first, "vmm")]
    assert not os.get_inheritable(first)
    del environ["LISTEN_FDNAMES"]
    assert listen_fds(environ, start=first) == [(first, "unknown")]
    assert listen_fds({**environ, "LISTEN_PID": "1"}, start=first) == []
    assert listen_fds({}, start=first) == []
    os.close(first)
    os.close(second)


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_FDS": "x"},
        {"LISTEN_FDS": "-1"},
        {"LISTEN_FDS": "999999"},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},  # descriptor 60000 is not open
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        listen_fds({"LISTEN_PID": str(os.getpid()), **environ}, start=60000)


def test_no_descriptors_is_no_error() -> None:
    assert listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}) == []
