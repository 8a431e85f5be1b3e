"""Length controls: closed forms, scipy as oracle, planted judges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from scipy import stats as scipy_stats

from mlxdpo_eval.metrics.length import (
    by_length,
    fit_length_effect,
    length_controlled,
    length_report,
    length_term,
    spearman,
)

ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-50, 50)), min_size=6, max_size=40)


def test_by_length_hand_worked():
    """100 against 90 is within 10 % of the longer, 89 is not."""
    won = np.array([1.0, 0.0, 1.0, 0.5])
    found = by_length(won, np.array([100, 100, 50, 10]), np.array([90, 89, 100, 10]), np.arange(4))
    assert [(g.name, g.n, g.accuracy) for g in found] == [
        ("chosen longer", 1, 0.0), ("chosen shorter", 1, 1.0), ("within 10 %", 2, 0.75),
    ]  # fmt: skip
    assert found[0].interval is None


def test_without_a_length_effect_theta_is_the_plain_logit():
    """Two by two: x = ±a, wins 3 of 4 on either side. The score equations give phi 0, theta logit(3/4)."""
    won = np.array([1, 1, 1, 0] * 2, np.float64)
    found = length_controlled(won, np.repeat([7.0, -7.0], 4), np.arange(8), n=50)
    assert found.rate == pytest.approx(0.75) and found.phi == pytest.approx(0, abs=1e-9) and found.raw == 0.75


def test_saturated_fit_hand_worked():
    """x = ±a, wins 3 of 4 above and 1 of 4 below, no ridge: theta 0, phi a = logit(3/4). Equal length: 1/2."""
    won = np.array([1, 1, 1, 0, 0, 0, 0, 1], np.float64)
    x = length_term(np.repeat([7.0, -7.0], 4))
    theta, phi = fit_length_effect(won, x, np.ones((1, 8)), ridge=0)[0]
    assert theta == pytest.approx(0, abs=1e-9) and phi * x[0] == pytest.approx(np.log(3))


@settings(max_examples=40)
@given(ROWS, st.integers(0, 5))
def test_fit_maximises_the_penalised_likelihood(rows, seed):
    y, difference = (np.array(c, np.float64) for c in zip(*rows, strict=True))
    if 0 < y.mean() < 1:
        x, w = length_term(difference), np.random.default_rng(seed).integers(0, 3, len(y)).astype(float)
        if 0 < (w * y).sum() < w.sum():

            def loss(p):
                z = p[0] + p[1] * x
                return (w * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))).sum() + 0.05 * p[1] ** 2

            ours = fit_length_effect(y, x, w[None])[0]
            theirs = optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
            assert loss(ours) <= theirs.fun + 1e-8


@settings(max_examples=30)
@given(ROWS)
def test_swapping_sides_mirrors_and_unit_does_not_matter(rows):
    y, difference = (np.array(c, np.float64) for c in zip(*rows, strict=True))
    prompts = np.arange(len(y)) // 2
    a = length_controlled(y, difference, prompts, n=60)
    b = length_controlled(1 - y, -difference, prompts, n=60)
    c = length_controlled(y, 4 * difference, prompts, n=60)
    d = length_controlled(y[::-1], difference[::-1], prompts[::-1], n=60)
    assert a.rate + b.rate == pytest.approx(1, abs=1e-7)
    assert c.rate == pytest.approx(a.rate, abs=1e-9)
    if a.interval is not None:
        assert d.interval == pytest.approx(a.interval, abs=1e-6)
        assert b.interval[1:3] == pytest.approx((1 - a.interval.high, 1 - a.interval.low), abs=1e-6)
        assert a.interval.low <= a.interval.high


def test_longest_wins_is_exposed():
    """A judge that always takes the longer answer, the model's mostly: raw .84, at equal length about 1/2."""
    difference = np.random.default_rng(0).normal(1.0, 1.0, 300)
    found = length_controlled((difference > 0).astype(float), difference, np.arange(300), n=400)
    assert found.raw > 0.8 and found.interval.low <= 0.5 <= found.interval.high
    assert found.phi > 5 and found.phi_interval.low > 0


def test_quality_wins_is_kept():
    rng = np.random.default_rng(1)
    difference = rng.normal(1.0, 1.0, 400)
    found = length_controlled((rng.random(400) < 0.8).astype(float), difference, np.arange(400), n=400)
    assert found.interval.low <= 0.8 <= found.interval.high and found.interval.low > 0.6


def test_all_alike():
    found = length_controlled(np.ones(20), np.arange(20.0), np.arange(20))
    assert (found.raw, found.rate, found.interval, found.theta) == (1.0, 1.0, None, np.inf)
    ties = length_controlled(np.full(20, 0.5), np.arange(20.0), np.arange(20))
    assert ties.rate == pytest.approx(0.5) and ties.interval is None
    one = length_controlled(np.array([1.0, 0.0]), np.array([1.0, 2.0]), np.array(["a", "a"]))
    assert one.interval is None
    with pytest.raises(ValueError, match="each between 0 and 1"):
        length_controlled(np.array([2.0, 0.0]), np.zeros(2), np.arange(2))


def test_equal_lengths_leave_the_plain_rate():
    """No length difference at all: the rate is the mean, and nothing pulls."""
    found = length_controlled(np.array([1, 1, 0, 1.0]), np.zeros(4), np.arange(4), n=50)
    assert found.rate == pytest.approx(0.75) and found.phi == 0 and found.phi_interval is None


def test_clusters_widen():
    rng = np.random.default_rng(2)
    won, difference = (rng.random(60) < 0.6).astype(float), rng.normal(size=60)
    rows = length_controlled(won.repeat(4), difference.repeat(4), np.arange(240), n=500).interval
    prompts = length_controlled(won.repeat(4), difference.repeat(4), np.arange(60).repeat(4), n=500).interval
    assert (prompts.high - prompts.low) / (rows.high - rows.low) == pytest.approx(2, rel=0.2)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_spearman_equals_scipy(rows):
    a, b = (np.array(c, np.float64) for c in zip(*rows, strict=True))
    found = spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)


def test_report_of_pairs():
    """A margin that is the length difference: perfectly correlated, accuracy that of the longer baseline."""
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(10, 100, 60), rng.integers(10, 100, 60)
    found = length_report(0.1 * (chosen - rejected), chosen, rejected, np.arange(60))
    assert found.correlation == pytest.approx(1) and found.longer_baseline == found.controlled.raw
    assert special.expit(found.controlled.theta) == found.controlled.rate
    assert sum(g.n for g in found.groups) == 60
