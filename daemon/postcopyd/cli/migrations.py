"""The commands that talk to a running daemon."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import click

from postcopyd.errors import Code, ConfigError
from postcopyd.status import Limits, OnLoss, State

from . import options

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from postcopyd.control.client import ControlClient
    from postcopyd.status import MigrationStatus

Result = TypeVar("Result")


@click.command()
@options.id_argument
@click.option(
    "--source", "sources", multiple=True, required=True, metavar="HOST:PORT", callback=options.endpoints,
    help="Page source; repeat for fail-over, tried in order.",
)  # fmt: skip
@click.option(
    "--socket", metavar="PATH", callback=options.socket_path,
    help="Where the VMM will connect. Default: a path below the state directory.",
)  # fmt: skip
@options.control_option
@click.option(
    "--push-rate", metavar="SIZE", callback=options.size,
    help="Background push, bytes a second, as 100M; 0: unlimited. Default: the daemon's.",
)  # fmt: skip
@click.option(
    "--epoch", metavar="N", callback=options.epoch, help="Refuse a source whose image has another epoch."
)
@click.option(
    "--retry-for", metavar="SECONDS", type=click.FloatRange(0), default=0.0,
    help="Wait so long for a lost source before --on-loss happens; 0: for ever.",
)  # fmt: skip
@click.option(
    "--on-loss", type=click.Choice([policy.value for policy in OnLoss]), default=OnLoss.HOLD.value,
    show_default=True, help="What becomes of the guest then.",
)  # fmt: skip
@options.present_option
@options.json_option
def prepare(
    id: str,
    sources: tuple[str, ...],
    socket: str,
    control: str,
    push_rate: int | None,
    epoch: int | None,
    retry_for: float,
    on_loss: str,
    present: bytes,
    as_json: bool,
) -> None:
    """Make a migration and print the path of the socket for its VMM.

    ID is also the image's id at the source.
    """
    limits = None if push_rate is None else Limits(push_rate=push_rate)
    status = _call(
        control,
        lambda client: client.prepare(
            id,
            sources,
            socket_path=socket,
            limits=limits,
            epoch=epoch,
            retry_for_s=retry_for,
            on_loss=OnLoss(on_loss),
            present=present,
        ),
    )
    _print(status, as_json, lambda: click.echo(status.socket_path))


@click.command()
@options.control_option
@options.json_option
def drain(control: str, as_json: bool) -> None:
    """Finish every migration at full rate and take no new one; returns when no guest needs the daemon."""
    from . import render

    statuses = _call(control, lambda client: client.drain())
    if as_json:
        click.echo(render.to_json_array(statuses))


@click.command("list")
@options.control_option
@options.json_option
def list_(control: str, as_json: bool) -> None:
    """List the migrations of the daemon."""
    from . import render

    statuses = _call(control, lambda client: client.list())
    if as_json:
        click.echo(render.to_json_array(statuses))
    else:
        render.print_table(statuses)


@click.command()
@options.id_argument
@options.control_option
@options.json_option
def show(id: str, control: str, as_json: bool) -> None:
    """Show everything about one migration."""
    from . import render

    status = _call(control, lambda client: client.get(id))
    _print(status, as_json, lambda: render.print_details(status))


@click.command()
@options.id_argument
@click.option("--force", is_flag=True, help="End the VMM too, if it still needs pages.")
@options.control_option
@options.json_option
def cancel(id: str, force: bool, control: str, as_json: bool) -> None:
    """End a migration: before the hand-off, or with --force together with its VMM."""
    status = _call(control, lambda client: client.cancel(id, force=force))
    _print(status, as_json, lambda: click.echo(f"{status.id} {status.state}"))


@click.command("set-limits")
@options.id_argument
@click.option("--push-rate", metavar="SIZE", callback=options.size, help="Bytes a second; 0: unlimited.")
@click.option("--weight", type=click.IntRange(1, 1000), help="Share among the daemon's migrations.")
@options.control_option
@options.json_option
def set_limits(id: str, push_rate: int | None, weight: int | None, control: str, as_json: bool) -> None:
    """Change a running migration's limits; what is not named stays."""
    if push_rate is None and weight is None:
        raise ConfigError(Code.ARGUMENT_INVALID, "nothing to change; name --push-rate or --weight")

    async def change(client: ControlClient) -> MigrationStatus:
        before = (await client.get(id)).limits
        after = Limits(
            push_rate=before.push_rate if push_rate is None else push_rate,
            weight=before.weight if weight is None else weight,
        )
        return await client.set_limits(id, after)

    status = _call(control, change)
    text = f"{status.id} push_rate={status.limits.push_rate} weight={status.limits.weight}"
    _print(status, as_json, lambda: click.echo(text))


@click.command()
@options.id_argument
@options.control_option
@options.json_option
def watch(id: str, control: str, as_json: bool) -> None:
    """Follow a migration to its end; --json prints one object a line.

    Exit status 0 if it completed, else that of its error.
    """
    from postcopyd.control.rpc_errors import rebuilt

    from . import render

    async def follow(client: ControlClient) -> MigrationStatus:
        with render.Progress(as_json=as_json) as progress:
            async with aclosing(client.watch(id)) as states:
                async for status in states:
                    progress.show(status)
        return status

    last = _call(control, follow)
    if last.state is not State.COMPLETE:
        # A cancelled migration names no error of its own.
        raise rebuilt(last.error_code or Code.MIGRATION_CANCELLED, last.error or f"{id} ended {last.state}")


def _call(control: str, action: Callable[[ControlClient], Awaitable[Result]]) -> Result:
    from postcopyd.control.client import ControlClient

    async def connected() -> Result:
        async with ControlClient(control) as client:
            return await action(client)

    return asyncio.run(connected())


def _print(status: MigrationStatus, as_json: bool, plain: Callable[[], None]) -> None:
    from . import render

    if as_json:
        click.echo(render.to_json(status))
    else:
        plain()
