"""The command line: `postcopyd COMMAND`.

A command's module is imported when the command runs, so that `--help` does not wait for gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import click

from postcopyd import __version__
from postcopyd.errors import PostcopyError

from .text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130

# name: (module:command, help)
COMMANDS = {
    "run": ("postcopyd.cli.daemon:run", "Run the daemon."),
    "supervise": ("postcopyd.cli.daemon:supervise", "Run the daemon under a parent that never loses a VM."),
    "drain": ("postcopyd.cli.migrations:drain", "Finish every migration and take no new one."),
    "prepare": ("postcopyd.cli.migrations:prepare", "Make a migration and print the socket for its VMM."),
    "list": ("postcopyd.cli.migrations:list_", "List the migrations."),
    "show": ("postcopyd.cli.migrations:show", "Show all of one migration."),
    "watch": ("postcopyd.cli.migrations:watch", "Follow a migration to its end."),
    "cancel": ("postcopyd.cli.migrations:cancel", "End a migration."),
    "set-limits": ("postcopyd.cli.migrations:set_limits", "Change a migration's push rate and weight."),
    "serve": ("postcopyd.source.cli:serve", "Serve memory images to destinations (the source host)."),
    "qemu": ("postcopyd.qemu.command:qemu", "Move the guest of an unmodified QEMU."),
    "doctor": ("postcopyd.doctor:doctor", "Say what this host can do, and what to change where it cannot."),
    "demo": ("postcopyd.demo.command:demo", "Migrate a small guest on this host and show what happens."),
    "version": ("postcopyd.cli:version", "Print the version."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and help; imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Page-fault daemon for post-copy live migration and lazy snapshot restore.

    Exit status: 0 done; 2 configuration or command line; 3 the VMM's fault; 4 the page source's; 5 the
    kernel's; 6 the migration's state; 70 a bug.
    """


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"postcopyd {__version__}")


def report(error: PostcopyError) -> int:
    """Say on stderr, in one line, what went wrong; return the exit status."""
    click.echo(f"postcopyd: error: {printable(str(error))}", err=True)
    return error.exit_status


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. An expected error is one line on stderr, never a traceback."""
    try:
        status = cli.main(args, prog_name="postcopyd", standalone_mode=False)
    except PostcopyError as error:
        return report(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else 0
