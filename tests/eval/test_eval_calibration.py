"""Calibration: hand-worked bins, scipy as oracle for the temperature, the interval's behaviour at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from mlxdpo_eval.metrics.calibration import (
    bin_gaps,
    calibration_report,
    ece_interval,
    equal_mass,
    fit_temperature,
    fold_margins,
    noise_floor,
    split_temperature,
)

MARGINS = st.lists(st.floats(-6, 6), min_size=3, max_size=40)


def test_fold_hand_worked():
    confidence, right = fold_margins(np.array([0.0, np.log(3), -np.log(4)]))
    assert confidence == pytest.approx([0.5, 0.75, 0.8]) and right.tolist() == [0.5, 1, 0]


def test_hand_worked():
    """Two bins: confidences .6, .6, (right, wrong: gap -.1) and .9, .9, .9 (right, right, wrong: gap -.2333).

    ECE (2 * .1 + 3 * .23333) / 5 = .18; ACE .16667; MCE .23333. Brier: (.16 + .36 + .01 + .01 + .81) / 5.
    """
    d = special.logit([0.6, 0.6, 0.9, 0.9, 0.9]) * [1, -1, 1, 1, -1]
    found = calibration_report(d, np.arange(5), bins=2)
    assert [b.n for b in found.bins] == [2, 3]
    assert (found.ece, found.ace, found.mce) == pytest.approx((0.18, 1 / 6, 0.7 / 3))
    assert found.brier == pytest.approx(1.35 / 5) and found.ece_interval is None
    assert found.nll == pytest.approx(-np.log([0.6, 0.4, 0.9, 0.9, 0.1]).mean())


@given(MARGINS, st.integers(1, 12))
def test_bins_hold_everyone_once_and_equals_together(margins, bins):
    confidence, right = fold_margins(np.array(margins))
    codes = equal_mass(confidence, bins)
    gaps, sizes = bin_gaps(confidence, right, codes)
    assert sizes.sum() == len(margins) and sizes.min() > 0 and len(sizes) <= bins
    assert gaps @ sizes == pytest.approx((right - confidence).sum(), abs=1e-9)
    order = np.argsort(confidence, kind="stable")
    assert (np.diff(codes[order]) >= 0).all()
    for c in np.unique(confidence):
        assert len(set(codes[confidence == c])) == 1


def test_bins_of_equal_mass():
    assert np.bincount(equal_mass(np.random.default_rng(0).random(100), 10)).tolist() == [10] * 10


@settings(max_examples=60)
@given(MARGINS)
def test_temperature_is_the_optimum(margins):
    d = np.array(margins)
    t = fit_temperature(d)
    if d.mean() <= 0 or d.min() >= 0:
        assert t is None
    elif d.mean() > 1e-3 and d.min() < -1e-3:
        theirs = optimize.minimize_scalar(
            lambda u: np.logaddexp(0, -d * np.exp(u)).mean(),
            bounds=(-12, 12),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert np.logaddexp(0, -d / t).mean() <= theirs.fun + 1e-9


def test_temperature_hand_worked():
    """d is 2 three times and -2 once: sigmoid(2 / T) = 3/4, T = 2 / ln 3."""
    assert fit_temperature(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / np.log(3))


@given(MARGINS, st.floats(0.1, 10))
def test_temperature_scales_with_the_margins(margins, factor):
    d = np.array(margins)
    t, scaled = fit_temperature(d), fit_temperature(factor * d)
    if t is not None and scaled is not None and 1e-3 < t < 1e3:
        assert scaled == pytest.approx(factor * t, rel=1e-6)


def test_a_known_temperature_comes_back_and_helps_the_other_half():
    rng = np.random.default_rng(0)
    strength = np.abs(rng.normal(0, 4, 6000))
    d = np.where(rng.random(6000) < special.expit(strength / 2.5), strength, -strength)
    names = [f"prompt {i // 2}" for i in range(6000)]
    found = split_temperature(d, np.array(names))
    assert found.temperature == pytest.approx(2.5, rel=0.1) and found.fitted == found.tested == 3000
    assert found.nll[1] < found.nll[0] and found.ece[1] < found.ece[0] / 2
    order = rng.permutation(6000)
    assert split_temperature(d[order], np.array(names)[order]).temperature == pytest.approx(found.temperature)


def test_order_of_rows_does_not_matter():
    rng = np.random.default_rng(5)
    d, prompts = rng.normal(1, 2, 300), np.array([f"prompt {i // 2}" for i in range(300)])
    found, order = calibration_report(d, prompts), rng.permutation(300)
    again = calibration_report(d[order], prompts[order])
    assert again.ece_interval == pytest.approx(found.ece_interval, abs=1e-9)
    assert again.floor == pytest.approx(found.floor, abs=1e-9)
    assert again.temperature[:3] == pytest.approx(found.temperature[:3], abs=1e-9)


def test_halves_share_no_prompt():
    found = split_temperature(np.array([1.0, -0.5, 2.0]), np.array(["a", "a", "a"]))
    assert (found.fitted, found.tested) in ((0, 3), (3, 0)) and found.nll is None


def sample(rng, n, true_temperature):
    d = np.abs(rng.normal(0.8, 1.5, n))
    return special.expit(d), (rng.random(n) < special.expit(d / true_temperature)).astype(float)


def test_floor_of_a_calibrated_model():
    """Mean |gap| of a bin of m pairs is about sqrt(2 / pi) sd / sqrt(m), the normal's mean deviation."""
    confidence = np.full(4000, 0.8)
    codes = np.repeat(np.arange(10), 400)
    average, high, p = noise_floor(confidence, codes, 0.0)
    assert average == pytest.approx(np.sqrt(2 / np.pi) * 0.4 / 20, rel=0.03) and high > average and p == 1
    assert noise_floor(confidence, codes, 0.5)[2] == pytest.approx(1 / 1001)


def test_interval_starts_at_zero_for_a_calibrated_model_and_not_for_a_bad_one():
    rng = np.random.default_rng(1)
    for true_temperature, zero in ((1.0, True), (3.0, False)):
        confidence, right = sample(rng, 800, true_temperature)
        codes = equal_mass(confidence, 10)
        found = ece_interval(confidence, right, codes, np.arange(800))
        assert (found.low == 0) is zero and found.high > found.low
        assert found == ece_interval(confidence, right, codes, np.arange(800))


def test_interval_narrows_onto_the_truth():
    confidence, right = sample(np.random.default_rng(2), 100_000, 2.0)
    codes = equal_mass(confidence, 10)
    truth = np.abs(bin_gaps(confidence, special.expit(special.logit(confidence) / 2), codes)[0]).mean()
    found = ece_interval(confidence, right, codes, np.arange(100_000))
    assert found.low <= truth <= found.high and found.high - found.low < 0.02


def test_no_interval_for_small_bins_or_one_prompt():
    confidence, right = sample(np.random.default_rng(3), 90, 1.0)
    assert ece_interval(confidence, right, equal_mass(confidence, 10), np.arange(90)) is None
    assert ece_interval(confidence, right, equal_mass(confidence, 3), np.zeros(90)) is None


def test_an_untrained_policy():
    """All margins 0: every confidence is 1/2, every pair a tie, in one bin without error."""
    found = calibration_report(np.zeros(50), np.arange(50))
    assert len(found.bins) == 1 and found.ece == 0 and found.nll == pytest.approx(np.log(2))
    assert found.temperature.temperature is None
    with pytest.raises(ValueError, match="no margins"):
        calibration_report(np.array([]), np.array([]))
