"""Logs: one JSON object a line on stderr; colours on a terminal. Other libraries' records join in."""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

_modules = cast("dict[str, object]", sys.modules)
if not sys.stderr.isatty():
    # structlog takes along rich if there is one, for tracebacks on a terminal; that alone takes as long to load as all
    # that a daemon needs to serve the guests that wait for it.
    _modules.setdefault("rich", None)
import structlog  # noqa: E402 - what is above must come first

if _modules.get("rich", structlog) is None:
    del _modules["rich"]

from .log_stream import log_stream  # noqa: E402 - likewise


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's root logger; may be called again.

    Args:
        level: "debug", "info", "warning" or "error".
        stream: default: stderr, which systemd hands to the journal.
    """
    out = stream or log_stream(sys.stderr)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor]
    if out.isatty():
        renderer = [structlog.dev.ConsoleRenderer()]
    else:
        renderer = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(sort_keys=False)]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    # asyncio and grpc report through `logging`; below warning they have nothing for an operator.
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
