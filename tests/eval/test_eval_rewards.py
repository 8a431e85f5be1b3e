"""Pair metrics and best-of-k against values worked by hand, scipy, and the symmetries they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdpo import PairLogps
from mlxdpo_eval.metrics.best_of_k import best_of, first_is_right, ties_score
from mlxdpo_eval.metrics.rewards import margins, mcnemar, reward_report

NATS = st.floats(-60, -1)


def scores(rows):
    """Rows of (chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len)."""
    return PairLogps(*(np.array(column, np.float64) for column in zip(*rows, strict=True)))


def report(s, beta, prompts=None):
    """The report, each pair a prompt of its own when no prompts are given."""
    return reward_report(s, np.arange(len(s.ref_rejected)) if prompts is None else np.array(prompts), beta)


def swap(s):
    return PairLogps(s.rejected, s.chosen, s.ref_rejected, s.ref_chosen, s.rejected_len, s.chosen_len)


HAND = scores([(-9, -12, -10, -10, 4, 2), (-20, -20, -16, -18, 2, 2), (-5, -5, -5, -5, 1, 1), (-7, -6, -8, -5, 2, 1)])


def test_hand_worked():
    """beta 1/2. Log-ratios of the chosen 1, -4, 0, 1; of the rejected -2, -2, 0, -1; margins 1.5, -1, 0, 1.

    Accuracy (1 + 0 + .5 + 1) / 4. Per token .5 (1/4 + 1), .5 (-2 + 1), 0, .5 (1/2 + 1). Displacement mean -.5,
    one of four fell.
    """
    r = report(HAND, 0.5)
    assert (r.n, r.ties, r.accuracy) == (4, 1, 0.625)
    assert margins(HAND, 0.5).tolist() == [1.5, -1, 0, 1]
    assert r.margin.mean == 0.375 and r.margin.median == 0.5
    assert (r.margin.low_quartile, r.margin.high_quartile) == (-0.25, 1.125)
    assert r.token_margin.mean == pytest.approx((0.625 - 0.5 + 0 + 0.75) / 4)
    assert (r.displacement.mean, r.fell) == (-0.5, 0.25)
    assert r.loss == r.nll == pytest.approx(np.mean(np.log1p(np.exp([-1.5, 1, 0, -1]))))
    assert r.brier == pytest.approx(np.mean((1 / (1 + np.exp([1.5, -1, 0, 1]))) ** 2))


def test_rankings_hand_worked():
    """Policy ranks 1, ½, ½, 0; reference ½, 1, ½, 0: only the last pair is clear of ties, wrong in both."""
    found = report(HAND, 0.5).rankings
    assert found == (0.5, 0.5, 0, 0, 0, 1, 3, 1.0)
    rows = [(-1, -2, -2, -1, 1, 1)] * 7 + [(-2, -1, -1, -2, 1, 1)] * 2 + [(-1, -2, -1, -2, 1, 1)] * 4
    found = report(scores(rows), 0.1).rankings
    assert (found.both, found.gained, found.lost, found.neither) == (4, 7, 2, 0)
    assert found.p == pytest.approx(2 * (1 + 9 + 36) / 512)


def test_an_untouched_policy_reads_one_half():
    rows = [(-9.3, -12.1, -9.3, -12.1, 4, 2)] * 30
    r = report(scores(rows), 0.1)
    assert (r.accuracy, r.ties, r.margin.mean, r.displacement.mean, r.fell) == (0.5, 30, 0, 0, 0)
    assert r.accuracy_interval is None and r.loss == pytest.approx(np.log(2))


@settings(max_examples=50)
@given(st.lists(st.tuples(NATS, NATS, NATS, NATS, st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=20))
def test_swapping_labels_negates(rows):
    s = scores(rows)
    a, b = report(s, 0.2), report(swap(s), 0.2)
    assert a.accuracy + b.accuracy == pytest.approx(1)
    assert (margins(s, 0.2) == -margins(swap(s), 0.2)).all()
    assert a.margin.mean == pytest.approx(-b.margin.mean) and a.token_margin.median == pytest.approx(
        -b.token_margin.median
    )
    assert a.rankings.p == b.rankings.p and a.rankings.gained == b.rankings.lost
    assert a.nll - b.nll == pytest.approx(-a.margin.mean, abs=1e-9)  # softplus(-d) - softplus(d) = -d


@settings(max_examples=50)
@given(
    st.lists(st.tuples(NATS, NATS, NATS, NATS, st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=20),
    st.randoms(),
)
def test_order_and_duplicates(rows, random):
    prompts = [i % 3 for i in range(len(rows))]
    plain = report(scores(rows), 0.1, prompts)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = report(scores([rows[i] for i in order]), 0.1, [prompts[i] for i in order])
    doubled = report(scores(rows * 2), 0.1, prompts * 2)
    for other in (shuffled, doubled):
        assert other.accuracy == pytest.approx(plain.accuracy)
        assert other.margin.mean == pytest.approx(plain.margin.mean, abs=1e-9)
        if plain.margin.interval is not None:
            assert other.margin.interval == pytest.approx(plain.margin.interval, abs=1e-9)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_sum(b, c):
    """2 P(X <= min) of Binomial(b + c, 1/2), never above 1; 1 against 4: 2 (1 + 5) / 32 = .375."""
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail), abs=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b) and mcnemar(1, 4) == pytest.approx(0.375)


def test_nonsense_is_refused():
    good = HAND
    with pytest.raises(ValueError, match="expected one length of at least 1"):
        report(good._replace(chosen=good.chosen[:2]), 0.1)
    with pytest.raises(ValueError, match=r"ref_chosen\[1\] is not finite"):
        report(good._replace(ref_chosen=np.array([0, np.nan, 0, 0])), 0.1)
    with pytest.raises(ValueError, match="no tokens"):
        report(good._replace(chosen_len=np.array([1, 0, 1, 1])), 0.1)


def test_best_of_hand_worked():
    assert first_is_right([3, 1, 2, 0]) == 1 and first_is_right([1, 3, 0, 0]) == 0
    assert first_is_right([2, 2, 2, 0]) == pytest.approx(1 / 3)
    assert first_is_right([2, 2, 2, 0], n_correct=2) == pytest.approx(2 / 3)
    found = best_of([[3, 1, 2, 0], [0, 0, 0, 0], [0, 1]], [1, 1, 1], ["a", "b", "c"])
    assert found.accuracy == pytest.approx(1.25 / 3) and found.chance == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="4 right of 4"):
        first_is_right([1, 2, 3, 4], 4)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6), st.integers(1, 5))
def test_shares_of_the_first_place_add_up_to_one(values, n_correct):
    n_correct = min(n_correct, len(values) - 1)
    reversed_share = first_is_right(values[::-1], len(values) - n_correct)
    assert first_is_right(values, n_correct) + reversed_share == pytest.approx(1)


def test_ties_score_hand_worked():
    """Question 1: right 5, 4.5, wrong 2 (gap 2.5, spread .5), reference 4 against 3 (gap 1): all three hold,
    ratio 2. Question 2: right 5, 1, wrong 0 (gap 1, spread 4), reference 1 against 2 (gap -1): only tied accuracy.
    .3 * 1 + .3 * .5 + .2 * .5 + .2 * .5 + .01 * (tanh 1 + tanh(-1.25)) / 2.
    """
    found = ties_score([([5, 4.5, 2], 2), ([5, 1, 0], 2)], [([4, 3], 1), ([1, 2], 1)])
    assert found[2:6] == (1, 0.5, 0.5, 0.5)
    assert found.score == pytest.approx(0.65 + 0.01 * (np.tanh(1) + np.tanh(-1.25)) / 2)
    with pytest.raises(ValueError, match="1 tied and 0 reference"):
        ties_score([([1, 0], 1)], [])
