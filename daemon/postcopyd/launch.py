"""Starts a daemon in this process."""

from __future__ import annotations

import asyncio
import gc

from . import log
from .config import load_config
from .entry import run_arguments


def launch(config_path: str | None = None, state_dir: str | None = None, control: str | None = None) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises ConfigError."""
    given = {"state_dir": state_dir, "control": control}
    config = load_config(config_path, {key: value for key, value in given.items() if value is not None})
    arguments = run_arguments({"config_path": config_path, **given})
    log.configure(config.log_level)

    import uvloop

    from .daemon import run_daemon

    # What was loaded stays: nothing of it need be looked at again.
    gc.freeze()
    gc.enable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_daemon(config, arguments))
