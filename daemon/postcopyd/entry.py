"""Where the program begins.

Guests stand still while a daemon comes back, so the way to `run` is short: a standby is asked to go on before anything
is loaded; without one the options are read by hand, as click takes as long to load as a fifth of the daemon, and garbage
is collected only once everything is loaded. What is not plain (--help, a mistake) goes to the command line proper, which
knows how to answer.
"""

from __future__ import annotations

import gc
import os
import sys

# `typing` itself takes longer to load than the claim takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN_OPTIONS = {"--config": "config_path", "--state-dir": "state_dir", "--control": "control"}


def main() -> int:
    """Run the command that sys.argv names; return the exit status."""
    options = plain_run(sys.argv[1:])
    if options is None:
        from .cli import main as run_command

        return run_command()
    if "NOTIFY_SOCKET" in os.environ:
        from .standby.claim import claim

        claim(sys.argv[1:], os.environ)
    gc.disable()
    from .errors import PostcopyError
    from .launch import launch

    try:
        launch(**options)
    except PostcopyError as error:
        from .cli import report

        return report(error)
    return 0


def plain_run(args: Sequence[str]) -> dict[str, str] | None:
    """The options of a plain `run`, or None."""
    if not args or args[0] != "run":
        return None
    options: dict[str, str] = {}
    rest = iter(args[1:])
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name not in RUN_OPTIONS:
            return None
        if not equals:
            value = next(rest, "")
        if not value or value.startswith("-"):
            return None
        options[RUN_OPTIONS[name]] = value
    return options


def run_arguments(options: Mapping[str, str | None]) -> list[str]:
    """The arguments that `plain_run` reads as `options`."""
    given = ((name, options.get(key)) for name, key in RUN_OPTIONS.items())
    return ["run", *(f"{name}={value}" for name, value in given if value is not None)]
