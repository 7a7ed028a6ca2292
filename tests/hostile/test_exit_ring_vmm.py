"""VMMs whose exit ring lies, before a running daemon that has a good guest in progress all the while."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import urllib.request
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from exit_vmm import (
    ARMED_AT,
    DESCRIPTORS,
    DONE_HEAD,
    DONE_TAIL,
    FAULT_HEAD,
    HEADER_BYTES,
    LANE_BYTES,
    LANE_OFFSET,
    PENDING_AT,
    RESOLVED,
    SEALS,
    ExitGuest,
    RingMemory,
)
from harness import PATIENCE_S, DaemonProcess, Host, LocalGuest, content_of
from postcopyd.errors import Code
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from typing import Protocol

    class Lie(Protocol):
        def __call__(self, guest: ExitGuest) -> None: ...


PAGES = 512
CONTENT = content_of(PAGES)
VCPUS = 2
HELD = Limits(push_rate=1)
STORM_BATCHES = 2000
STORM_WRITES = 20000
ROOM_BYTES = 64 << 20


@pytest.fixture(scope="module")
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


@dataclass
class Setting:
    """A daemon that serves a healthy guest slowly, and migrations for whoever lies to it."""

    daemon: DaemonProcess
    source: str
    http: str

    async def prepare(self, id: str) -> str:
        """Return the socket path of a migration whose push waits."""
        return (await self.daemon.client.prepare(id, [self.source], limits=HELD)).socket_path

    async def refused(self) -> int:
        """Hand-offs refused so far because of their ring, as the metrics tell."""

        def fetch() -> str:
            with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=PATIENCE_S) as answer:
                text: str = answer.read().decode()
                return text

        for line in (await asyncio.to_thread(fetch)).splitlines():
            if line.startswith(f'postcopyd_handoff_errors_total{{code="{Code.EXIT_RING_BROKEN}"'):
                return int(float(line.rsplit(" ", 1)[1]))
        return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    """At its end a guest that was in progress all the while gets every byte, and the daemon has not grown."""
    async with Host() as host, LocalGuest(len(CONTENT)) as guest:
        image = host.image("image", CONTENT)
        _, source = await host.page_server(*(f"{id}={image}" for id in ("healthy", "bad", *MIGRATIONS)))
        http = f"127.0.0.1:{free_port()}"
        daemon = await host.daemon(http=http)
        healthy = await daemon.client.prepare("healthy", [source], limits=HELD)
        await guest.hand_off(healthy.socket_path)
        assert await guest.reading(100 * PAGE_SIZE) == CONTENT[100 * PAGE_SIZE : 101 * PAGE_SIZE]
        before = daemon.memory_bytes()
        yield Setting(daemon, source, http)
        status = await daemon.client.get("healthy")
        assert (status.state, status.error) == (State.RUNNING, "")
        await daemon.client.set_limits("healthy", Limits())
        assert await guest.read_all() == CONTENT
        await daemon.until_state("healthy", State.COMPLETE)
        assert daemon.memory_bytes() < before + ROOM_BYTES
        # Told to stop, it would wait for the liars' guests.
        daemon.child.process.kill()


# -- rings that are refused at the hand-off

# `size` and `seals` are the memfd's, the others fields of its header.
UNSOUND: dict[str, dict[str, int]] = {
    "shorter than a header": {"size": HEADER_BYTES - 256},
    "shorter than its header says": {"total_bytes": 1 << 30},
    "not sealed": {"seals": 0},
    "another magic": {"magic": 0x1122334455667788},
    "a later version": {"version": 2},
    "a feature nobody knows": {"features": 1 | 1 << 40},
    "no vCPU": {"vcpus": 0},
    "four thousand million vCPUs": {"vcpus": 0xFFFFFFFF},
    "lanes of nothing": {"lane_bytes": 0},
    "lanes that end behind the file": {"lane_offset": 1 << 20},
    "lanes that wrap around": {"lane_offset": (1 << 64) - 64},
    "lanes over the header": {"lane_offset": 0},
    "another number of entries": {"entries": 1 << 31},
    "residency over the lanes": {"residency_offset": LANE_OFFSET},
    "residency without end": {"residency_pages": (1 << 64) - 1},
}


async def test_a_ring_that_is_not_sound_is_refused_and_harms_nobody(setting: Setting) -> None:
    path = await setting.prepare("bad")
    for count, (name, lies) in enumerate(UNSOUND.items()):
        async with ExitGuest(len(CONTENT), unsound_ring(**lies)) as liar:
            assert await liar.hand_off_with_ring(path) == b"", name
        assert await setting.refused() == count + 1, name
        assert (await setting.daemon.client.get("bad")).state is State.PREPARED, name


def unsound_ring(*, size: int = 0, seals: int = SEALS, **lies: int) -> RingMemory:
    return RingMemory(VCPUS, PAGES, size=size, seals=seals, lies=lies)


@contextmanager
def other_descriptors() -> Iterator[dict[str, int]]:
    """What is no eventfd and what is no memfd, by name."""
    ours, theirs = os.pipe()
    found = {
        "a pipe": ours,
        "a file": os.memfd_create("file"),
        "a device": os.open("/dev/zero", os.O_RDWR),
    }
    try:
        yield found
    finally:
        for fd in (theirs, *found.values()):
            os.close(fd)


async def test_what_is_neither_ring_nor_doorbell_is_refused(setting: Setting) -> None:
    path = await setting.prepare("bad")
    with other_descriptors() as others:
        for name, fd in others.items():
            for as_ring in (True, False):
                async with ExitGuest(len(CONTENT), RingMemory(VCPUS, PAGES)) as liar:
                    pair = [fd, liar.ring.doorbell] if as_ring else [liar.ring.fd, fd]
                    answer = await liar.hand_off_with_ring(path, fds=[liar.uffd.fileno(), *pair])
                    assert answer == b"", (name, as_ring)
    assert await setting.refused() == 6


async def test_half_a_ring_is_refused(setting: Setting) -> None:
    path = await setting.prepare("bad")
    for missing in DESCRIPTORS[1:]:
        names = [name for name in DESCRIPTORS if name != missing]
        async with ExitGuest(len(CONTENT), RingMemory(VCPUS, PAGES)) as liar:
            left = liar.ring.doorbell if missing == "exit_ring" else liar.ring.fd
            fds = [liar.uffd.fileno(), left]
            assert await liar.hand_off_with_ring(path, fds=fds, descriptors=names) == b"", missing
    assert await setting.refused() == 2


# -- rings that turn bad


def lane_word(field: int, value: int) -> Lie:
    def lie(guest: ExitGuest) -> None:
        guest.ring.put(guest.ring.lane(1, field), value)
        guest.ring.ring()

    return lie


def fault(offset_pages: int = 0, add: int = 0, **entry: int) -> Lie:
    def lie(guest: ExitGuest) -> None:
        guest.ring.post(1, [guest.gpa_of(offset_pages) + add], **entry)

    return lie


def another_sequence(guest: ExitGuest) -> None:
    ring = guest.ring
    ring.write_fault(1, 16, guest.gpa_of(1))
    ring.put(ring.lane(1, FAULT_HEAD), 1)
    ring.ring()


def a_lane_that_is_not_there(guest: ExitGuest) -> None:
    guest.ring.put(PENDING_AT + 8, 1 << 20)
    os.eventfd_write(guest.ring.doorbell, 1)


def more_than_a_lane_holds(guest: ExitGuest) -> None:
    """The answers are never taken, and faults go on."""
    guest.ring.post(1, [guest.gpa_of(page) for page in range(10)])
    guest.ring.post(1, [guest.gpa_of(page) for page in range(10, 20)])


LIES: dict[str, Lie] = {
    "faults jump ahead": lane_word(FAULT_HEAD, 17),
    "faults jump back": lane_word(FAULT_HEAD, -1),
    "answers let go that were not given": lane_word(DONE_TAIL, 1),
    "more faults than a lane holds": more_than_a_lane_holds,
    "a gpa below memory": fault(-1),
    "a gpa behind memory": fault(PAGES),
    "a gpa at the end of the world": fault(add=(1 << 63)),
    "a gpa within a page": fault(add=8),
    "another vCPU's name": fault(named=0),
    "a vCPU that was not announced": fault(named=VCPUS),
    "flags nobody knows": fault(flags=1 << 31),
    "another sequence": another_sequence,
    "a lane that is not there": a_lane_that_is_not_there,
}


MIGRATIONS = [f"bad-{n}" for n in range(len(LIES))]


async def test_a_ring_that_turns_bad_ends_its_session_alone(setting: Setting) -> None:
    for id, (name, lie) in zip(MIGRATIONS, LIES.items(), strict=True):
        async with attached(setting, id) as liar:
            lie(liar)
            ended = await setting.daemon.until(id, lambda status: status.state is State.FAILED)
            assert ended.error_code == Code.EXIT_RING_BROKEN, name


@asynccontextmanager
async def attached(setting: Setting, id: str = "bad") -> AsyncIterator[ExitGuest]:
    """A VMM whose ring is served, as it has seen."""
    path = await setting.prepare(id)
    async with ExitGuest(len(CONTENT), RingMemory(VCPUS, PAGES)) as guest:
        assert await guest.hand_off_with_ring(path) == b"\x01"
        guest.ring.post(0, [guest.gpa_of(300)])
        assert await guest.answers(0) == [RESOLVED]
        yield guest


async def test_faults_without_end_are_answered_and_starve_nobody(setting: Setting) -> None:
    """The same pages again and again: a page is fetched once, whatever is posted."""

    def storm(guest: ExitGuest) -> None:
        for _ in range(STORM_BATCHES):
            guest.ring.post(1, [guest.gpa_of(400 + page) for page in range(16)])
            assert guest.ring.sleep_until_woken(1) == [RESOLVED] * 16

    async with attached(setting) as liar:
        storming = asyncio.create_task(asyncio.to_thread(storm, liar))
        # The other guest's session goes on meanwhile.
        status = await setting.daemon.client.get("healthy")
        assert status.state is State.RUNNING
        await storming
        after = await setting.daemon.client.get("bad")
        assert (after.state, after.error) == (State.RUNNING, "")
        assert after.exits == STORM_BATCHES * 16 + 1
        assert after.pages_demand + after.pages_pushed + after.pages_zero <= PAGES


async def test_answers_that_nobody_takes_keep_nothing_from_the_others(setting: Setting) -> None:
    async with attached(setting) as liar:
        liar.ring.post(1, [liar.gpa_of(page) for page in range(16)])
        await setting.daemon.until("bad", lambda status: status.exits == 17 and status.waiting == 0)
        assert liar.ring.answered(1) == 16
        # Nor from its own session.
        await setting.daemon.client.set_limits("bad", Limits())
        await setting.daemon.until_state("bad", State.COMPLETE)
        assert await liar.read_all() == CONTENT


def shared_words(ring: RingMemory) -> list[int]:
    """Every word that steers, of the header and of all lanes."""
    fields = (FAULT_HEAD, DONE_TAIL, DONE_HEAD, 8, 64, 128)
    lanes = [LANE_OFFSET + vcpu * LANE_BYTES + field for vcpu in range(ring.vcpus) for field in fields]
    return [*lanes, ARMED_AT, PENDING_AT, PENDING_AT + 4]


async def test_counters_written_while_they_are_read_break_their_own_session_at_most(setting: Setting) -> None:
    def scribble(guest: ExitGuest, seed: int) -> None:
        chance, places = random.Random(seed), shared_words(guest.ring)
        for _ in range(STORM_WRITES):
            small = chance.randrange(4)
            guest.ring.put(chance.choice(places), small if chance.random() < 0.9 else chance.getrandbits(32))
            if chance.random() < 0.1:
                guest.ring.ring()

    async with attached(setting) as liar:
        writers = [threading.Thread(target=scribble, args=(liar, seed)) for seed in range(2)]
        for writer in writers:
            writer.start()
        await asyncio.gather(*(asyncio.to_thread(writer.join) for writer in writers))
        ended = await setting.daemon.until("bad", lambda status: status.state is State.FAILED)
        assert ended.error_code == Code.EXIT_RING_BROKEN


async def test_a_doorbell_that_is_always_rung_starves_nobody(setting: Setting) -> None:
    """The eventfd is full and the VMM reads it back, so the daemon finds it readable for ever."""
    quit_ringing = threading.Event()

    def ring(fd: int) -> None:
        while not quit_ringing.is_set():
            os.eventfd_write(fd, 1)

    async with attached(setting) as liar:
        ringer = threading.Thread(target=ring, args=(liar.ring.doorbell,))
        ringer.start()
        try:
            for _ in range(5):
                status = await setting.daemon.client.get("healthy")
                assert status.state is State.RUNNING
            liar.ring.post(1, [liar.gpa_of(7)])
            assert await liar.answers(1) == [RESOLVED]
        finally:
            quit_ringing.set()
            ringer.join()
