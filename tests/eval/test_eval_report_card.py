"""The judge's report card and PPI++: published examples, closed forms, planted judges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdpo_eval.metrics.judge_bias import agreement, debiased, position_bias, preference_for_longer, repeat_agreement

NAN = np.nan
VERDICTS = st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.sampled_from([-1, 0, 1])), min_size=2, max_size=30)


def test_kappa_of_cohens_table():
    """Both yes 20, only A 5, only B 10, both no 15: po .7, pe .5 * .6 + .5 * .4 = .5, kappa .4."""
    judge = [1] * 25 + [-1] * 25
    human = [1] * 20 + [-1] * 5 + [1] * 10 + [-1] * 15
    found = agreement(judge, human, range(50), n=300)
    assert (found.raw, found.expected, found.kappa) == pytest.approx((0.7, 0.5, 0.4))
    assert found.kappa_interval.low < 0.4 < found.kappa_interval.high and found.longest is None


def test_three_categories_hand_worked():
    """Diagonal 1, 1, 1 and one tie called a win: po 3/4, pe (2 * 1 + 1 * 2 + 1 * 1) / 16 = 5/16, kappa 7/11."""
    found = agreement([1, 0, -1, 1], [1, 0, -1, 0], "abcd", length_difference=[5, 0, 3, -1])
    assert found.kappa == pytest.approx(7 / 11) and found.longest == 0.5


@settings(max_examples=40)
@given(VERDICTS, st.randoms())
def test_kappa_is_symmetric_bounded_and_blind_to_order_and_names(rows, random):
    judge, human = (list(c) for c in zip(*rows, strict=True))
    prompts = [i // 2 for i in range(len(rows))]
    found = agreement(judge, human, prompts, n=50)
    swapped = agreement(human, judge, prompts, n=50)
    flipped = agreement([-v for v in judge], [-v for v in human], prompts, n=50)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = agreement(*([c[i] for i in order] for c in (judge, human, prompts)), n=50)
    if found.kappa is None:
        assert swapped.kappa is None and len(set(judge) | set(human)) == 1
    else:
        assert -1 <= found.kappa <= 1
        assert (shuffled.kappa_interval is None) == (found.kappa_interval is None)
        if found.kappa_interval is not None:
            assert shuffled.kappa_interval == pytest.approx(found.kappa_interval, abs=1e-9)
        for other in (swapped, flipped, shuffled):
            assert other.kappa == pytest.approx(found.kappa, abs=1e-9)


def test_planted_judges():
    rng = np.random.default_rng(0)
    human, prompts = rng.choice([-1, 1], 400), np.arange(400)
    oracle = agreement(human, human, prompts, n=200)
    assert oracle.raw == oracle.kappa == 1
    chance = agreement(rng.choice([-1, 1], 400), human, prompts, n=400)
    assert chance.kappa_interval.low < 0 < chance.kappa_interval.high
    # A judge that always says "win", humans of whom 90 % do: agreement .9, kappa 0.
    always = agreement([1] * 100, [1] * 90 + [-1] * 10, range(100), n=200)
    assert always.raw == 0.9 and always.kappa == pytest.approx(0)


def test_invalid_is_no_verdict():
    with pytest.raises(ValueError, match="a verdict is 2"):
        agreement([2], [1], ["a"])
    with pytest.raises(ValueError, match="as many"):
        repeat_agreement([1, 1], [1], ["a", "b"])


def test_position_of_an_always_first_judge():
    """It says "first" with logit 2 whatever is there: never consistent, all decided verdicts for the first."""
    found = position_bias([2.0] * 40, [-2.0] * 40, range(40))
    assert (found.consistent, found.first, found.bias) == (0, 1, 2)
    assert found.p == pytest.approx(2 / 2**40) and found.bias_interval is None


def test_position_hand_worked():
    """Quality 2, 2, 1, -1 and bias 1.5: s1 3.5, 3.5, 2.5, .5; s2 .5, .5, -.5, -2.5.

    The first two are consistent. The answer shown first wins all four of s1 and two of s2. Both flips go to it.
    """
    quality, bias = np.array([2.0, 2.0, 1.0, -1.0]), 1.5
    found = position_bias(quality + bias, quality - bias, range(4))
    assert found.consistent == 0.5 and found.bias == 1.5
    assert found.first == pytest.approx(6 / 8) and found.p == 0.5


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=20))
def test_position_mirrors(rows):
    """Exchange which answer is the tuned model's: the bias stays, as does everything else."""
    s1, s2 = (np.array(c) for c in zip(*rows, strict=True))
    a, b = position_bias(s1, s2, range(len(rows))), position_bias(-s2, -s1, range(len(rows)))
    assert b.bias == pytest.approx(a.bias, abs=1e-12) and a.consistent == b.consistent
    assert a.first == b.first and a.p == b.p


def test_retest_and_longer_hand_worked():
    assert repeat_agreement([1, 0, -1, 1], [1, 0, 1, 1], range(4))[0] == 0.75
    found = preference_for_longer([1, -1, 0, 1, 1], [10, -5, 3, -2, 0], range(5), human=[-1, -1, 1, 1, 1])
    assert found.n == 3 and found.prefers_longer == pytest.approx(2 / 3) and found.humans == 0.5
    assert preference_for_longer([0, 1], [1, 0], range(2)) == (0, None, None, None)


def by_formula(h, f, g):
    """Single rows per prompt: arXiv 2311.01453 with each part's own sample variance of the judge."""
    n, m = len(h), len(g)
    weight = np.cov(h, f)[0, 1] / n / (f.var(ddof=1) / n + g.var(ddof=1) / m)
    rest = h - weight * f
    se = np.sqrt(weight**2 * g.var(ddof=1) / m + rest.var(ddof=1) / n)
    return weight * g.mean() + rest.mean(), weight, se


def test_ppi_equals_the_formula():
    rng = np.random.default_rng(1)
    h = (rng.random(60) < 0.58).astype(float)
    f, g = np.clip(0.7 * h + 0.2 * rng.random(60), 0, 1), rng.random(500)
    estimate, weight, se = by_formula(h, f, g)
    found = debiased(h, f, g)
    assert (found.estimate.estimate, found.weight) == pytest.approx((estimate, weight))
    assert found.estimate.high - estimate == pytest.approx(2.0009954 * se, rel=1e-6)  # t, 59 degrees
    assert found.saving == pytest.approx(1 - se**2 / (h.var(ddof=1) / 60))


def test_ppi_extremes():
    """A judge that says nothing leaves the human votes; one that copies the humans uses all the answers."""
    rng = np.random.default_rng(2)
    h = (rng.random(80) < 0.6).astype(float)
    silent = debiased(h, np.full(80, 0.5), np.full(400, 0.5))
    assert silent.weight == 0 and silent.estimate.estimate == pytest.approx(h.mean())
    assert silent.saving == pytest.approx(0)
    g = (rng.random(8000) < 0.6).astype(float)
    perfect = debiased(h, h, g)
    assert perfect.weight > 0.95 and perfect.saving > 0.9


def test_ppi_does_not_mind_the_judges_offset():
    rng = np.random.default_rng(3)
    h, f, g = rng.random(50), rng.random(50), rng.random(300)
    assert debiased(h, f + 7, g + 7).estimate == pytest.approx(debiased(h, f, g).estimate)


def test_ppi_copies_carry_no_evidence():
    rng = np.random.default_rng(4)
    h, g = rng.random(40), rng.random(200)
    f = h + rng.random(40)
    once = debiased(h, f, g)
    twice = debiased(h.repeat(3), f.repeat(3), g.repeat(2), np.arange(40).repeat(3), np.arange(100, 300).repeat(2))
    assert twice.estimate == pytest.approx(once.estimate) and twice.weight == pytest.approx(once.weight)


def test_ppi_without_enough():
    assert debiased([1.0], [1.0], [0.0, 1.0]) is None and debiased([1.0, 0.0], [1.0, 0.0], []) is None
    assert debiased([1.0, 1.0], [1.0, 0.0], [1.0, 0.0]) is None
    with pytest.raises(ValueError, match="1 prompts, such as 'b'"):
        debiased([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], ["a", "b"], ["b", "c"])
