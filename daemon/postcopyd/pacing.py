"""Token bucket for the background push. Sans clock: the caller says what time it is."""

from __future__ import annotations


class TokenBucket:
    """Bytes that may be asked for now.

    Args:
        rate: bytes a second; 0: unlimited.
        burst_s: how much time's worth of unused rate is kept.
    """

    def __init__(self, rate: int, *, burst_s: float = 0.05) -> None:
        self._burst_s = burst_s
        self._level = 0.0
        self._at: float | None = None
        self.rate = rate

    def _refill(self, now: float) -> None:
        if self._at is not None:
            gained = (now - self._at) * self.rate
            self._level = min(self._level + gained, max(self.rate * self._burst_s, 1.0))
        self._at = now

    def may_spend(self, now: float) -> bool:
        """Whether anything may be asked for; a debt (see `spend`) must be worked off first."""
        if self.rate == 0:
            return True
        self._refill(now)
        return self._level >= 0

    def spend(self, amount: int) -> None:
        """Charge `amount`; the level may become negative, as a request cannot be cut into arbitrary pieces."""
        if self.rate:
            self._level -= amount

    def give_back(self, amount: int) -> None:
        """What was charged and not used: zero runs carry no bytes."""
        if self.rate:
            self._level += amount

    def delay_s(self) -> float:
        """Seconds until `may_spend` can be true."""
        if self.rate == 0 or self._level >= 0:
            return 0.0
        return -self._level / self.rate
