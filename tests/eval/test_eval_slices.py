"""Slices, text reports and the frontier: hand-worked, scipy as oracle, symmetries."""

from __future__ import annotations

import mlxdpo_eval  # noqa: F401  (before mlx.core, which texts brings through drift)

# isort: split
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from benchmarks.frontier.areas import hull
from mlxdpo_eval.metrics.drift import distinct_n, text_stats
from mlxdpo_eval.metrics.frontier import Point, pareto_front
from mlxdpo_eval.metrics.intervals import clustered_share
from mlxdpo_eval.metrics.slices import slice_report
from mlxdpo_eval.metrics.texts import distinct_interval, length_ratio, text_report

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def columns():
    """math 30 rows, 15 right; chat 40 rows, 30 right; code 19 rows: hidden."""
    values = [1.0] * 15 + [0.0] * 15 + [1.0] * 30 + [0.0] * 10 + [1.0] * 19
    return values, ["math"] * 30 + ["chat"] * 40 + ["code"] * 19


def test_slices_hand_worked():
    values, column = columns()
    found = slice_report(values, column, range(89))
    assert [(s.name, s.n, s.share) for s in found.shown] == [("math", 30, 0.5), ("chat", 40, 0.75)]
    assert (found.hidden, found.hidden_rows, found.macro, found.worst) == (1, 19, 0.625, found.shown[0])
    assert found.shown[0].difference == pytest.approx(0.5 - 49 / 59)


def test_intervals_hold_together():
    """Two shown slices: each at 97.5 %."""
    values, column = columns()
    math = slice_report(values, column, range(89)).shown[0]
    assert math.interval == clustered_share(values[:30], range(30), level=0.975)


def test_difference_against_the_rest_is_nearly_welch():
    """One row per prompt and many rows: the clustered test and Welch's agree to a few per cent."""
    rng = np.random.default_rng(0)
    values, column = rng.random(400), rng.choice(["a", "b"], 400)
    found = slice_report(values, column.tolist(), range(400)).shown[0]
    inside = column == found.name
    theirs = scipy_stats.ttest_ind(values[inside], values[~inside], equal_var=False).pvalue
    assert found.q == pytest.approx(theirs, rel=0.05)  # both slices have the same p-value, so q is p


def test_one_slice_has_no_rest_and_none_is_a_name():
    found = slice_report([1.0, 0.0] * 15, [None] * 30, range(30))
    assert (found.shown[0].name, found.shown[0].difference, found.shown[0].q) == ("(none)", None, None)
    empty = slice_report([1.0], ["a"], ["p"])
    assert (empty.shown, empty.hidden_rows, empty.macro, empty.worst) == ((), 1, None, None)
    with pytest.raises(ValueError, match="1 values and 2 column entries"):
        slice_report([1.0], ["a", "b"], ["p"])


def test_text_report_is_text_stats_with_intervals():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 30, size=rng.integers(5, 40)).tolist() for _ in range(60)]
    stopped, prompts = (rng.random(60) < 0.8).tolist(), [i // 2 for i in range(60)]
    found = text_report(texts, stopped, prompts)
    values = (found.length.value, found.repetition.value, found.distinct_2.value, found.stopped.value)
    assert values == pytest.approx(tuple(text_stats(texts, stopped)))
    for measured in found[1:]:
        assert measured.interval.low < measured.value < measured.interval.high
        assert measured.interval.clusters == 30


def test_texts_without_anything():
    found = text_report([], [], [])
    assert found.n == 0 and all(m == (None, None) for m in found[1:])
    with pytest.raises(ValueError, match="1 completions, 0 flags, 1 prompts"):
        text_report(["a"], [], ["p"])


def test_jackknife_of_distinct_hand_worked():
    """ "ab" and "cdc": bigrams ab; cd, dc. Left without the first 2/2, without the second 1/1: no spread.

    "aa", "aa", "ab" by three prompts: value 2/3; left 2/2, 2/2, 1/2: mean 5/6, se sqrt(2/3 * (2/36 + 4/36)) = 1/3.
    """
    assert distinct_interval(["ab", "cdc"], ["p", "q"]) == (1.0, None)
    found = distinct_interval(["aa", "aa", "ab"], ["p", "q", "r"])
    assert found.value == pytest.approx(2 / 3)
    assert found.interval[1:3] == (0.0, 1.0)  # 2/3 ± 4.303 / 3, cut to what a share can be


@given(st.lists(st.tuples(st.text("abc", max_size=8), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 3))
def test_jackknife_leaves_out_what_it_says(rows, n):
    """Its values are distinct_n of the set without each prompt."""
    texts, prompts = (list(c) for c in zip(*rows, strict=True))
    found, names = distinct_interval(texts, prompts, n), list(dict.fromkeys(prompts))
    left = [distinct_n([t for t, p in rows if p != name], n) for name in names]
    if found.interval is not None:
        error = np.sqrt((len(left) - 1) / len(left) * ((np.array(left) - np.mean(left)) ** 2).sum())
        half = scipy_stats.t.ppf(0.975, len(left) - 1) * error
        assert found.interval.low == pytest.approx(max(0, found.value - half), abs=1e-9)


def test_length_ratio_hand_worked_and_invariant():
    assert length_ratio([10, 20], [20, 40], ["a", "b"]) == (2.0, None)
    assert length_ratio([0.0], [3.0], ["a"]) == (None, None)
    rng = np.random.default_rng(2)
    base, tuned, prompts = rng.integers(5, 50, 80), rng.integers(20, 90, 80), np.arange(80) // 2
    found = length_ratio(base, tuned, prompts)
    assert found.value == tuned.sum() / base.sum() and found.interval.low < found.value < found.interval.high
    assert length_ratio(3 * base, 3 * tuned, prompts).interval == pytest.approx(found.interval)
    # The delta method's standard error of a ratio of clustered sums.
    sums = np.bincount(prompts, tuned - found.value * base)
    half = 1.96 * np.sqrt((sums**2).sum()) / base.sum()
    assert found.interval.high - found.value == pytest.approx(half, rel=0.15)


def points(pairs):
    return [Point(str(i), float(kl), float(reward)) for i, (kl, reward) in enumerate(pairs)]


def test_frontier_hand_worked():
    """(2, .5) is beaten by (1, .6); (3, .62) stays on the frontier but lies under the line from (1, .6) to (5, .8)."""
    found = pareto_front(points([(0, 0.5), (1, 0.6), (2, 0.5), (3, 0.62), (5, 0.8), (6, 0.8)]))
    assert [p.kl for p in found] == [0, 1, 3, 5]
    assert [p.kl for p in hull(found)] == [0, 1, 5]
    with pytest.raises(ValueError, match="has KL nan"):
        pareto_front([Point("a", float("nan"), 0.0)])


@given(POINTS)
def test_pareto_by_definition(pairs):
    given_points = points(pairs)

    def beaten(p):
        return any(o.kl <= p.kl and o.reward >= p.reward and o[1:3] != p[1:3] for o in given_points)

    assert {p.name for p in pareto_front(given_points)} == {p.name for p in given_points if not beaten(p)}
    corners = hull(given_points)
    assert set(corners) <= set(pareto_front(given_points))
    slopes = [(b.reward - a.reward) / (b.kl - a.kl) for a, b in pairwise(corners)]
    assert slopes == sorted(slopes, reverse=True) and all(s > 0 for s in slopes)
