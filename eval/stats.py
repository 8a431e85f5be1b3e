"""Intervals for evaluation results: seeded, and none at all where the data cannot carry one.

Samples of one prompt are not independent: what is resampled is prompts (clusters), not rows. With two to six
dependent rows per prompt, the nominal 90 % interval of a row bootstrap covers the truth 62 % of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy import special

Statistic = Callable[[np.ndarray], float]
"""Vector of values -> number."""

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
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    statistic: Statistic = mean,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Expanded percentile interval of `statistic(values)` from `n` resamples of whole clusters.

    `clusters[i]` names the cluster of `values[i]` (say, its prompt). The estimate is the statistic of the
    data as they are. None when the data cannot carry an interval: fewer than two clusters, or resamples that
    do not differ (twenty wins in twenty do not make the win rate certain; for one row per prompt `wilson` has
    an answer). The percentile method is Efron and Tibshirani 1993, chapter 13, its levels those of `tails`;
    resampling clusters is Davison and Hinkley 1997, section 3.8. Raises `ValueError` for lengths that differ,
    values that are not finite, or a level outside (0, 1).
    """
    data, labels = checked(values, clusters)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    groups = [data[labels == i] for i in range(labels.max() + 1)] if len(data) else []
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    resampled = _means(groups, n, rng) if statistic is mean else _statistics(groups, statistic, n, rng)
    low, high = np.quantile(resampled, tails(level, len(groups)))
    # Equal clusters of unequal size differ by rounding alone.
    if np.isclose(low, high, rtol=1e-9, atol=1e-12):
        return None
    return Interval(statistic(data), float(low), float(high), len(groups))


def tails(level: float, clusters: int) -> tuple[float, float]:
    """The two quantiles of the resamples that make an interval of `level`, for two clusters or more.

    Resamples of C clusters spread too little by sqrt((C - 1) / C), and their quantiles are a normal's where
    Student's belong. Hence Phi(-+ sqrt(C / (C - 1)) t), t the Student quantile with C - 1 degrees of freedom
    (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279).
    """
    t = special.stdtrit(clusters - 1, (1 + level) / 2)
    low = float(special.ndtr(-np.sqrt(clusters / (clusters - 1)) * t))
    return low, 1 - low


def checked(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The values, and each one's cluster as a number counted from 0 in alphabetical order of the names.

    So a resample with a given seed holds the same clusters whatever the order of the rows.
    Raises `ValueError` for lengths that differ and for values that are not finite.
    """
    data = np.asarray(values, np.float64)
    if data.shape != (len(clusters),):
        raise ValueError(f"{data.shape} values and {len(clusters)} cluster names; expected one name per value")
    if not np.isfinite(data).all():
        first = int(np.argmin(np.isfinite(data)))
        raise ValueError(f"value {first} is {data[first]}; leave invalid results out and count them")
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
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Mean of `after - before`, measured on the same items in the same order, with a cluster interval.

    The items' own difficulty cancels in each difference, so this interval is narrower than that of two
    separate means. None as in `cluster_bootstrap`: below two
    clusters, or when every cluster changed alike (an untouched model against itself).
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
