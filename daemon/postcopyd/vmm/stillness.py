"""How long a vCPU stood still: what a guest notices of whatever happened to the host."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machine import Machine

SAMPLE_S = 0.001


class Stillness:
    """Looks every millisecond, in a thread of its own, from the first `take` on."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._restart()

    def _restart(self) -> None:
        self._longest_s = 0.0
        self._moved_at = [time.monotonic()] * self._machine.shape.vcpus
        self._seen = list(self._machine.steps())

    def take(self) -> float:
        """The longest that a running vCPU made no step since the last call, seconds; what still lasts counts."""
        with self._lock:
            self._look()
            longest_s = self._longest_s
            self._restart()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stillness", daemon=True)
            self._thread.start()
        return longest_s

    def close(self) -> None:
        """Before the machine ends; idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            with self._lock:
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        for vcpu, steps in enumerate(self._machine.steps()):
            if steps is not None and steps == self._seen[vcpu]:
                self._longest_s = max(self._longest_s, now - self._moved_at[vcpu])
            else:
                self._seen[vcpu], self._moved_at[vcpu] = steps, now
