"""Faults in, orders out: the one place where a session's fault sources meet its ledger.

The pager (C) drains a source, decides by the ledger and acts; what is left to Python is a handful of bits a batch,
which the demultiplexer turns into calls on the session.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from .pager import Pager, Signal
from .urgency import Urgency

if TYPE_CHECKING:
    from .errors import HandoffError, KernelError

# Plain integers: what is looked at in every turn.
_SEND = int(Signal.SEND)
_RARE = ~_SEND

RETRY_FIRST_S = 0.001
RETRY_MAX_S = 0.1
SHORT_RETRY_FIRST_S = 0.02
SHORT_RETRY_MAX_S = 1.0


class SignalHandler(Protocol):
    """What a session does about the pager's signals."""

    def on_requests_waiting(self) -> None: ...

    def on_memory_short(self, short: bool) -> None: ...

    def on_memory_trial(self) -> None: ...

    def on_vmm_gone(self) -> None: ...

    def on_kernel_failure(self, error: KernelError) -> None: ...

    def on_distrust(self) -> None: ...

    def on_exits_broken(self, error: HandoffError) -> None: ...

    def on_answers(self) -> None: ...

    def on_progress(self) -> None: ...


class Demultiplexer:
    """Watches the fault sources of one session: its userfaultfd and, where vCPUs report by exits, their ring's doorbell.

    A stall (a mapping that changes, memory that is short, a request queue that is full) is tried again after a pause
    that doubles; nothing is polled while nothing is stalled.
    """

    def __init__(self, pager: Pager, uffd: int, handler: SignalHandler, doorbell: int | None = None) -> None:
        self._pager = pager
        self._uffd = uffd
        self._doorbell = doorbell
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._urgency = Urgency.of_running_loop()
        self._urgent_uffd: int | None = None
        self._urgent_doorbell: int | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = 0.0
        self._short = False
        self._settled_when_short = 0
        self._watching = False

    def start(self) -> None:
        """Begin to watch; answers at once what is waiting already."""
        self._watching = True
        self._watch_uffd()
        if self._doorbell is not None:
            self._loop.add_reader(self._doorbell, self._on_doorbell, self._doorbell)
            self._urgent_doorbell = self._urgency.watch(self._doorbell)
        self.drain()

    def stop(self) -> None:
        """Watch no more; idempotent. The descriptor stays open."""
        if self._watching:
            self._unwatch_uffd()
            if self._doorbell is not None:
                self._loop.remove_reader(self._doorbell)
            if self._urgent_doorbell is not None:
                self._urgency.forget(self._urgent_doorbell)
                self._urgent_doorbell = None
            self._watching = False
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def drain(self) -> None:
        """Read and answer what the kernel has."""
        if self._watching:
            self.dispatch(self._pager.drain())

    def _watch_uffd(self) -> None:
        if self._urgent_uffd is None:
            self._loop.add_reader(self._uffd, self.drain)
            self._urgent_uffd = self._urgency.watch(self._uffd)

    def _unwatch_uffd(self) -> None:
        if self._urgent_uffd is not None:
            self._loop.remove_reader(self._uffd)
            self._urgency.forget(self._urgent_uffd)
            self._urgent_uffd = None

    def _on_doorbell(self, doorbell: int) -> None:
        self._watch_uffd()
        self.dispatch(self._pager.on_doorbell(doorbell))

    def dispatch(self, signals: int) -> None:
        """Act on what a call into the pager asked for."""
        if signals & _RARE:
            self._attend(signals)
        elif self._short and self._pager.settled > self._settled_when_short:
            # Only an install that works shows that memory is back.
            self._short = False
            self._handler.on_memory_short(False)
        if signals & _SEND:
            self._handler.on_requests_waiting()
        self._handler.on_progress()

    def _attend(self, signals: int) -> None:
        if signals & Signal.GONE:
            self._handler.on_vmm_gone()
        if signals & Signal.FAILED:
            self._handler.on_kernel_failure(self._pager.failure())
        if signals & Signal.DISTRUST:
            self._handler.on_distrust()
        if signals & Signal.RING_BROKEN:
            self._handler.on_exits_broken(self._pager.ring_failure())
        if signals & Signal.ANSWERS:
            self._handler.on_answers()
        if signals & Signal.SHORT:
            self._on_short()
        if signals & Signal.HELD:
            # It stays readable, and nothing can be done about it until the vCPU is through: it rings the doorbell then.
            self._unwatch_uffd()
        if signals & Signal.STALLED:
            self._retry_later()
        if signals & Signal.MORE:
            self._loop.call_soon(self.drain)

    def _retry_later(self) -> None:
        if self._retry is not None or not self._watching:
            return
        first, longest = (
            (SHORT_RETRY_FIRST_S, SHORT_RETRY_MAX_S) if self._short else (RETRY_FIRST_S, RETRY_MAX_S)
        )
        self._retry_s = min(max(self._retry_s * 2, first), longest)
        self._retry = self._loop.call_later(self._retry_s, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        self._watch_uffd()
        signals = self._pager.drain() | self._pager.retry()
        if self._short:
            # Asking for pages again is how memory is tried, also by the push.
            self._handler.on_memory_trial()
        elif not signals & Signal.STALLED:
            self._retry_s = 0.0
        self.dispatch(signals)

    def _on_short(self) -> None:
        settled = self._pager.settled
        if not self._short or settled > self._settled_when_short:
            self._retry_s = 0.0
        self._short = True
        self._settled_when_short = settled
        self._handler.on_memory_short(True)
