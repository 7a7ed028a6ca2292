"""Deals faults to guests that arrive, until all have happened."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos import faults
from chaos.faults import Scene
from chaos.host import DestinationHost, Guest
from chaos.network import Direction, Network
from chaos.pool import exhaust_huge_pages
from chaos.source import Source
from chaos.tally import Tally
from harness import Host
from postcopyd.status import Limits
from postcopyd.units import MIB, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.faults import Fault

IDS = tuple(f"guest{number}" for number in range(1, 200))
"""One image under many names: a name each for the guests that arrive."""


@dataclass(frozen=True)
class Plan:
    """How often what happens, to guests of how many MiB of which the last `spare_mib` are left alone by them."""

    kills: int
    restarts: int
    cuts: tuple[float, ...]
    hangs: int
    source_kills: int
    other_images: int
    full_tables: int
    full_disks: int
    short_pools: int
    memory_mib: int
    spare_mib: int
    hand: int = 8

    def deck(self, chance: random.Random) -> list[Fault]:
        directions = list(Direction)
        deck: list[Fault] = [
            *[faults.kill_daemon] * self.kills,
            *[faults.restart_daemon] * self.restarts,
            *(faults.cut(directions[at % 3], seconds) for at, seconds in enumerate(self.cuts)),
            *[faults.hang_daemon] * self.hangs,
            *[faults.kill_source] * self.source_kills,
            *[faults.serve_another_image] * self.other_images,
            *[faults.exhaust_descriptors] * self.full_tables,
            *[faults.fill_the_logs_disk] * self.full_disks,
        ]
        chance.shuffle(deck)
        return deck


LONG = Plan(
    kills=220,
    restarts=52,
    cuts=(1, 2, 7, 1, 3, 9, 1, 2, 4, 1, 7, 2, 1, 20, 1, 3, 6.5, 2, 1, 5, 1, 2),
    hangs=3,
    source_kills=12,
    other_images=4,
    full_tables=4,
    full_disks=2,
    short_pools=2,
    memory_mib=384,
    spare_mib=64,
)
SHORT = Plan(
    kills=12,
    restarts=3,
    cuts=(1, 7, 2),
    hangs=1,
    source_kills=2,
    other_images=1,
    full_tables=1,
    full_disks=1,
    short_pools=1,
    memory_mib=96,
    spare_mib=16,
)


class Chaos:
    """One run. `say` gets a line for people now and then."""

    def __init__(self, plan: Plan, seed: int, folder: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._random = random.Random(seed)
        self._folder = folder
        self._say = say
        self._made = 0
        self.tally = Tally()
        guest = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "process"
        self._shape = (
            *("--memory", f"{plan.memory_mib}M", "--spare", f"{plan.spare_mib}M"),
            *("--vcpus", "1", "--order", "random", "--guest", guest),
        )

    async def run(self) -> Tally:
        async with AsyncExitStack() as stack:
            files = await stack.enter_async_context(Host())
            steps = (self._plan.memory_mib - self._plan.spare_mib) * MIB // PAGE_SIZE // 2
            self._files = await files.paused_source(*self._shape, steps=steps)
            self._other_image = files.image("other", os.urandom(MIB) * self._plan.memory_mib)
            self._network = await stack.enter_async_context(Network())
            self._host = await stack.enter_async_context(
                DestinationHost(self._folder, self._network.destination)
            )
            await self._host.start()
            self._source = Source(self._network, self._folder, self._files[0], IDS)
            stack.push_async_callback(self._source.kill)
            await self._source.start()
            deck = self._plan.deck(self._random)
            while deck:
                await self._one_guest(deck)
            for _ in range(self._plan.short_pools):
                await exhaust_huge_pages(self._host, self._new_id(), self._files[0], self.tally)
        return self.tally

    def _new_id(self) -> str:
        self._made += 1
        return IDS[self._made - 1]

    async def _one_guest(self, deck: list[Fault]) -> None:
        """A guest arrives; things go wrong for as long as it needs its memory, or until it had its share."""
        began = time.monotonic()
        limits = Limits(push_rate=self._random.choice((MIB, 4 * MIB, 16 * MIB)))
        guest = await Guest.arrive(self._host, self._new_id(), self._shape, self._files, limits)
        spare = range((self._plan.memory_mib - self._plan.spare_mib) * MIB, self._plan.memory_mib * MIB)
        scene = Scene(
            self._host, self._network, self._source, guest, self.tally, self._random, self._other_image, spare
        )
        async with AsyncExitStack() as stack:
            done = asyncio.Event()
            async with asyncio.TaskGroup() as meanwhile:
                if self._random.random() < 0.5:
                    meanwhile.create_task(faults.remove_until(scene, done))
                if self._random.random() < 0.3:
                    rate = self._random.choice((4 * MIB, 16 * MIB))
                    await stack.enter_async_context(self._network.slow(rate))
                try:
                    for _ in range(self._plan.hand):
                        if not deck or not await guest.is_arriving():
                            break
                        await deck.pop()(scene)
                finally:
                    done.set()
        await guest.finish(self.tally)
        self._say(
            f"guest {self._made}: {time.monotonic() - began:.1f} s, {len(deck)} faults to come, "
            f"lost {self.tally.losses}"
        )
