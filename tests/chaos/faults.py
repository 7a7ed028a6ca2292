"""What can go wrong, one function each. A fault returns when its cause is over, not when the daemon has recovered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos.host import PATIENCE_S, UNIT
from postcopyd.errors import Code
from postcopyd.status import State
from postcopyd.units import PAGE_SIZE

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from chaos.host import DestinationHost, Guest
    from chaos.network import Direction, Network
    from chaos.source import Source
    from chaos.tally import Tally


@dataclass
class Scene:
    """Everything a fault can get at."""

    host: DestinationHost
    network: Network
    source: Source
    guest: Guest
    tally: Tally
    random: random.Random
    other_image: Path
    spare: range


Fault = Callable[[Scene], Awaitable[None]]


async def kill_daemon(scene: Scene) -> None:
    """SIGKILL, the next one perhaps before the daemon is ready again."""
    before = await scene.guest.status()
    pid = await scene.host.main_pid(UNIT)
    if not pid:
        return
    await scene.guest.longest_s()
    await scene.host.run("kill", "-KILL", str(pid), check=False)
    scene.tally.kills += 1
    if scene.random.random() < 0.3:
        await asyncio.sleep(scene.random.uniform(0.02, 0.3))
        return
    after = await scene.guest.until(lambda status: status.state is not State.CONNECTED)
    # Long enough for a guest that waits to be answered, and seen.
    await asyncio.sleep(scene.random.uniform(0.2, 0.6))
    still_s = await scene.guest.longest_s()
    later = await scene.guest.status()
    # A guest that asks for nothing notices nothing: that would only embellish the figures.
    if later.faults > after.faults > before.faults:
        scene.tally.outages_s.append(still_s)


async def restart_daemon(scene: Scene) -> None:
    await scene.host.run("systemctl", "restart", UNIT)
    scene.tally.restarts += 1


async def hang_daemon(scene: Scene) -> None:
    """It stands still until the watchdog finds out."""
    restarts = int((await scene.host.properties(UNIT, "NRestarts"))["NRestarts"])
    await scene.host.kill(UNIT, "STOP")
    async with asyncio.timeout(PATIENCE_S):
        while int((await scene.host.properties(UNIT, "NRestarts"))["NRestarts"]) == restarts:  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.1)
    scene.tally.hangs += 1


async def kill_source(scene: Scene) -> None:
    await scene.source.kill()
    await asyncio.sleep(scene.random.uniform(0, 1.0))
    await scene.source.start()
    scene.tally.source_kills += 1


async def serve_another_image(scene: Scene) -> None:
    """Under the same name and at the same address. It must be refused, and the right one taken after it."""
    await scene.source.kill()
    await scene.source.start(scene.other_image)
    refused = await scene.guest.until(
        lambda status: status.error_code == Code.SOURCE_OTHER_EPOCH or status.state.is_final
    )
    await asyncio.sleep(0.3)
    later = await scene.guest.status()
    scene.tally.other_images_taken += (
        later.bytes_received > refused.bytes_received or later.state is State.RUNNING
    )
    scene.tally.other_images += 1
    await scene.source.kill()
    await scene.source.start()


def cut(direction: Direction, seconds: float) -> Fault:
    """A network that is cut in one direction or both."""

    async def fault(scene: Scene) -> None:
        await scene.guest.until(lambda status: status.state is State.RUNNING or status.state.is_final)
        began = time.monotonic()
        async with scene.network.cut(direction):
            noticed = None
            while (past_s := time.monotonic() - began) < seconds:
                if noticed is None and (await scene.guest.status()).state is State.RECOVERING:
                    noticed = past_s
                await asyncio.sleep(0.05)
        scene.tally.partitions += 1
        if (await scene.guest.status()).state.is_final:
            return
        if noticed is not None or seconds > 6:
            scene.tally.noticed_s.append(seconds if noticed is None else noticed)

    return fault


async def exhaust_descriptors(scene: Scene) -> None:
    """The daemon may open no file while it must connect anew."""
    pid = await scene.host.main_pid(UNIT)
    # systemd's limit, to be put back.
    _, text, _ = await scene.host.run("prlimit", "--pid", str(pid), "--nofile", "-o", "SOFT", "--noheadings")
    await scene.host.run("prlimit", "--pid", str(pid), "--nofile=12:", check=False)
    await scene.source.kill()
    await scene.source.start()
    await asyncio.sleep(0.5)
    await scene.host.run("prlimit", "--pid", str(pid), f"--nofile={text.strip()}:", check=False)
    scene.tally.full_tables += 1


async def fill_the_logs_disk(scene: Scene) -> None:
    """Logs go to a disk without room; the daemon dies and comes back over that."""
    host = scene.host
    await host.run("sh", "-c", "mkdir -p /run/small; mount -t tmpfs -o size=64k tmpfs /run/small")
    await host.configure_daemon("StandardError=append:/run/small/log")
    await host.run("systemctl", "restart", UNIT)
    await host.run("sh", "-c", "cat /dev/zero > /run/small/zeros", check=False)
    for _ in range(2):
        await kill_daemon(scene)
    await host.configure_daemon()
    await host.run("systemctl", "restart", UNIT)
    await host.run("umount", "/run/small")
    scene.tally.full_disks += 1
    scene.tally.restarts += 2


async def remove_until(scene: Scene, done: asyncio.Event) -> None:
    """A balloon takes what the guest does not use, piece by piece."""
    pieces = list(range(scene.spare.start, scene.spare.stop, 16 * PAGE_SIZE))
    scene.random.shuffle(pieces)
    while pieces and not done.is_set():
        await scene.guest.command("balloon", offset=pieces.pop(), len_bytes=16 * PAGE_SIZE)
        scene.tally.removed_pages += 16
        await asyncio.sleep(scene.random.uniform(0, 0.02))
