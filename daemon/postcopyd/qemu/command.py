"""`postcopyd qemu`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from ..arguments import check_id
from ..cli import options
from ..units import format_size
from .preload import library_path

if TYPE_CHECKING:
    from .migrate import MigrateOptions
    from .plan import Plan
    from .report import Report


@click.group()
def qemu() -> None:
    """Post-copy for an unmodified QEMU; docs/qemu.md shows how to start it."""


@qemu.command()
def preload() -> None:
    """Print the path of the library for LD_PRELOAD."""
    click.echo(str(library_path()))


@qemu.command()
@click.option(
    "--source-qmp", required=True, metavar="PATH|HOST:PORT", help="Monitor of the QEMU that has the guest."
)
@click.option("--destination-qmp", required=True, metavar="PATH", help="Monitor of the QEMU that gets it.")
@click.option(
    "--id", "id_", metavar="ID", default="",
    callback=lambda ctx, param, value: check_id(value) if value else "",
    help="Of the migration, and of the image at --source. Default: the source's -name.",
)  # fmt: skip
@click.option(
    "--source", "sources", multiple=True, metavar="HOST:PORT", callback=options.endpoints,
    help="Page server that serves the source's RAM file; repeat for fail-over. Default: one is started here.",
)  # fmt: skip
@click.option(
    "--state-uri", default="", metavar="URI",
    help="Where the device state goes, as QEMU's migrate takes it. Default: a UNIX socket.",
)  # fmt: skip
@click.option(
    "--push-rate",
    metavar="SIZE",
    callback=options.size,
    help="Background push, bytes a second; 0: unlimited.",
)
@options.present_option
@click.option("--keep-source", is_flag=True, help="Leave the source paused at the end, instead of ending it.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, change nothing.")
@options.control_option
@options.json_option
def migrate(
    source_qmp: str,
    destination_qmp: str,
    id_: str,
    sources: tuple[str, ...],
    state_uri: str,
    push_rate: int | None,
    present: bytes,
    keep_source: bool,
    dry_run: bool,
    control: str,
    as_json: bool,
) -> None:
    """Move a running guest from one QEMU to another before its memory."""
    from .migrate import MigrateOptions

    wanted = MigrateOptions(
        source_qmp=source_qmp,
        destination_qmp=destination_qmp,
        control=control,
        id=id_,
        sources=sources,
        state_uri=state_uri,
        push_rate=push_rate,
        present=present,
        keep_source=keep_source,
    )
    done = asyncio.run(_migrate(wanted, dry_run=dry_run, as_json=as_json))
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    elif dry_run:
        click.echo("\n".join(done.lines()))  # type: ignore[union-attr] # a plan
    else:
        _print(done)  # type: ignore[arg-type] # a report


async def _migrate(wanted: MigrateOptions, *, dry_run: bool, as_json: bool) -> Plan | Report:
    from ..cli import render
    from .migrate import QemuMigration

    def say(line: str) -> None:
        click.echo(line, err=True)

    with render.Progress(as_json=False) as progress:
        show = (lambda status: None) if as_json else progress.show
        async with QemuMigration(wanted, say, show) as migration:
            plan = await migration.plan()
            return plan if dry_run else await migration.run(plan)


def _print(report: Report) -> None:
    for name, value in (
        ("memory", format_size(report.memory_bytes)),
        ("down time", f"{report.downtime_ms:.1f} ms"),
        ("total", f"{report.total_s:.3f} s"),
        (
            "faults",
            f"{report.faults}, waiting {report.mean_wait_us:.0f} µs in the mean, p99 {report.p99_wait_us:.0f} µs",
        ),
        (
            "vCPUs stood still",
            f"{report.blocktime_ms:.1f} ms, other threads {report.other_blocktime_ms:.1f} ms",
        ),
        (
            "pages",
            f"{report.pages_total}: {report.pages_demand} on demand, {report.pages_pushed} pushed, "
            f"{report.pages_zero} zero",
        ),
        ("reconnections", str(report.reconnects)),
    ):
        click.echo(f"{name:18} {value}")
