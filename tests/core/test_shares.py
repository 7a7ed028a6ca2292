"""Outstanding push bytes are divided by weight, and never exceed the daemon's total."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopyd.pacing import Shares

TOTAL = 16 << 20
MOST = 2 << 20


def test_a_migration_alone_has_the_most_it_may() -> None:
    assert Shares(TOTAL, MOST).join(100).window_bytes == MOST


def test_a_weight_alone_means_nothing() -> None:
    assert Shares(TOTAL, MOST).join(1).window_bytes == MOST


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=64))
def test_windows_are_in_the_ratio_of_the_weights_and_fit_together(weights: list[int]) -> None:
    shares = Shares(TOTAL, MOST)
    members = [shares.join(weight) for weight in weights]
    windows = [member.window_bytes for member in members]
    assert sum(windows) <= TOTAL
    assert max(windows) <= MOST
    unit = max(windows) / max(weights)
    for weight, window in zip(weights, windows, strict=True):
        assert abs(window - unit * weight) <= unit + 1


def test_who_leaves_makes_room() -> None:
    shares = Shares(TOTAL, MOST)
    members = [shares.join(100) for _ in range(16)]
    before = members[0].window_bytes
    for member in members[1:]:
        member.leave()
        member.leave()
    assert (before, members[0].window_bytes) == (TOTAL // 16, MOST)


def test_a_new_weight_counts_at_once() -> None:
    shares = Shares(TOTAL, MOST)
    members = [shares.join(100) for _ in range(16)]
    members[0].weight = 400
    assert members[0].window_bytes == 4 * members[1].window_bytes
