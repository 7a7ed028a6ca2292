"""What is measured, and how often. Variants take turns within a repetition, so that drift hits all alike."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import programs
from images import DATA, GIB, HALF, MIB, PAGE, SPARSE, ZERO, Pattern, write_image
from postcopyd.status import Limits, MigrationStatus, State
from programs import BenchError, Percentiles
from rig import VARIANTS, Guest, Rig, Variant, pages_of, read_latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from placement import Placement
    from rig import Touched

THREADS = (1, 8, 32)
PLACEMENTS: tuple[Placement, ...] = ("apart", "together")
MIGRATIONS = (1, 4, 16, 64)
SPARSE_GIB = (1, 4, 16, 64)
FAIR_AMONG = 16
BULK_IMAGES = ("data", "half", "zero")
SAMPLE_S = 0.01
WATCH_S = 0.5
"""Long, as whoever watches costs the daemon time; the final state says itself when it was."""


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    touches: for the latency, a repetition. depth_faults: by 8 and 32 threads together, a repetition.
    latency_mib: memory whose pages are touched in the latency rounds; must hold all of them.
    bulk_mib: what is moved at once; also what all migrations of a growth round have together.
    """

    repetitions: int
    touches: int
    depth_faults: int
    latency_mib: int
    bulk_mib: int

    @property
    def floor_faults(self) -> int:
        return self.touches

    @property
    def pool_mib(self) -> int:
        """More than all that run at once take: a guest for each variant, or the bulk and the processes beside it."""
        return 3 * self.latency_mib + 2 * self.bulk_mib


FULL = Plan(repetitions=7, touches=2000, depth_faults=6400, latency_mib=512, bulk_mib=1024)
QUICK = Plan(repetitions=3, touches=600, depth_faults=3200, latency_mib=128, bulk_mib=256)


@dataclass
class Measured:
    """One value a repetition, by name; and what the pictures are drawn from."""

    percentiles: dict[str, list[Percentiles]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cdf_us: dict[str, list[float]] = field(default_factory=dict)
    timeline: list[tuple[float, float]] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(self.numbers[name])

    def median_us(self, name: str) -> dict[str, float]:
        rows = self.percentiles[name]
        return {
            p: round(statistics.median(getattr(row, p) for row in rows), 1) for p in ("p50", "p90", "p99")
        }


def make_images(folder: Path, plan: Plan) -> dict[str, tuple[Path, Pattern]]:
    """Write the images; return them by id. Growth has ids of its own, as an id is one migration at a time."""
    bulk = {"data": DATA, "half": HALF, "zero": ZERO}
    images: dict[str, tuple[Path, Pattern]] = {}
    for id, pattern in bulk.items():
        write_image(folder / id, plan.bulk_mib * MIB, pattern)
        images[id] = (folder / id, pattern)
    write_image(folder / "latency", plan.latency_mib * MIB, DATA)
    images["latency"] = (folder / "latency", DATA)
    for gib in SPARSE_GIB:
        write_image(folder / f"sparse{gib}", gib * GIB, SPARSE)
        images[f"sparse{gib}"] = (folder / f"sparse{gib}", SPARSE)
    for id in growth_ids(max(MIGRATIONS)):
        images[id] = images["data"]
    return images


def growth_ids(count: int) -> list[str]:
    return [f"growth{number}" for number in range(count)]


def in_turns(variants: Sequence[Variant], repetition: int) -> Iterator[Variant]:
    """Another one goes first each time."""
    for index in range(len(variants)):
        yield variants[(index + repetition) % len(variants)]


class Scenarios:
    """Runs them one after the other into `measured`. `say` gets a line of progress."""

    def __init__(self, rig: Rig, plan: Plan, say: Callable[[str], None]) -> None:
        self.measured = Measured()
        self._rig = rig
        self._plan = plan
        self._say = say
        self._native = rig.variants["native"]
        self._variants = [rig.variants[name] for name in VARIANTS]

    async def run(self) -> Measured:
        await self.demand()
        await self.busy()
        await self.bulk()
        self._note_memory()
        await self.timeline()
        await self.growth()
        await self.fairness()
        await self.sparse()
        return self.measured

    async def demand(self) -> None:
        """Latency of one thread, and the rate of several, while the push waits."""
        pages = pages_of(self._plan.latency_mib)
        async with AsyncExitStack() as stack:
            guests = {
                variant.name: await stack.enter_async_context(variant.paused(self._rig, "latency", pages))
                for variant in self._variants
            }
            for guest in guests.values():
                await guest.touch(1, 100)
            for repetition in range(self._plan.repetitions):
                await self._floor()
                for variant in in_turns(self._variants, repetition):
                    for placement in PLACEMENTS:
                        await self._latency_round(variant, guests[variant.name], placement)
                    await self._depth_round(variant.name, guests[variant.name])
                self._say(f"demand {repetition + 1}/{self._plan.repetitions}")
        for name in VARIANTS:
            self._keep_cdf(f"{name}.apart", name)

    async def _floor(self) -> None:
        percentiles = self.measured.percentiles
        for placement in PLACEMENTS:
            found = await programs.floor(self._plan.floor_faults, placement)
            percentiles[f"floor.{placement}"].append(found.fault_us)
            percentiles[f"floor_round_trip.{placement}"].append(found.round_trip_us)
            percentiles[f"floor_local_fault.{placement}"].append(found.local_fault_us)
        for threads in THREADS:
            rate = await programs.local("pages", threads, self._plan.depth_faults)
            self.measured.numbers[f"pages_s.{threads}.local_c"].append(rate)
            rate = await programs.remote(threads, self._plan.depth_faults)
            self.measured.numbers[f"pages_s.{threads}.floor"].append(rate)

    async def _latency_round(self, variant: Variant, guest: Guest, placement: Placement) -> None:
        name = f"{variant.name}.{placement}"
        with variant.placed(placement, guest):
            touched = await guest.touch(1, self._plan.touches, self._raw(name))
        check_faults(name, touched, self._plan.touches)
        self.measured.percentiles[name].append(touched.us)
        if placement == "apart":
            self.measured.numbers[f"pages_s.1.{variant.name}"].append(touched.pages_s)

    async def _depth_round(self, name: str, guest: Guest) -> None:
        """Nothing is placed: all share all CPUs."""
        for threads in THREADS[1:]:
            each = self._plan.depth_faults // threads
            touched = await guest.touch(threads, each)
            check_faults(name, touched, threads * each)
            self.measured.numbers[f"pages_s.{threads}.{name}"].append(touched.pages_s)

    async def busy(self) -> None:
        """Latency while the push takes all it can get."""
        pages = pages_of(self._plan.bulk_mib)
        for repetition in range(self._plan.repetitions):
            async with self._native.paused(self._rig, "data", pages) as guest:
                await self._native.client.set_limits("data", Limits())
                # More than can be touched in that time: it ends when every page is there.
                with self._native.placed("between", guest):
                    touched = await guest.touch(1, pages // 4, self._raw("native_busy"))
                await self._native.until_state("data", State.COMPLETE)
                await guest.ask("check")
            if touched.faults == 0:
                raise BenchError("the push left no page to touch")
            self.measured.percentiles["native_busy"].append(touched.us)
            self.measured.numbers["busy_faults"].append(touched.faults)
            self._say(f"busy {repetition + 1}/{self._plan.repetitions}")
        self._keep_cdf("native_busy", "native_busy")

    async def bulk(self) -> None:
        """The whole image pushed, nothing touched; CPU time of both sides for random data."""
        pages = pages_of(self._plan.bulk_mib)
        for repetition in range(self._plan.repetitions):
            rate = await programs.local("copy", self._plan.bulk_mib)
            self.measured.numbers["bulk.data.local_c"].append(rate)
            for image in BULK_IMAGES:
                for variant in in_turns(self._variants, repetition):
                    await self._bulk_round(variant, image, pages)
            self._say(f"bulk {repetition + 1}/{self._plan.repetitions}")

    async def _bulk_round(self, variant: Variant, image: str, pages: int) -> None:
        before = variant.usage()
        status = await variant.move(self._rig, image, pages)
        after = variant.usage()
        numbers = self.measured.numbers
        numbers[f"bulk.{image}.{variant.name}"].append(self._plan.bulk_mib / status.elapsed_s)
        if image == "data":
            gib = self._plan.bulk_mib / 1024
            for side, b, a in zip(("daemon", "page_server"), before, after, strict=True):
                numbers[f"cpu.{side}.{variant.name}"].append((a.cpu_s - b.cpu_s) / gib)

    def _note_memory(self) -> None:
        for variant in self._variants:
            for side, usage in zip(("daemon", "page_server"), variant.usage(), strict=True):
                for what in ("rss", "peak", "anonymous"):
                    value = getattr(usage, f"{what}_mib")
                    self.measured.numbers[f"{what}.{side}.{variant.name}"].append(value)

    async def timeline(self) -> None:
        """How residency grows in one push with a thread that touches."""
        pages = pages_of(self._plan.bulk_mib)
        async with self._native.paused(self._rig, "data", pages) as guest:
            began = time.monotonic()
            await self._native.client.set_limits("data", Limits())
            touching = asyncio.ensure_future(guest.touch(1, pages // 4))

            def note(status: MigrationStatus) -> bool:
                share = status.pages_installed / status.pages_total
                self.measured.timeline.append((round(time.monotonic() - began, 4), round(share, 4)))
                return status.state is State.COMPLETE

            await self._native.until("data", note, SAMPLE_S)
            await touching

    async def growth(self) -> None:
        """The same bytes in one migration, and spread over many at once."""
        for repetition in range(self._plan.repetitions):
            for count in MIGRATIONS:
                await self._growth_round(count)
            self._say(f"growth {repetition + 1}/{self._plan.repetitions}")

    async def _growth_round(self, count: int) -> None:
        pages = pages_of(self._plan.bulk_mib // count)
        async with AsyncExitStack() as stack:
            ids = growth_ids(count)
            guests = [
                await stack.enter_async_context(self._native.paused(self._rig, id, pages)) for id in ids
            ]
            spans = await asyncio.gather(*(self._let_push(id) for id in ids))
            await asyncio.gather(*(guest.ask("check") for guest in guests))
        took_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
        self.measured.numbers[f"growth.{count}"].append(pages * count * PAGE / MIB / took_s)

    async def _let_push(self, id: str) -> tuple[float, float]:
        """Let a migration go; return when it began and when it was complete.

        The daemon's own clock says how long it took, so that nobody need ask it again and again.
        """
        before = await self._native.client.set_limits(id, Limits())
        began = time.monotonic()
        after = await self._native.until_state(id, State.COMPLETE, WATCH_S)
        return began, began + after.elapsed_s - before.elapsed_s

    async def fairness(self) -> None:
        """What each of several equal migrations was brought when half of all was there."""
        pages = pages_of(self._plan.bulk_mib // FAIR_AMONG)
        ids = growth_ids(FAIR_AMONG)
        for repetition in range(self._plan.repetitions):
            async with AsyncExitStack() as stack:
                for id in ids:
                    await stack.enter_async_context(self._native.paused(self._rig, id, pages))
                # The first to be let go would be done before the last: so all are, and then the source may answer.
                with self._native.source_stopped():
                    await asyncio.gather(*(self._native.client.set_limits(id, Limits()) for id in ids))
                samples = await self._installed_until_complete(ids)
            self.measured.numbers["jain"].append(jain_at_half(samples, pages))
            self._say(f"fairness {repetition + 1}/{self._plan.repetitions}")

    async def _installed_until_complete(self, ids: Sequence[str]) -> list[list[int]]:
        """Pages that each migration has, again and again until all are complete."""
        samples: list[list[int]] = []
        while True:
            statuses = [status for status in await self._native.client.list() if status.id in ids]
            samples.append([status.pages_installed for status in statuses])
            if all(status.state.is_final for status in statuses):
                return samples
            await asyncio.sleep(SAMPLE_S)

    async def sparse(self) -> None:
        """Large guests that have used little: the holes are learned, not moved."""
        for repetition in range(self._plan.repetitions):
            for gib in SPARSE_GIB:
                status = await self._native.move(self._rig, f"sparse{gib}", pages_of(gib * 1024), cold=True)
                self.measured.numbers[f"sparse.{gib}"].append(status.elapsed_s)
            self._say(f"sparse {repetition + 1}/{self._plan.repetitions}")

    def _raw(self, name: str) -> Path:
        return self._rig.folder / f"{name}.ns"

    def _keep_cdf(self, raw: str, name: str) -> None:
        """The latencies at 0, 0.5, … 100 %."""
        ns = read_latencies(self._raw(raw))
        self.measured.cdf_us[name] = [round(ns[(len(ns) - 1) * i // 200] / 1000, 1) for i in range(201)]


def check_faults(name: str, touched: Touched, touches: int) -> None:
    """Without faults there is nothing to say, and a median of nothing looks like a record. Raises BenchError."""
    if touched.faults < touches * 0.8:
        raise BenchError(f"{name}: {touched.faults} of {touches} touches were faults")


def jain(shares: Sequence[float]) -> float:
    """1 when all are equal, 1/n when one has all. Source: Jain, Chiu, Hawe 1984."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def jain_at_half(samples: Sequence[Sequence[int]], pages: int) -> float:
    """Fairness when half of all was there. samples: pages installed by each; pages: what each needs."""
    half = pages * len(samples[0]) / 2
    return jain(min(samples, key=lambda installed: abs(sum(installed) - half)))
