"""What holds for every test."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

# gRPC reads this when it is loaded. Its handlers run in every child between fork and exec, and with the threads of a
# test's own servers about they have crashed some of them; children of tests exec at once and need no care.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that configures logs inside a test would leave them on that test's stderr, closed by now."""
    yield
    structlog.reset_defaults()
    logging.basicConfig(force=True)
