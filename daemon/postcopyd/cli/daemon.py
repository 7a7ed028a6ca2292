"""`postcopyd run`."""

from __future__ import annotations

import asyncio
import sys

import click

from postcopyd import log
from postcopyd.config import load_config


@click.command()
@click.option("--config", "config_path", metavar="FILE", help="TOML file; see deploy/postcopyd.toml.")
@click.option("--state-dir", metavar="DIR", help="Sockets and session records.")
@click.option(
    "--control", metavar="PATH", help="Control socket. Default: control.sock in the state directory."
)
def run(config_path: str | None, state_dir: str | None, control: str | None) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Every key of the configuration may also be given as a variable, POSTCOPYD_ and the key in capitals.
    """
    given = {"state_dir": state_dir, "control": control}
    config = load_config(config_path, {key: value for key, value in given.items() if value is not None})
    log.configure(config.log_level)

    import uvloop

    from postcopyd.daemon import run_daemon

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_daemon(config))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def supervise(arguments: tuple[str, ...]) -> None:
    """Run the daemon under a parent that holds its descriptors and restarts it, where there is no systemd.

    ARGUMENTS are those of `run`. SIGTERM or SIGINT drains and ends; SIGHUP replaces the daemon, as for an upgrade.
    """
    from postcopyd.supervise import supervise as run_supervised

    sys.exit(run_supervised(list(arguments)))
