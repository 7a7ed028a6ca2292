"""Counters of what belongs to no migration."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from postcopyd.errors import Code


class ErrorCounts:
    """How often each error code occurred; one instance is given to whoever meets the errors.

    Bounded by the number of codes. For the event loop's thread.
    """

    def __init__(self) -> None:
        self._counts: Counter[Code] = Counter()

    def record(self, code: Code) -> None:
        self._counts[code] += 1

    def snapshot(self) -> Mapping[Code, int]:
        return dict(self._counts)
