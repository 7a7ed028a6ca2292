"""A source that takes little at a time is asked for little at a time, and never refuses a stream for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE_S, LocalGuest, content_of, local_daemon
from postcopyd.source.image import ImageSpec
from postcopyd.source.options import ServerOptions
from postcopyd.source.server import serve
from postcopyd.status import Limits, State
from postcopyd.units import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

PAGES = 2048
READERS = 8
FEW = ServerOptions(max_ranges=2, max_range_bytes=4 * PAGE_SIZE, max_data_bytes=2 * PAGE_SIZE)


@pytest.mark.parametrize("push_rate", [0, 1], ids=["push", "demand alone"])
async def test_it_is_never_asked_for_more_than_it_takes(tmp_path: Path, push_rate: int) -> None:
    content = content_of(PAGES)
    (tmp_path / "image").write_bytes(content)
    server = await serve([ImageSpec("vm", str(tmp_path / "image"))], "127.0.0.1:0", FEW)
    async with local_daemon() as daemon, LocalGuest(len(content)) as guest:
        prepared = await daemon.prepare("vm", server.address, limits=Limits(push_rate=push_rate))
        await guest.hand_off(prepared.socket_path)
        # More threads than ranges, each on pages of its own.
        part = len(content) // READERS
        readers = [guest.reading(at, part) for at in range(0, len(content), part)]
        async with asyncio.timeout(PATIENCE_S):
            assert b"".join(await asyncio.gather(*readers)) == content
        await daemon.manager.set_limits("vm", Limits())
        status = await daemon.until("vm", lambda status: status.state is State.COMPLETE)
        assert status.reconnects == 0, "the source refused a stream"
    await server.stop(0)
