"""The listening socket: who may be there already, who may connect, and what happens to each who does."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from postcopyd.errors import Code, ConfigError, HandoffError, MigrationError, SourceError
from postcopyd.handoff import Handoff, HandoffListener
from postcopyd.handoff import socket as listening
from support_handoff import FIRECRACKER_1_12, FRAMED, advance_clock, drained, no_descriptor_left, send
from support_uffd import open_uffd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from postcopyd.handoff.socket import OnFailure, OnHandoff

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")


@pytest.fixture
def uffd() -> Iterator[int]:
    fd = open_uffd()
    yield fd
    os.close(fd)


@pytest.fixture
def path() -> Iterator[Path]:
    """Short enough for a UNIX socket; its directory does not exist."""
    with tempfile.TemporaryDirectory(prefix="pc") as directory:
        yield Path(directory) / "vmm" / "handoff.sock"


@asynccontextmanager
async def serving(
    listener: HandoffListener, on_handoff: OnHandoff, on_failure: OnFailure | None = None
) -> AsyncIterator[None]:
    listener.open()
    task = asyncio.create_task(listener.serve(on_handoff, on_failure))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        listener.close()


def connect(path: Path) -> socket.socket:
    vmm = socket.socket(socket.AF_UNIX)
    vmm.connect(str(path))
    return vmm


async def end_of_file(vmm: socket.socket) -> bytes:
    vmm.setblocking(False)
    return await asyncio.get_running_loop().sock_recv(vmm, 16)


async def test_two_vmms_of_two_formats_hand_over_on_one_socket(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    with no_descriptor_left():
        async with serving(HandoffListener(path), handoffs.put):
            with connect(path) as one, connect(path) as two:
                send(one, FIRECRACKER_1_12, [uffd])
                send(two, FRAMED, [uffd])
                names = set()
                for _ in range(2):
                    with await handoffs.get() as handoff:
                        names.add(handoff.format_name)
                assert names == {"firecracker-1.12", "framed"}


async def test_a_silent_client_delays_no_other(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    async with serving(HandoffListener(path, timeout_s=60), handoffs.put):
        with connect(path), connect(path) as vmm:
            send(vmm, FRAMED, [uffd])
            (await handoffs.get()).close()


async def test_a_failure_is_told_and_the_next_vmm_is_served(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    failures: asyncio.Queue[HandoffError] = asyncio.Queue()
    async with serving(HandoffListener(path), handoffs.put, failures.put_nowait):
        with connect(path) as noise, connect(path) as vmm:
            send(noise, b"GET / HTTP/1.1\r\n\r\n")
            assert (await failures.get()).code is Code.HANDOFF_UNKNOWN_FORMAT
            # Reset or end-of-file: what was sent may have been read only in part.
            assert await end_of_file(noise) == b""
            send(vmm, FRAMED, [uffd])
            (await handoffs.get()).close()


async def test_silent_clients_in_every_slot_end_by_time_out_and_let_a_vmm_in(
    path: Path, uffd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    failures: asyncio.Queue[HandoffError] = asyncio.Queue()
    listener = HandoffListener(path, timeout_s=1000, backlog=64)
    async with serving(listener, handoffs.put, failures.put_nowait):
        silent = [connect(path) for _ in range(listening.MAX_RECEIVING)]
        for sock in silent:
            send(sock, b"[")
            await drained(sock)
        with connect(path) as vmm:
            send(vmm, FRAMED, [uffd])
            await asyncio.sleep(0)
            assert handoffs.empty()
            advance_clock(monkeypatch, 1001)
            assert {(await failures.get()).code for _ in silent} == {Code.HANDOFF_TIMEOUT}
            (await handoffs.get()).close()
        for sock in silent:
            sock.close()


async def test_a_handoff_that_the_session_refuses_is_closed_without_an_answer(path: Path, uffd: int) -> None:
    async def refuse(handoff: Handoff) -> None:
        raise SourceError(Code.SOURCE_UNREACHABLE, "no source answers")

    with no_descriptor_left():
        async with serving(HandoffListener(path), refuse):
            with connect(path) as vmm:
                send(vmm, FRAMED, [uffd])
                assert await end_of_file(vmm) == b""


async def test_a_bug_met_by_one_vmm_is_logged_and_the_next_is_served(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()

    async def broken_for_firecracker(handoff: Handoff) -> None:
        await handoffs.put({"framed": handoff}[handoff.format_name])

    with no_descriptor_left(), capture_logs() as logs:
        async with serving(HandoffListener(path), broken_for_firecracker):
            with connect(path) as one, connect(path) as two:
                send(one, FIRECRACKER_1_12, [uffd])
                assert await end_of_file(one) == b""
                send(two, FRAMED, [uffd])
                (await handoffs.get()).close()
    assert [entry["log_level"] for entry in logs if entry["event"] == "handoff.broken"] == ["error"]


async def test_a_handoff_that_was_passed_on_survives_the_end_of_listening(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()

    async def never_returns(handoff: Handoff) -> None:
        await handoffs.put(handoff)
        await asyncio.Event().wait()

    async with serving(HandoffListener(path), never_returns):
        with connect(path) as vmm:
            send(vmm, FRAMED, [uffd])
            handoff = await handoffs.get()
    assert handoff.uffd.is_open
    handoff.close()


async def test_cancelling_closes_what_is_being_received(path: Path, uffd: int) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    with no_descriptor_left(), socket.socket(socket.AF_UNIX) as early:
        listener = HandoffListener(path)
        async with serving(listener, handoffs.put):
            early.connect(str(path))
            send(early, FRAMED[:20], [uffd])
            with connect(path) as vmm:
                send(vmm, FRAMED, [uffd])
                (await handoffs.get()).close()
        assert await end_of_file(early) == b""


async def test_without_a_descriptor_to_spare_accepting_goes_on_later(
    path: Path, uffd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handoffs: asyncio.Queue[Handoff] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    accept = loop.sock_accept
    failing = iter([OSError(24, "EMFILE"), OSError(12, "ENOMEM")])

    async def accept_later(sock: socket.socket) -> tuple[socket.socket, object]:
        for error in failing:
            raise error
        return await accept(sock)

    monkeypatch.setattr(loop, "sock_accept", accept_later)
    monkeypatch.setattr(listening, "_ACCEPT_BACKOFF_S", 0)
    async with serving(HandoffListener(path), handoffs.put):
        with connect(path) as vmm:
            send(vmm, FRAMED, [uffd])
            (await handoffs.get()).close()


@pytest.mark.parametrize(("mode", "directory_mode"), [(0o600, 0o700), (0o620, 0o710)])
def test_the_socket_has_its_mode_and_its_new_directory_lets_no_other_pass(
    path: Path, mode: int, directory_mode: int
) -> None:
    listener = HandoffListener(path, mode=mode)
    listener.open()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE(path.parent.stat().st_mode) == directory_mode
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_socket_left_by_a_crash_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
        crashed.listen()
    listener = HandoffListener(path)
    listener.open()
    connect(path).close()
    listener.close()


@pytest.mark.parametrize("full", [False, True], ids=["idle", "backlog full"])
def test_a_socket_that_somebody_listens_on_is_left_alone(path: Path, full: bool) -> None:
    first = HandoffListener(path, backlog=0)
    first.open()
    waiting = [connect(path)] if full else []
    second = HandoffListener(path)
    with pytest.raises(MigrationError) as caught:
        second.open()
    assert caught.value.code is Code.MIGRATION_EXISTS
    second.close()
    assert path.exists()
    for sock in waiting:
        sock.close()
    first.close()


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        HandoffListener(path).open()
    assert path.read_text() == "precious"


def test_closing_does_not_remove_a_successors_socket(path: Path) -> None:
    old, new = HandoffListener(path), HandoffListener(path)
    old.open()
    path.unlink()
    new.open()
    old.close()
    connect(path).close()
    new.close()


def test_a_path_of_107_bytes_fits_and_one_more_is_refused_with_the_limit(path: Path) -> None:
    longest = path.parent.parent / ("x" * (107 - len(str(path.parent.parent)) - 1))
    fits = HandoffListener(longest)
    fits.open()
    fits.close()
    with pytest.raises(ConfigError, match="at most 107"):
        HandoffListener(f"{longest}x").open()


@pytest.mark.parametrize("directory", ["/proc/nowhere", "/dev/null"])
def test_a_place_where_no_socket_can_be_is_the_operators_error(directory: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen for VMMs"):
        HandoffListener(f"{directory}/s").open()
