"""`postcopyd demo` on the terminal: progress while it runs, a table at the end, or one JSON object."""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click
import msgspec

from ..units import MIB, format_size, parse_size
from .flow import Demo, DemoOptions, DemoResult, check_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..status import MigrationStatus


@click.command()
@click.option("--memory", default="256M", show_default=True, metavar="SIZE", help="Guest memory.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--guest", type=click.Choice(["kvm", "process"]), default="kvm", show_default=True)
@click.option("--order", type=click.Choice(["sequential", "random"]), default="random", show_default=True)
@click.option(
    "--push-rate", default="0", metavar="SIZE", help="Bytes a second of background push; 0: unlimited."
)
@click.option("--transport", type=click.Choice(["native", "grpcio"]), default="native", show_default=True)
@click.option(
    "--faults",
    type=click.Choice(["uffd", "exits"]),
    default="uffd",
    show_default=True,
    help="How a vCPU's absent pages are reported: it sleeps on the userfaultfd, or leaves KVM_RUN.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(
    memory: str,
    vcpus: int,
    guest: str,
    order: str,
    push_rate: str,
    transport: str,
    faults: str,
    as_json: bool,
) -> None:
    """Move a running virtual machine on this host, and check every byte of it."""
    wanted = DemoOptions(
        memory_bytes=parse_size(memory),
        vcpus=vcpus,
        guest=guest,
        order=order,
        push_rate=parse_size(push_rate),
        transport=transport,
        faults=faults,
    )
    options = check_options(wanted)
    if options.guest != wanted.guest:
        click.echo("no /dev/kvm here: threads of a process play the guest", err=True)
    result = _run(options, quiet=as_json)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        _print_table(result)
    sys.exit(0 if result.is_good else 1)


def _run(options: DemoOptions, *, quiet: bool) -> DemoResult:
    import uvloop

    with ExitStack() as stack:
        if quiet:
            observe: Callable[[MigrationStatus], None] = lambda status: None  # noqa: E731
            say: Callable[[str], None] = lambda line: None  # noqa: E731
        else:
            observe, say = _progress(stack)
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        return runner.run(Demo(options, observe, say).run())


def _progress(
    stack: ExitStack,
) -> tuple[Callable[[MigrationStatus], None], Callable[[str], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = stack.enter_context(
        Progress(
            TextColumn("resident"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[detail]}"),
            TimeElapsedColumn(),
        )
    )
    task = bar.add_task("resident", total=None, detail="", start=False)

    def observe(status: MigrationStatus) -> None:
        if not status.pages_total:
            return
        bar.start_task(task)
        rate = status.bytes_received / MIB / max(status.elapsed_s, 1e-3)
        detail = f"{status.pages_installed} pages, {status.faults} faults, {rate:.0f} MiB/s, {status.state}"
        bar.update(task, total=status.pages_total, completed=status.pages_installed, detail=detail)

    return observe, bar.console.print


def _print_table(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    latency = result.fault_latency_us
    table = Table(title="moved" if result.is_good else "FAILED", show_header=False)
    for name, value in (
        (
            "guest",
            f"{result.guest}, {result.vcpus} vCPUs, {format_size(result.memory_bytes)}, {result.order}",
        ),
        ("transport", f"{result.transport}, faults by {result.faults}"),
        ("pages", f"{result.pages_total}"),
        ("  on demand", f"{result.pages_demand}"),
        ("  pushed", f"{result.pages_pushed}"),
        ("  zero", f"{result.pages_zero}"),
        ("faults answered", f"{latency.count}: {result.faults_uffd} messages, {result.faults_exits} exits"),
        (
            "fault latency µs",
            f"p50 {latency.p50:.0f}  p90 {latency.p90:.0f}  p99 {latency.p99:.0f}  max {latency.max:.0f}",
        ),
        ("vCPU block time ms", "  ".join(f"{us / 1000:.1f}" for us in result.vcpu_blocktime_us)),
        ("total", f"{result.total_s:.2f} s"),
        ("mismatched pages", f"{result.mismatched_pages}"),
        ("complete, source released", f"{result.completed}, {result.source_released}"),
    ):
        table.add_row(name, value)
    Console().print(table)
