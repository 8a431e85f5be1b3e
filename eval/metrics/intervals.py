"""Intervals for evaluation results: seeded, and none at all where the data cannot carry one.

Samples of one prompt are not independent: what is resampled is prompts (clusters), not rows. With two to six
dependent rows per prompt, the nominal 90 % interval of a row bootstrap covers the truth 62 % of the time.

Means and shares of clustered rows have closed forms, without resampling or seed: Student's t on the clustered standard
error (arXiv 2411.00640) for means; for shares, where a symmetric interval leaves [0, 1] and covers too little near its
ends, Wilson's with the sample size that the clustered standard error implies (Korn and Graubard 1998; Dean and Pagano
2015).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy import special

Statistic = Callable[[np.ndarray], float]
"""Vector of values -> number."""
Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray

CHUNK = 256  # resamples held in memory at once


class Interval(NamedTuple):
    """An estimate with its confidence interval, and how many independent clusters stand behind it."""

    estimate: float
    low: float
    high: float
    clusters: int


def mean(values: np.ndarray) -> float:
    """The arithmetic mean."""
    return float(np.mean(values))


def cluster_bootstrap(
    values: Values, clusters: Clusters, statistic: Statistic = mean, n: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Expanded percentile interval of `statistic(values)` from `n` resamples of whole clusters.

    `clusters[i]` names the cluster of `values[i]` (say, its prompt). The estimate is the statistic of the
    data as they are. None when the data cannot carry an interval: fewer than two clusters, or resamples that
    do not differ (twenty wins in twenty do not make the win rate certain; for one row per prompt `wilson` has
    an answer). The percentile method is Efron and Tibshirani 1993, chapter 13, its levels those of `percentile_levels`;
    resampling clusters is Davison and Hinkley 1997, section 3.8. Raises `ValueError` for lengths that differ,
    values that are not finite, or a level outside (0, 1).
    """
    data, labels = number_clusters(values, clusters)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    groups = [data[labels == i] for i in range(labels.max() + 1)] if len(data) else []
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    resampled = _means(groups, n, rng) if statistic is mean else _statistics(groups, statistic, n, rng)
    low, high = np.quantile(resampled, percentile_levels(level, len(groups)))
    # Equal clusters of unequal size differ by rounding alone.
    if np.isclose(low, high, rtol=1e-9, atol=1e-12):
        return None
    return Interval(statistic(data), float(low), float(high), len(groups))


def percentile_levels(level: float, clusters: int) -> tuple[float, float]:
    """The two quantiles of the resamples that make an interval of `level`, for two clusters or more.

    Resamples of C clusters spread too little by sqrt((C - 1) / C), and their quantiles are a normal's where
    Student's belong. Hence Phi(-+ sqrt(C / (C - 1)) t), t the Student quantile with C - 1 degrees of freedom
    (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279).
    """
    t = special.stdtrit(clusters - 1, (1 + level) / 2)
    low = float(special.ndtr(-np.sqrt(clusters / (clusters - 1)) * t))
    return low, 1 - low


def number_clusters(values: Values, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """The values, and each one's cluster as a number counted from 0 in alphabetical order of the names.

    So a resample with a given seed holds the same clusters whatever the order of the rows.
    Raises `ValueError` for lengths that differ and for values that are not finite.
    """
    data = np.asarray(values, np.float64)
    if data.shape != (len(clusters),):
        raise ValueError(f"{data.shape} values and {len(clusters)} cluster names; expected one name per value")
    if not np.isfinite(data).all():
        first = int(np.argmin(np.isfinite(data)))
        raise ValueError(f"value {first} is {data[first]}; drop invalid results and count them")
    numbers = {name: i for i, name in enumerate(sorted(dict.fromkeys(clusters), key=str))}
    return data, np.array([numbers[name] for name in clusters], np.int64)


def _means(groups: list[np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """The mean needs each cluster's sum and size only, so all resamples are two gathers."""
    sums, sizes = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    parts = []
    for done in range(0, n, CHUNK):
        drawn = rng.integers(len(groups), size=(min(CHUNK, n - done), len(groups)))
        parts.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(parts)


def _statistics(groups: list[np.ndarray], statistic: Statistic, n: int, rng: np.random.Generator) -> np.ndarray:
    draws = (rng.integers(len(groups), size=len(groups)) for _ in range(n))
    return np.array([statistic(np.concatenate([groups[i] for i in drawn])) for drawn in draws])


def paired_difference(
    before: Values, after: Values, clusters: Clusters, n: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Mean of `after - before`, measured on the same items in the same order, with a cluster interval.

    The items' own difficulty cancels in each difference, so this interval is narrower than that of two
    separate means. None as in `cluster_bootstrap`: below two clusters, or when every cluster changed alike (an
    untouched model against itself).
    """
    if len(before) != len(after):
        raise ValueError(
            f"{len(before)} values before and {len(after)} after; a paired difference needs the same items"
        )
    return cluster_bootstrap(np.subtract(after, before).tolist(), clusters, mean, n, seed, level)


def wilson(successes: float, n: int, level: float = 0.95) -> Interval | None:
    """Wilson's score interval of a share (Wilson 1927); `successes` may hold halves for ties. None for n = 0.

    With z the normal quantile and p = successes / n:
    centre (p + z²/2n) / (1 + z²/n), half width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n).
    For one row per prompt only: rows that share a prompt need `cluster_bootstrap`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; expected between 0 and {n}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    if n == 0:
        return None
    p, z2n = successes / n, NormalDist().inv_cdf((1 + level) / 2) ** 2 / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = float(np.sqrt(z2n * (p * (1 - p) + z2n / 4))) / (1 + z2n)
    # At 0 and n a bound is 0 or 1 exactly; rounding must not move it.
    low = centre - half if successes > 0 else 0.0
    high = centre + half if successes < n else 1.0
    return Interval(p, low, high, n)


def quantile_t(level: float, clusters: int) -> float:
    """The two-sided Student quantile of `level` with clusters - 1 degrees of freedom. Raises `ValueError`."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    if clusters < 2:
        raise ValueError(f"{clusters} clusters; a spread between clusters needs at least two")
    return float(special.stdtrit(clusters - 1, (1 + level) / 2))


def clustered_se(values: Values, clusters: Clusters) -> float | None:
    """Standard error of the mean: sqrt(C / (C - 1) sum_c (sum_{i in c} (v_i - mean))²) / n (arXiv 2411.00640).

    C clusters, n values. None below two clusters: the spread between clusters is then unknown, not 0.
    With one value per cluster it is the usual s / sqrt(n). Raises `ValueError` as `number_clusters`.
    """
    data, labels = number_clusters(values, clusters)
    return _se(data, labels)


def _se(data: np.ndarray, labels: np.ndarray) -> float | None:
    count = int(labels.max()) + 1 if len(labels) else 0
    if count < 2:
        return None
    totals = np.bincount(labels, data - data.mean())
    return float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(data))


def clustered_mean(values: Values, clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Mean with a t interval, C - 1 degrees of freedom; None below two clusters or without any spread."""
    data, labels = number_clusters(values, clusters)
    error = _se(data, labels)
    # Equal values differ from their mean by rounding alone.
    if error is None or error <= 1e-12 * np.abs(data).max():
        return None
    count, mean = int(labels.max()) + 1, float(data.mean())
    half = quantile_t(level, count) * error
    return Interval(mean, mean - half, mean + half, count)


def clustered_share(values: Values, clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Mean of values in [0, 1] (wins; halves for ties) with an interval that stays inside [0, 1].

    Wilson's formula with n* = p (1 - p) / se², se clustered, in place of n and Student's t (C - 1 degrees of
    freedom) in place of z. Dependent rows make n* smaller than n, halves make it larger. When every value is
    0 or every value is 1, n* is the number of clusters: the rows of one prompt may be copies. None below two
    clusters, or when all values are one and the same share in between. Raises `ValueError` for values
    outside [0, 1].
    """
    data, labels = number_clusters(values, clusters)
    if len(data) and (data.min() < 0 or data.max() > 1):
        raise ValueError(f"values are in [{data.min()}, {data.max()}]; a share needs values between 0 and 1")
    error = _se(data, labels)
    if error is None:
        return None
    count, share = int(labels.max()) + 1, float(data.mean())
    if share in (0.0, 1.0):
        return wilson(share * count, count, level)
    if error <= 1e-12:
        return None
    z2n = (quantile_t(level, count) * error) ** 2 / (share * (1 - share))
    centre = (share + z2n / 2) / (1 + z2n)
    half = float(np.sqrt(z2n * (share * (1 - share) + z2n / 4))) / (1 + z2n)
    return Interval(share, centre - half, centre + half, count)


def mean_or_none(values: Values) -> float | None:
    """The mean of the values, None of none."""
    return float(np.mean(values)) if len(values) else None
