"""The text that a scraper gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.registry import Collector


class Exposition:
    """Renders metrics in a thread, one scrape at a time, so that the loop only takes the snapshot.

    Args:
        collect: called on the event loop; only reads counters, and returns a collector of what it read.
    """

    def __init__(self, collect: Callable[[], Collector]) -> None:
        self._collect = collect
        self._rendering = asyncio.Lock()

    async def render(self, accept: str) -> tuple[bytes, str]:
        """Return (text, content type) in the format that the scraper's Accept header asks for."""
        async with self._rendering:
            return await asyncio.to_thread(_render, self._collect(), accept)


def _render(collector: Collector, accept: str) -> tuple[bytes, str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
