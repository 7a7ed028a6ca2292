"""How much the background push may ask for: a rate for one migration, shares among those of a daemon. Sans clock."""

from __future__ import annotations

WIDENING_MAX = 4
"""More would be a burst when content follows zeros."""


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


class Window:
    """What the push of one migration may have outstanding.

    While threads wait for pages it is one piece: whatever server, link and processor do for the push, a wanted page
    waits behind it. Keeping it small for a while longer would make each wait shorter and the sum of all longer, as what
    the push does not bring is waited for (docs/performance.md). What is zero comes as its length alone, so the more of
    the last answers was zero, the wider it opens.

    Args:
        piece_bytes: what is asked for at a time.
    """

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._answered = 0
        self._received = 0
        self._widening = 1

    def note_answers(self, answered_bytes: int, received_bytes: int) -> None:
        """What was answered since the beginning, and how much of that came as content."""
        answered = answered_bytes - self._answered
        if answered < 2 * self._piece_bytes:
            return
        received = received_bytes - self._received
        self._widening = min(answered // max(received, 1), WIDENING_MAX) if received < answered else 1
        self._answered, self._received = answered_bytes, received_bytes

    def bytes(self, share_bytes: int, *, demanding: bool) -> int:
        """share_bytes: the migration's part of what all may have. demanding: wanted pages are outstanding."""
        if demanding:
            return self._piece_bytes
        # Else the second piece would wait for the first's round trip.
        return max(share_bytes * self._widening, 2 * self._piece_bytes)


class Shares:
    """Outstanding push bytes of all migrations of a daemon, divided by weight.

    With equal round trips, what a migration gets is proportional to what it may have outstanding, so windows in the
    ratio of the weights are a fair division that costs nothing and needs no scheduler.

    Args:
        total_bytes: of all together; bounds the daemon's memory and a wanted page's wait behind the push.
        most_bytes: of one migration.
    """

    def __init__(self, total_bytes: int, most_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._most_bytes = most_bytes
        self._members: set[Share] = set()

    def join(self, weight: int) -> Share:
        """Give a migration its share; it leaves with `Share.leave`."""
        share = Share(self, weight)
        self._members.add(share)
        self.divide()
        return share

    def leave(self, share: Share) -> None:
        """Idempotent."""
        self._members.discard(share)
        self.divide()

    def divide(self) -> None:
        """Set every member's window anew."""
        everyone = sum(member.weight for member in self._members)
        heaviest = max((member.weight for member in self._members), default=0)
        for member in self._members:
            member.window_bytes = min(
                self._total_bytes * member.weight // everyone, self._most_bytes * member.weight // heaviest
            )


class Share:
    """One migration's part. window_bytes: what it may have outstanding now."""

    def __init__(self, shares: Shares, weight: int) -> None:
        self._shares = shares
        self._weight = weight
        self.window_bytes = 0

    @property
    def weight(self) -> int:
        return self._weight

    @weight.setter
    def weight(self, weight: int) -> None:
        self._weight = weight
        self._shares.divide()

    def leave(self) -> None:
        """Idempotent."""
        self._shares.leave(self)
