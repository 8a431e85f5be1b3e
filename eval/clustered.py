"""Closed-form intervals for means and shares of rows that come in clusters (several rows of one prompt).

Student's t on the clustered standard error (arXiv 2411.00640) for means. For shares, where a
symmetric interval leaves [0, 1] and covers too little near its ends, Wilson's with the sample size that the
clustered standard error implies (Korn and Graubard 1998; Dean and Pagano 2015). No resampling, so no seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

from .stats import Interval, checked, wilson

Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


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
    With one value per cluster it is the usual s / sqrt(n). Raises `ValueError` as `stats.checked`.
    """
    data, labels = checked(values, clusters)
    return _se(data, labels)


def _se(data: np.ndarray, labels: np.ndarray) -> float | None:
    count = int(labels.max()) + 1 if len(labels) else 0
    if count < 2:
        return None
    totals = np.bincount(labels, data - data.mean())
    return float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(data))


def clustered_mean(values: Values, clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Mean with a t interval, C - 1 degrees of freedom; None below two clusters or without any spread."""
    data, labels = checked(values, clusters)
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
    data, labels = checked(values, clusters)
    if len(data) and (data.min() < 0 or data.max() > 1):
        raise ValueError(f"values lie in [{data.min()}, {data.max()}]; a share needs values between 0 and 1")
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


def share_of(values: Values) -> float | None:
    """The mean of the values, None of none."""
    return float(np.mean(values)) if len(values) else None
