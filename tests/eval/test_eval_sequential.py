"""Votes looked at as they come in: closed forms, Ville's bound by enumeration, sample sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo_eval.metrics.sequential import (
    anytime_interval,
    log_e_value,
    minimum_detectable,
    votes_needed,
)

COUNTS = st.integers(0, 200)


def test_e_value_hand_worked():
    """E = 2^n w! l! / (n + 1)!: one vote 2 / 2 = 1, two wins 4 * 2 / 6, seven wins 128 * 5040 / 40320 = 16."""
    assert np.exp(log_e_value(0, 0)) == pytest.approx(1) and np.exp(log_e_value(1, 0)) == pytest.approx(1)
    assert np.exp(log_e_value(2, 0)) == pytest.approx(4 / 3) and np.exp(log_e_value(7, 0)) == pytest.approx(16)
    assert votes_needed(7, 0) != 0 and votes_needed(8, 0) == 0
    with pytest.raises(ValueError, match="-1 wins"):
        log_e_value(-1, 0)


@given(COUNTS, COUNTS, st.floats(0.05, 0.95))
def test_a_martingale(wins, losses, null):
    """The mean of the next value, votes won with chance `null`, is the value now."""
    now, won, lost = (np.exp(log_e_value(w, l, null) - log_e_value(wins, losses, null))
                      for w, l in ((wins, losses), (wins + 1, losses), (wins, losses + 1)))  # fmt: skip
    assert null * won + (1 - null) * lost == pytest.approx(now, rel=1e-9)


def test_false_alarms_by_enumeration():
    """The chance that any of 300 looks alarms, exactly, by walking all paths that have not yet alarmed."""
    alive, alarmed = {0: 1.0}, 0.0
    for n in range(1, 301):
        ahead: dict[int, float] = {}
        for wins, chance in alive.items():
            for w in (wins, wins + 1):
                ahead[w] = ahead.get(w, 0.0) + chance / 2
        alarms = {w for w in ahead if log_e_value(w, n - w) >= math.log(20)}
        alarmed += sum(ahead[w] for w in alarms)
        alive = {w: c for w, c in ahead.items() if w not in alarms}
    assert 0.02 < alarmed < 0.05


@given(COUNTS, COUNTS)
def test_interval_is_what_is_not_refuted(wins, losses):
    low, high = anytime_interval(wins, losses)
    rate = wins / (wins + losses) if wins + losses else 0.5
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert log_e_value(wins, losses, bound) == pytest.approx(math.log(20), abs=1e-4)
    flipped = anytime_interval(losses, wins)
    assert flipped == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert (votes_needed(wins, losses, limit=0) == 0) == (not low <= 0.5 <= high)


def test_no_votes_no_knowledge():
    assert anytime_interval(0, 0) == (0, 1) and votes_needed(0, 0) is None


@given(st.integers(1, 60), st.integers(0, 60))
def test_votes_needed_is_the_first_that_decides(wins, losses):
    needed = votes_needed(wins, losses, limit=20_000)
    rate = (wins + 1) / (wins + losses + 2)
    if needed:

        def decided(k):
            return log_e_value(wins + k * rate, losses + k * (1 - rate)) >= math.log(20)

        assert decided(needed) and not decided(needed - 1)
    assert (needed == 0) == (log_e_value(wins, losses) >= -np.log(0.05))


def test_sample_sizes_of_the_textbook():
    for votes, rate in ((783, 0.55), (194, 0.6), (85, 0.65)):
        assert minimum_detectable(votes) <= rate < minimum_detectable(votes - 1)


def test_too_few_votes_show_nothing():
    assert minimum_detectable(3) is None and minimum_detectable(4) < 1
    with pytest.raises(ValueError, match="alpha is 5"):
        minimum_detectable(100, alpha=5)


def test_power_of_the_sample_size_exactly():
    """With 194 votes and a true rate of .6, |z| > 1.96 has a binomial chance of .80 give or take one vote."""
    n, p = 194, 0.6
    called = [k for k in range(n + 1) if abs(k - n / 2) / math.sqrt(n / 4) > 1.96]
    power = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in called)
    assert power == pytest.approx(0.8, abs=0.03)
