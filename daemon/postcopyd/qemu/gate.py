"""The gate between a destination QEMU and the daemon: the sockets that its shim waits for.

The daemon listens at a socket of its own from the moment a migration is prepared; the shim looks elsewhere. A link from
there to here is what opens the gate, so it takes no time while the guest stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from ..control.rpc_errors import rebuilt
from ..errors import Code, MigrationError
from ..status import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..control.client import ControlClient
    from .plan import BlockPlan
    from .qmp import Machine

HANDOFF_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 0.001
"""The guest stands still while this is waited for."""


async def open_gate(
    client: ControlClient, blocks: Sequence[BlockPlan], sockets: Mapping[str, str], destination: Machine
) -> dict[str, float]:
    """Let the shim hand over every block, and close the gate again.

    Args:
        sockets: where the daemon listens, by migration.
    Returns:
        When each hand-off was accepted, by migration and time.monotonic.
    Raises:
        MigrationError: QEMU_NO_SHIM: it did not hand over. QEMU_GONE: the destination ended. Others: the daemon's.
    """
    connected = [asyncio.ensure_future(_until_connected(client, block.migration)) for block in blocks]
    gone = asyncio.ensure_future(destination.until(lambda m: m.is_gone, HANDOFF_TIMEOUT_S, "hands over"))
    every = asyncio.ensure_future(asyncio.wait(connected, return_when=asyncio.FIRST_EXCEPTION))
    try:
        for block in blocks:
            os.symlink(sockets[block.migration], block.socket)
        ends: set[asyncio.Future[object]] = {every, gone}  # type: ignore[arg-type] # results are not looked at
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if every.done():
            return {block.migration: task.result() for block, task in zip(blocks, connected, strict=True)}
        if destination.is_gone:
            raise destination.gone("at its hand-off; its stderr says why")
        raise MigrationError(
            Code.QEMU_NO_SHIM,
            f"the destination's shim did not hand over within {HANDOFF_TIMEOUT_S:g} s; its stderr and postcopyd's "
            "log say why",
        )
    except OSError as error:
        raise MigrationError(
            Code.QEMU_NO_SHIM, f"the socket that the shim waits for cannot be made: {error.strerror}"
        ) from error
    finally:
        for task in (every, gone, *connected):
            task.cancel()
        await asyncio.gather(every, gone, *connected, return_exceptions=True)
        for block in blocks:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(block.socket)


async def _until_connected(client: ControlClient, migration: str) -> float:
    async with aclosing(client.watch(migration, interval_s=WATCH_INTERVAL_S)) as states:
        async for status in states:
            if status.state.is_final and status.state is not State.COMPLETE:
                raise rebuilt(status.error_code or Code.VMM_GONE, status.error or f"it ended {status.state}")
            if status.state is not State.PREPARED:
                return time.monotonic() - status.elapsed_s
    raise MigrationError(Code.MIGRATION_UNKNOWN, f"the daemon forgot migration {migration!r}")
