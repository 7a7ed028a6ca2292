"""Replies in, pages in place: the sink that every page stream feeds.

Checking, UFFDIO_COPY and the wake are one C call a message (daemon/native/pager_install.c); a native transport makes
that call itself. Here remains what follows a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pager import Pager


class Installer:
    """A ReplySink over `pager`.

    Args:
        dispatch: gets the signals of a batch.
        drain: takes the faults that the kernel has.
        answered: called behind both.
    """

    def __init__(
        self,
        pager: Pager,
        dispatch: Callable[[int], None],
        drain: Callable[[], None],
        answered: Callable[[], None],
    ) -> None:
        self.native = pager.feed_address
        self._pager = pager
        self._dispatch = dispatch
        self._drain = drain
        self._answered = answered
        self._closed = False

    def feed(self, message: bytes) -> None:
        """Take one message; what is wrong with it shows in the signals."""
        if not self._closed:
            self._pager.feed(message)

    def fed(self) -> None:
        """A batch is through."""
        if self._closed:
            return
        self._dispatch(self._pager.take_signals())
        if self._pager.demand_inflight:
            # With many threads those that were woken have faulted again by now: their requests go out with this batch.
            self._drain()
        self._answered()

    def close(self) -> None:
        """Ignore what still comes; the pager may go. A native transport must be closed first."""
        self._closed = True
