"""The push's rate and its division, without a clock."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.pacing import WIDENING_MAX, Shares, TokenBucket, Window

KIB, MIB = 1 << 10, 1 << 20


@given(
    rate=st.integers(1, 1 << 34),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 4 * MIB)), min_size=1, max_size=60),
)
def test_whatever_is_asked_and_when_the_rate_is_kept_within_a_piece(
    rate: int, steps: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(rate)
    now, spent = 0.0, 0
    largest = max(amount for _, amount in steps)
    for pause, amount in steps:
        now += pause
        if bucket.may_spend(now):
            bucket.spend(amount)
            spent += amount
        assert spent <= rate * now + rate * 0.05 + largest + 1


@given(rate=st.integers(1, 1 << 34), piece=st.integers(1, 4 * MIB))
def test_after_exactly_the_delay_it_may_spend_again(rate: int, piece: int) -> None:
    bucket = TokenBucket(rate)
    assert bucket.may_spend(0.0)
    bucket.spend(piece)
    delay = bucket.delay_s()
    assert delay == pytest.approx(piece / rate)
    assert not bucket.may_spend(delay * 0.999)
    assert bucket.may_spend(delay * 1.001)


def test_who_always_spends_at_once_gets_the_whole_rate() -> None:
    bucket = TokenBucket(MIB)
    now, spent = 0.0, 0
    while now < 100:
        assert bucket.may_spend(now)
        bucket.spend(256 * KIB)
        spent += 256 * KIB
        now += bucket.delay_s() + 1e-9
    assert spent >= 100 * MIB


def test_a_long_silence_saves_up_no_more_than_a_burst() -> None:
    bucket = TokenBucket(MIB, burst_s=0.05)
    assert bucket.may_spend(0.0)
    assert bucket.may_spend(3600.0)
    bucket.spend(MIB)
    assert bucket.delay_s() == pytest.approx(0.95)


def test_what_is_given_back_may_be_spent() -> None:
    bucket = TokenBucket(1)
    assert bucket.may_spend(0.0)
    bucket.spend(MIB)
    assert not bucket.may_spend(1.0)
    bucket.give_back(MIB)
    assert bucket.may_spend(1.0)


def test_without_a_rate_everything_may_be_spent() -> None:
    bucket = TokenBucket(0)
    bucket.spend(1 << 60)
    assert bucket.may_spend(0.0)
    assert bucket.delay_s() == 0


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_windows_are_in_the_ratio_of_the_weights_and_fit_the_whole(weights: list[int]) -> None:
    shares = Shares(64 * MIB, 8 * MIB)
    members = [shares.join(weight) for weight in weights]
    assert sum(member.window_bytes for member in members) <= 64 * MIB
    assert max(member.window_bytes for member in members) <= 8 * MIB
    for one, other in itertools.pairwise(members):
        # Equal to the byte but for rounding down.
        assert abs(one.window_bytes * other.weight - other.window_bytes * one.weight) <= 1000


def test_who_leaves_leaves_its_share_to_the_others() -> None:
    shares = Shares(8 * MIB, 8 * MIB)
    stays, goes = shares.join(100), shares.join(300)
    assert (stays.window_bytes, goes.window_bytes) == (2 * MIB, 6 * MIB)
    goes.leave()
    goes.leave()
    assert stays.window_bytes == 8 * MIB


def test_while_threads_wait_one_piece_is_outstanding() -> None:
    window = Window(64 * KIB)
    assert window.bytes(MIB, demanding=False) == MIB
    assert window.bytes(MIB, demanding=True) == 64 * KIB


def test_a_small_share_still_lets_two_pieces_overlap() -> None:
    assert Window(128 * KIB).bytes(64 * KIB, demanding=False) == 256 * KIB


@given(answers=st.lists(st.tuples(st.integers(0, 4 * MIB), st.floats(0, 1)), max_size=40))
def test_the_window_opens_for_zeros_and_never_beyond_its_limit(answers: list[tuple[int, float]]) -> None:
    window = Window(128 * KIB)
    answered = received = 0
    for amount, content in answers:
        answered += amount
        received += int(amount * content)
        window.note_answers(answered, received)
        assert MIB <= window.bytes(MIB, demanding=False) <= MIB * WIDENING_MAX
    window.note_answers(answered + 8 * MIB, received)
    assert window.bytes(MIB, demanding=False) == MIB * WIDENING_MAX
    window.note_answers(answered + 16 * MIB, received + 8 * MIB)
    assert window.bytes(MIB, demanding=False) == MIB
