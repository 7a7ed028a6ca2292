"""The state of every page: two bits each (daemon/native/ledger.c). Sans-IO: events in, commands out.

The pager keeps its own ledger in C; this class is the same code over a buffer of one's own, for tests, tools and the
generated documentation.
"""

from __future__ import annotations

from enum import IntEnum

from ._native.core import ffi, lib


class PageState(IntEnum):
    MISSING = 0
    REQUESTED = 1
    PRESENT = 2
    ZERO = 3


class PageEvent(IntEnum):
    """FAULTED: a thread waits. CLAIMED: the push takes it. ARRIVED: content came. IS_ZERO: the source says so.
    LOST: the answer will not come. REMOVED: the guest gave it back."""

    FAULTED = 0
    CLAIMED = 1
    ARRIVED = 2
    IS_ZERO = 3
    LOST = 4
    REMOVED = 5


class PageCommand(IntEnum):
    NOTHING = 0
    FETCH = 1
    WAIT = 2
    INSTALL = 3
    ZERO_FILL = 4
    DISCARD = 5


def transition(event: PageEvent, state: PageState) -> tuple[PageState, PageCommand]:
    """What `event` does to a page in `state`: the table of ledger.c."""
    result = lib.ledger_transition(event, state)
    return PageState(result.next), PageCommand(result.command)


class Ledger:
    """States of `pages` pages, all MISSING at first.

    Page numbers must be below `pages`; the C does not check.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._words = ffi.new("uint64_t[]", max(1, lib.ledger_bytes(pages) // 8))
        self._ledger = ffi.new("struct ledger *")
        lib.ledger_init(self._ledger, self._words, pages)

    def state(self, page: int) -> PageState:
        return PageState(lib.ledger_state(self._ledger, page))

    def counts(self) -> dict[PageState, int]:
        return {state: self._ledger.count[state] for state in PageState}

    def apply(self, event: PageEvent, page: int) -> PageCommand:
        return PageCommand(lib.ledger_apply(self._ledger, event, page))

    def apply_range(self, event: PageEvent, first: int, count: int) -> int:
        """Return how many pages changed state."""
        return lib.ledger_apply_range(self._ledger, event, first, count)

    def find(self, state: PageState, first: int = 0, end: int | None = None) -> int | None:
        """First page of [first, end) in `state`, or None."""
        end = self.pages if end is None else end
        page = lib.ledger_find(self._ledger, state, first, end)
        return page if page < end else None

    def run(self, states: set[PageState], first: int, end: int | None = None) -> int:
        """Length of the run from `first` whose states are all in `states`."""
        mask = sum(1 << state for state in states)
        return lib.ledger_run(self._ledger, mask, first, self.pages if end is None else end)
