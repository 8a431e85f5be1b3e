"""Krippendorff's alpha: agreement of any number of raters, some of whose ratings may be missing."""

from __future__ import annotations

import numpy as np


def nominal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of categories without order: 0 when equal, else 1."""
    return (a != b).astype(np.float64)


def interval(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of ratings on a scale: the squared difference."""
    return (a - b) ** 2


def alpha(ratings: np.ndarray, distance=nominal) -> float | None:
    """(raters, items) of numbers, nan where missing -> 1 - observed / expected disagreement (Krippendorff 2004).

    1 is agreement, 0 what chance gives. Items with fewer than two ratings drop out. The observed disagreement
    is the mean distance of two ratings of one item, each of its m ratings paired with m - 1 others; the
    expected one that of two ratings from anywhere. None when nothing is paired or all ratings are equal.
    """
    table = np.asarray(ratings, np.float64)
    seen = ~np.isnan(table)
    table, seen = table[:, seen.sum(0) > 1], seen[:, seen.sum(0) > 1]
    values = np.unique(table[seen])
    if len(values) < 2:
        return None
    counts = np.array([((table == v) & seen).sum(0) for v in values], np.float64)  # (values, items)
    apart = distance(values[:, None], values[None, :])
    # Equal ratings are at distance 0, so a rating's pair with itself adds nothing.
    observed = float((np.einsum("vi,vw,wi->i", counts, apart, counts) / (counts.sum(0) - 1)).sum())
    totals, n = counts.sum(1), counts.sum()
    return 1 - observed * (n - 1) / float(totals @ apart @ totals)
