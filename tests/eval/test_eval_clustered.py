"""Clustered standard errors and intervals against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mlxdpo_eval.metrics.intervals import (
    clustered_mean,
    clustered_se,
    clustered_share,
    mean_or_none,
    quantile_t,
    wilson,
)

# Multiples of 1/8, so that 1 - v is exact and "all alike" survives it.
ROWS = st.lists(st.tuples(st.integers(0, 8).map(lambda k: k / 8), st.integers(0, 5)), min_size=2, max_size=30)


def test_clustered_se_hand_worked():
    """Clusters {1, 2} and {3}: mean 2, sums of residuals -1 and 1; sqrt(2 / 1 * (1 + 1)) / 3 = 2 / 3."""
    assert clustered_se([1.0, 2.0, 3.0], ["a", "a", "b"]) == pytest.approx(2 / 3)


def test_clustered_share_hand_worked():
    """Two clusters {1, 1}, {0}: p 2/3, se 4/9 (sums 2/3 and -2/3: sqrt(2 * 8/9) / 3), t = 12.706205 with 1 degree.

    z²/n = (t se)² / (p (1 - p)) = 31.8905 / .2222 = 143.507; centre (.66667 + 71.7536) / 144.507 = .501153;
    half sqrt(143.507 (.22222 + 35.8768)) / 144.507 = .498076.
    """
    found = clustered_share([1.0, 1.0, 0.0], ["a", "a", "b"])
    assert found[1:3] == pytest.approx((0.501153 - 0.498076, 0.501153 + 0.498076), abs=2e-5)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_one_row_per_cluster_is_the_t_interval(values):
    found = clustered_mean(values, range(len(values)))
    if found is not None:
        error = scipy_stats.sem(values)
        theirs = scipy_stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert found[1:3] == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@given(ROWS)
def test_copies_of_rows_carry_no_evidence(rows):
    """Each row twice in its own cluster: the same estimate and interval."""
    values, clusters = (list(x) for x in zip(*rows, strict=True))
    once, twice = clustered_share(values, clusters), clustered_share(values * 2, clusters * 2)
    assert (once is None) == (twice is None)
    if once is not None:
        assert twice == pytest.approx(once, abs=1e-9)


@given(ROWS, st.randoms())
def test_order_does_not_matter_and_labels_swapped_mirror(rows, random):
    values, clusters = (list(x) for x in zip(*rows, strict=True))
    found = clustered_share(values, clusters)
    random.shuffle(rows)
    again = clustered_share(*zip(*rows, strict=True))
    mirrored = clustered_share([1 - v for v in values], clusters)
    assert (found is None) == (again is None) == (mirrored is None)
    if found is not None:
        assert again == pytest.approx(found, abs=1e-9)
        assert mirrored[:3] == pytest.approx((1 - found[0], 1 - found[2], 1 - found[1]), abs=1e-9)
        assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_quantile_hand_worked():
    """One degree of freedom: tan(pi (p - 1/2)), at p = 3/4 that is 1. Two: sqrt(2/3) there."""
    assert quantile_t(0.5, 2) == pytest.approx(1) and quantile_t(0.5, 3) == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, -0.5])
def test_a_level_lies_strictly_between_0_and_1(level):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        quantile_t(level, 5)


def test_one_cluster_has_no_quantile():
    with pytest.raises(ValueError, match="1 clusters"):
        quantile_t(0.95, 1)


def test_clustered_mean_hand_worked():
    """Clusters {1, 2}, {3} at level 1/2: mean 2, standard error 2/3, quantile 1."""
    found = clustered_mean([1.0, 2.0, 3.0], ["a", "a", "b"], 0.5)
    assert found == (2.0, pytest.approx(4 / 3), pytest.approx(8 / 3), 2)
    assert clustered_mean([1.0, 2.0, 3.0], ["a", "a", "b"]) == clustered_mean([1.0, 2.0, 3.0], ["a", "a", "b"], 0.95)
    assert clustered_mean([], []) is None


def test_spread_is_judged_beside_the_values():
    """Values near 1e9 that differ by one have a spread; equal ones that only rounding tells apart have none."""
    assert clustered_mean([1e9, 1e9 + 1], ["a", "b"], 0.5)[1:3] == pytest.approx((1e9, 1e9 + 1), rel=1e-12)
    assert clustered_mean([1e-9, 3e-9], ["a", "b"], 0.5)[1:3] == pytest.approx((1e-9, 3e-9), abs=1e-15)
    assert clustered_mean([0.1] * 7 + [0.1 + 1e-17], [0, 0, 1, 1, 1, 2, 2, 2]) is None


def test_clusters_that_only_rounding_tells_apart_have_no_spread():
    """The same values in another order sum to another last digit; a zero among them changes nothing."""
    draw = np.random.default_rng(0)
    for _ in range(40):
        values = np.append(draw.uniform(1, 9, 5), 0.0)
        both = np.concatenate([values, draw.permutation(values)])
        assert clustered_mean(both, ["a"] * 6 + ["b"] * 6) is None


def test_share_of_values():
    assert mean_or_none([]) is None and mean_or_none([0.0, 0.5, 1.0, 1.0]) == 0.625


def test_shares_outside_0_and_1_are_refused_at_either_end():
    for values in ([-0.5, 0.5], [0.5, 1.5]):
        with pytest.raises(ValueError, match="a share needs values between 0 and 1"):
            clustered_share(values, ["a", "b"])


def test_all_wins_stand_on_prompts_not_rows():
    assert clustered_share([1.0] * 30, [i // 3 for i in range(30)]) == wilson(10, 10)
    assert clustered_share([0.0] * 4, range(4)) == wilson(0, 4)


def test_no_interval_where_data_cannot_carry_one():
    assert clustered_share([1.0, 0.0], ["a", "a"]) is None and clustered_share([], []) is None
    assert clustered_share([0.5] * 10, range(10)) is None
    assert clustered_mean([3.0] * 10, range(10)) is None and clustered_se([1.0], ["a"]) is None
    with pytest.raises(ValueError, match=r"values are in \[0.0, 2.0\]"):
        clustered_share([0.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="level is 95"):
        clustered_mean([0.0, 2.0], [0, 1], level=95)


def test_independent_wins_nearly_wilson():
    """One 0 or 1 per prompt: se² = p (1 - p) / (n - 1) and t for z, a trifle wider than Wilson's."""
    values = [1.0] * 60 + [0.0] * 40
    ours, plain = clustered_share(values, range(100)), wilson(60, 100)
    assert ours.low == pytest.approx(plain.low, abs=0.003) and ours.high == pytest.approx(plain.high, abs=0.003)
    assert ours.low < plain.low and ours.high > plain.high
