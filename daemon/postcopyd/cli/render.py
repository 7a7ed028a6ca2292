"""Statuses for people and for programs. rich is imported only where people read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
import msgspec

from postcopyd.control.convert import NOT_CARRIED
from postcopyd.status import MigrationStatus, State
from postcopyd.units import format_size

from .text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import Console
    from rich.progress import Progress as RichProgress

# Wide enough for a table in a file or a pipe, which has no width.
PIPE_COLUMNS = 240


def to_json(status: MigrationStatus) -> str:
    """Return one line: what the control protocol carries, by the names of MigrationStatus."""
    return msgspec.json.encode(_carried(status)).decode()


def to_json_array(statuses: Sequence[MigrationStatus]) -> str:
    return msgspec.json.encode([_carried(status) for status in statuses]).decode()


def summary(status: MigrationStatus) -> str:
    """Return one line on how far a migration is."""
    parts = [
        status.state,
        f"{_percent(status):.1f} %",
        f"{status.pages_installed}/{status.pages_total} pages",
        f"{status.faults} faults",
        f"{status.waiting} waiting",
        f"p99 {status.fault_latency_us.p99:.0f} µs",
        format_size(status.bytes_received),
    ]
    if status.error:
        parts.append(f"{printable(status.error)} [{status.error_code}]")
    return ", ".join(parts)


def print_table(statuses: Sequence[MigrationStatus]) -> None:
    """Print one row a migration."""
    from rich.table import Table

    table = Table("ID", "STATE", "IN PLACE", "FAULTS", "WAITING", "P99", "RECEIVED", "SOURCE", box=None)
    for status in statuses:
        table.add_row(
            printable(status.id),
            status.state,
            f"{_percent(status):.1f} %",
            str(status.faults),
            str(status.waiting),
            f"{status.fault_latency_us.p99:.0f} µs",
            format_size(status.bytes_received),
            printable(status.source_in_use),
        )
    _console().print(table)


def print_details(status: MigrationStatus) -> None:
    """Print every field on a line of its own; sizes also as people read them."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in _carried(status).items():
        if name == "blocktime":
            continue
        table.add_row(name, Text(_value(name, value)))
    _console().print(table)
    if status.blocktime:
        threads = Table("THREAD", "FAULTS", "STOOD STILL", box=None, title="blocktime", title_justify="left")
        for thread in status.blocktime:
            threads.add_row(str(thread.tid), str(thread.faults), f"{thread.blocktime_us / 1000:.1f} ms")
        _console().print(threads)


class Progress:
    """Shows the statuses of one migration: JSON lines, a bar on a terminal, or plain lines elsewhere."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if not self._as_json and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def show(self, status: MigrationStatus) -> None:
        if self._bar is not None:
            # A total of None is a moving bar: how much there is, is known from the hand-off on.
            self._bar.update(
                self._bar.task_ids[0],
                total=status.pages_total or None,
                completed=status.pages_installed,
                description=summary(status),
            )
        else:
            click.echo(to_json(status) if self._as_json else summary(status))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def _carried(status: MigrationStatus) -> dict[str, object]:
    fields = msgspec.structs.asdict(status)
    return {name: value for name, value in fields.items() if name not in NOT_CARRIED}


def _percent(status: MigrationStatus) -> float:
    if status.pages_total == 0:
        return 100.0 if status.state is State.COMPLETE else 0.0
    return 100 * status.pages_installed / status.pages_total


def _value(name: str, value: object) -> str:
    match value:
        case int() if name in ("memory_bytes", "bytes_received", "page_size"):
            return f"{value} ({format_size(value)})"
        case int() if name == "epoch":
            return f"{value:#x}"
        case float():
            return f"{value:.3f}"
        case tuple():
            return printable(", ".join(map(str, value)))
        case msgspec.Struct():
            fields = msgspec.structs.asdict(value).items()
            return " ".join(f"{key}={inner:.0f}" for key, inner in fields)
        case _:
            return printable(str(value))
