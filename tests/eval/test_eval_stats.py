"""Intervals: closed forms, hand-worked values, and coverage by simulation with fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mlxdpo_eval.metrics.intervals import (
    cluster_bootstrap,
    number_clusters,
    paired_difference,
    percentile_levels,
    wilson,
)


def test_wilson_hand_worked():
    """p = 1/2, n = 4, z = 1.959964, z² / n = .9603648.

    centre (.5 + .4801824) / 1.9603648 = .5;
    half width sqrt(.9603648 * (.25 + .2400912)) / 1.9603648 = sqrt(.4706663) / 1.9603648 = .3499610.
    """
    found = wilson(2, 4)
    assert found == (0.5, pytest.approx(0.1500390, abs=1e-6), pytest.approx(0.8499610, abs=1e-6), 4)


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.8, 0.95]),
)
def test_wilson_equals_scipy(kn, level):
    k, n = kn
    theirs = binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson(k, n, level)[1:3] == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.integers(1, 300), st.floats(0, 1))
def test_wilson_bounds_solve_the_score_equation(n, share):
    """|p - bound| = z sqrt(bound (1 - bound) / n): the definition, for shares with ties counted half too."""
    p, low, high, _ = wilson(round(share * n * 2) / 2, n)
    for bound in (low, high):
        assert abs(p - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / n), abs=1e-6)
    assert 0 <= low <= p <= high <= 1 and low < high


def test_wilson_without_data_or_with_nonsense():
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 4, level=95)


def test_fewer_than_two_clusters_give_no_interval():
    assert cluster_bootstrap([], []) is None
    assert cluster_bootstrap([1.0, 2.0, 3.0], ["a", "a", "a"]) is None
    assert cluster_bootstrap([1.0, 2.0], ["a", "b"]) is not None


def test_never_a_zero_width():
    """No spread between clusters is no knowledge of it; so is a middle share that lies on one atom."""
    assert cluster_bootstrap([1.0] * 20, list(range(20))) is None
    assert cluster_bootstrap([0.1] * 20, [i // 3 for i in range(20)]) is None
    assert paired_difference([0.3, 0.7], [0.3, 0.7], ["a", "b"]) is None
    assert cluster_bootstrap([0.0, 4.0, 0.0, 0.0], ["a", "b", "a", "a"], level=0.2) is None


def test_two_clusters_hand_worked():
    """Clusters {0, 0, 0} and {4}: a resample's mean is 0, 1 (two ways in four) or 4; the ends are 0 and 4."""
    assert cluster_bootstrap([0.0, 4.0, 0.0, 0.0], ["a", "b", "a", "a"]) == (1.0, 0.0, 4.0, 2)


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 4)), min_size=2, max_size=25),
    st.integers(0, 3),
)
def test_the_fast_mean_equals_any_statistic(rows, seed):
    """The gathered mean and the general path draw the same clusters when all fit one chunk's draw order."""
    values, clusters = zip(*rows, strict=True)
    fast = cluster_bootstrap(values, clusters, n=150, seed=seed)
    slow = cluster_bootstrap(values, clusters, statistic=lambda v: float(np.mean(v)), n=150, seed=seed)
    assert fast is None or len(set(clusters)) > 1
    if fast and slow:
        assert fast == pytest.approx(slow, abs=1e-9)
        assert fast.low <= fast.high and fast.clusters == len(set(clusters))


@given(st.permutations(range(36)))
def test_order_of_rows_does_not_matter(order):
    values = np.random.default_rng(0).normal(size=36)
    clusters = np.array([f"prompt {i // 3}" for i in range(36)])
    found = cluster_bootstrap(values[order], clusters[order], n=100)
    assert found == pytest.approx(cluster_bootstrap(values, clusters, n=100), abs=1e-12)


def test_shift_and_scale_carry_over():
    values, clusters = np.random.default_rng(1).normal(size=40), np.repeat(np.arange(8), 5).tolist()
    base = np.array(cluster_bootstrap(values, clusters)[:3])
    assert np.array(cluster_bootstrap(3 * values + 2, clusters)[:3]) == pytest.approx(3 * base + 2)


def test_none_and_all_have_a_bound_that_is_exactly_0_or_1():
    assert all(wilson(0, n).low == 0.0 and wilson(n, n).high == 1.0 for n in range(1, 400))


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, -0.5])
def test_a_level_lies_strictly_between_0_and_1(level):
    for interval in (lambda: cluster_bootstrap([1.0, 2.0], ["a", "b"], level=level), lambda: wilson(1, 2, level)):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            interval()


def test_tails_hand_worked():
    """Level 1/2. Two clusters: Student's 3/4 quantile with one degree of freedom is tan(pi/4) = 1, so Phi(-sqrt 2).
    Three: with two degrees it is (2p - 1) / sqrt(2p (1 - p)) = .5 / sqrt(.375) = sqrt(2/3), so Phi(-1)."""
    assert percentile_levels(0.5, 2) == pytest.approx((0.0786496, 0.9213504), abs=1e-7)
    assert percentile_levels(0.5, 3) == pytest.approx((0.1586553, 0.8413447), abs=1e-7)


def test_narrow_and_tiny_intervals_are_intervals():
    """What is None is no spread at all, not a spread that is small beside the values or beside 1."""
    assert cluster_bootstrap([1e6, 1e6 + 0.5], ["a", "b"])[1:3] == (1e6, 1e6 + 0.5)
    assert cluster_bootstrap([1e-9, 3e-9], ["a", "b"])[1:3] == (1e-9, 3e-9)


def test_values_meet_their_clusters_in_order_of_names():
    data, labels = number_clusters([5, 6, 7], [10, 9, 10])
    assert data.tolist() == [5.0, 6.0, 7.0] and data.dtype == np.float64
    assert labels.tolist() == [0, 1, 0]  # by name, "10" before "9"


def test_a_resample_of_many_chunks_uses_every_draw():
    """Resamples in chunks of 256 are the ones of one draw after the other: NumPy's stream goes on."""
    values, names = np.random.default_rng(6).normal(size=9), list("abcdefghi")
    rng = np.random.default_rng(5)
    means = [values[rng.integers(9, size=9)].mean() for _ in range(700)]
    low, high = np.quantile(means, percentile_levels(0.6, 9))
    assert cluster_bootstrap(values, names, n=700, seed=5, level=0.6)[1:3] == pytest.approx((low, high))


def test_a_median_of_resamples_is_a_value_of_the_data():
    """Three singles 0, 0, 9: a resample's median is 9 with probability 7/27, and never the mean 3."""
    found = cluster_bootstrap([0.0, 0.0, 9.0], ["a", "b", "c"], statistic=lambda v: float(np.median(v)), level=0.6)
    assert found == (0.0, 0.0, 9.0, 3)


def test_defaults_are_2000_resamples_seed_0_level_95():
    values, before = np.random.default_rng(4).normal(size=(2, 12)).tolist()
    names = list("abcdefghijkl")
    assert cluster_bootstrap(values, names) == cluster_bootstrap(values, names, n=2000, seed=0, level=0.95)
    found = paired_difference(before, values, names)
    assert found == paired_difference(before, values, names, n=2000, seed=0, level=0.95)
    other = [paired_difference(before, values, names, **{k: v}) for k, v in (("n", 50), ("seed", 1), ("level", 0.5))]
    assert found not in other and len(set(other)) == 3


def test_seed_and_median():
    values, clusters = np.random.default_rng(2).normal(size=60), np.repeat(np.arange(20), 3).tolist()
    assert cluster_bootstrap(values, clusters, seed=1) == cluster_bootstrap(values, clusters, seed=1)
    assert cluster_bootstrap(values, clusters, seed=1) != cluster_bootstrap(values, clusters, seed=2)
    found = cluster_bootstrap(values, clusters, statistic=lambda v: float(np.median(v)), n=300)
    assert found.estimate == np.median(values) and found.low < found.estimate < found.high


def coverage(clusters_named: bool) -> float:
    """Share of 300 simulated studies whose nominal 90 % interval holds the true mean 0.

    60 prompts x 5 samples, prompt effect and sample noise of equal variance.
    """
    rng, hits = np.random.default_rng(7), 0
    for _ in range(300):
        values = (rng.normal(size=(60, 1)) + rng.normal(size=(60, 5))).ravel()
        names = np.repeat(np.arange(60), 5) if clusters_named else np.arange(300)
        found = cluster_bootstrap(values, names.tolist(), n=300, level=0.9)
        hits += found.low <= 0 <= found.high
    return hits / 300


def test_coverage_is_nominal_by_prompt_and_falls_short_by_row():
    """An estimated 90 % varies by .017. By row the standard error is sqrt(2 / 6) of the true one: 66 %."""
    assert 0.85 <= coverage(clusters_named=True) <= 0.95
    assert coverage(clusters_named=False) < 0.75


def test_paired_difference_is_the_bootstrap_of_differences_and_narrower():
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(30), 4).tolist()
    difficulty = rng.normal(size=30).repeat(4) * 3
    before, after = difficulty + rng.normal(size=120) * 0.1, difficulty + 0.5 + rng.normal(size=120) * 0.1
    found = paired_difference(before.tolist(), after.tolist(), prompts)
    assert found == cluster_bootstrap(after - before, prompts)
    assert found.low > 0.4 and found.high < 0.6
    alone = cluster_bootstrap(after, prompts)
    assert found.high - found.low < (alone.high - alone.low) / 10
    swapped = paired_difference(after.tolist(), before.tolist(), prompts)
    assert swapped[:3] == pytest.approx((-found.estimate, -found.high, -found.low))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="expected one name per value"):
        cluster_bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="value 1 is nan"):
        cluster_bootstrap([1.0, float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match="level is 95"):
        cluster_bootstrap([1.0, 2.0], ["a", "b"], level=95)
    with pytest.raises(ValueError, match="2 values before and 1 after"):
        paired_difference([1.0, 2.0], [1.0], ["a", "b"])
