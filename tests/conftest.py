"""What holds for every test."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that configures logs inside a test would leave them on that test's stderr, closed by now."""
    yield
    structlog.reset_defaults()
    logging.basicConfig(force=True)
