"""How far a page server is: a line that renews itself on a terminal, a log event elsewhere."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, TextIO

import msgspec
import structlog

from postcopyd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from .service import PageSourceService

log = structlog.get_logger(__name__)

TERMINAL_PERIOD_S = 0.5
LOG_PERIOD_S = 10.0


class Sample(msgspec.Struct, frozen=True):
    """What was served until `at_s`. Bytes are of guest memory, zeros included in `served_bytes`."""

    at_s: float
    images: int
    images_released: int
    streams: int
    total_bytes: int
    served_bytes: int
    data_bytes: int
    share: float


class Rates(msgspec.Struct, frozen=True):
    """Per second, between two samples."""

    pages: float
    data_bytes: float


def take_sample(service: PageSourceService, clock: Callable[[], float] = time.monotonic) -> Sample:
    """Return the totals now. The share of an image that is asked for again does not grow beyond 1."""
    files = [image.file for image in service.catalog]
    served = [(file.size_bytes, file.served) for file in files]
    total = sum(size for size, _ in served)
    once = sum(min(size, counts.data_bytes + counts.zero_bytes) for size, counts in served)
    return Sample(
        at_s=clock(),
        images=len(files),
        images_released=sum(file.is_released for file in files),
        streams=len(service.streams),
        total_bytes=total,
        served_bytes=sum(counts.data_bytes + counts.zero_bytes for _, counts in served),
        data_bytes=sum(counts.data_bytes for _, counts in served),
        share=once / total if total else 0.0,
    )


def rates_between(before: Sample, now: Sample) -> Rates:
    elapsed_s = now.at_s - before.at_s
    if elapsed_s <= 0:
        return Rates(0.0, 0.0)
    return Rates(
        pages=(now.served_bytes - before.served_bytes) / PAGE_SIZE / elapsed_s,
        data_bytes=(now.data_bytes - before.data_bytes) / elapsed_s,
    )


def format_line(sample: Sample, rates: Rates) -> str:
    """Return one line for a terminal."""
    return (
        f"images {sample.images} ({sample.images_released} released)  streams {sample.streams}  "
        f"{rates.pages:,.0f} pages/s  {format_size(rates.data_bytes)}/s  "
        f"served {sample.share:.1%} of {format_size(sample.total_bytes)}"
    )


class Progress:
    """Reports until cancelled. In the log only while there is traffic."""

    def __init__(self, service: PageSourceService, out: TextIO = sys.stderr) -> None:
        self._service = service
        self._out = out
        self._last = take_sample(service)

    async def run(self) -> None:
        """Never returns; cancel it."""
        on_terminal = self._out.isatty()
        try:
            while True:
                await asyncio.sleep(TERMINAL_PERIOD_S if on_terminal else LOG_PERIOD_S)
                self.report(on_terminal=on_terminal)
        finally:
            if on_terminal:
                self._out.write("\n")

    def report(self, *, on_terminal: bool) -> None:
        """Report once, with the rates since the last report."""
        now = take_sample(self._service)
        rates = rates_between(self._last, now)
        if on_terminal:
            # Erase to the end of the line: the one before may have been longer.
            self._out.write(f"\r{format_line(now, rates)}\x1b[K")
            self._out.flush()
        elif now.served_bytes != self._last.served_bytes:
            log.info(
                "source.progress",
                images=now.images,
                images_released=now.images_released,
                streams=now.streams,
                pages_per_s=round(rates.pages),
                mib_per_s=round(rates.data_bytes / (1 << 20), 1),
                share=round(now.share, 4),
            )
        self._last = now
