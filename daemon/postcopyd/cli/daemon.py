"""`postcopyd run`."""

from __future__ import annotations

import sys

import click


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
    from postcopyd.launch import launch

    launch(config_path, state_dir, control)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def supervise(arguments: tuple[str, ...]) -> None:
    """Run the daemon under a parent that holds its descriptors and restarts it, where there is no systemd.

    ARGUMENTS are those of `run`. SIGTERM or SIGINT drains and ends; SIGHUP replaces the daemon, as for an upgrade.
    """
    from postcopyd.supervise import supervise as run_supervised

    sys.exit(run_supervised(list(arguments)))
