"""An interval for the expected calibration error, and the error that noise alone makes.

ECE is a mean of absolute gaps, so noise never cancels in it: a perfectly calibrated model has an ECE above 0, and a
bootstrap of it adds the noise a second time. Its percentile interval can lie wholly above the truth. What
follows inverts a test instead: which true errors make the observed one ordinary?
"""

from __future__ import annotations

import numpy as np

from .stats import Interval

DRAWS = 1000
GRID = 101
TAILS = (0.6, 0.4)  # of 1 - level: below and above. A truth of 0 has no tail above, so it is held in 97 %.


def noise_floor(
    confidence: np.ndarray, codes: np.ndarray, observed: float, seed: int = 0, n: int = DRAWS
) -> tuple[float, float, float]:
    """ECE of n calibrated models with these confidences: mean, 95 % quantile, share of at least `observed`.

    Each pair comes out right with its own confidence, independently. The share counts the observed one in, so
    it is never 0: (1 + count) / (1 + n).
    """
    rng, pairs = np.random.default_rng(seed), len(confidence)
    order = np.argsort(codes, kind="stable")
    p, starts = confidence[order], np.flatnonzero(np.diff(codes[order], prepend=-1))
    errors = np.concatenate(
        [_mean_gap((rng.random((size, pairs)) < p) - p, starts) for size in _blocks(n, max(1, (1 << 20) // pairs))]
    )
    p_value = (1 + int((errors >= observed - 1e-12).sum())) / (1 + n)
    return float(errors.mean()), float(np.quantile(errors, 0.95)), p_value


def _blocks(n: int, most: int) -> list[int]:
    return [min(most, n - done) for done in range(0, n, most)]


def _mean_gap(errors: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(n, pairs) sorted by bin -> (n,) ECE."""
    return np.abs(np.add.reduceat(errors, starts, axis=1)).sum(1) / errors.shape[1]


def ece_interval(
    confidence: np.ndarray,
    right: np.ndarray,
    codes: np.ndarray,
    clusters: np.ndarray,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Interval of sum_b n_b / n |E[right - confidence | bin b]|, the calibration error of these bins.

    Inverts a parametric bootstrap test (Carpenter 1999; Davison and Hinkley 1997, section 5.8.1): the gaps are
    taken as normal around true ones, with the covariance clustered by prompt; true gaps for a candidate error
    e are the observed ones scaled to it; e is in the interval unless the observed ECE lies in the lowest
    2 % or highest 3 % of what e would give (at `level` .95). It starts at 0 when a calibrated model would do.
    An ECE below what luck gives a calibrated model counts as that luck's median: it is no proof of being
    better. Errors *within* bins are not seen, as in any binned ECE. None below two clusters or for fewer than
    ten pairs a bin, where gaps are far from normal.
    """
    _, labels = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(codes)
    if labels.max() < 1 or sizes.min() < 10:
        return None
    share = sizes / len(codes)
    gaps = np.bincount(codes, right - confidence) / sizes
    noise = np.random.default_rng(seed).normal(size=(DRAWS, len(sizes)))
    noise = noise @ _root(_gap_covariance(confidence, right, codes, labels)).T * share
    observed = float(np.abs(gaps) @ share)
    low, high = _invert(gaps * share, noise, observed, level)
    return Interval(observed, low, high, int(labels.max()) + 1)


def _gap_covariance(confidence: np.ndarray, right: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(bins, bins) clustered covariance of the gaps.

    A bin that is right throughout has no spread to see; it still has some. Each variance is at least half of
    that of independent pairs with the bin's share right, two pairs of its confidence added.
    """
    sizes, count = np.bincount(codes), int(labels.max()) + 1
    errors = right - confidence
    residuals = (errors - (np.bincount(codes, errors) / sizes)[codes]) / sizes[codes]
    sums = np.zeros((count, len(sizes)))
    np.add.at(sums, (labels, codes), residuals)
    # Each bin's mean is fitted, which takes one pair's worth of spread from it.
    inflate = np.sqrt(sizes / (sizes - 1))
    covariance = (sums * inflate).T @ (sums * inflate)
    likely = (np.bincount(codes, right) + 2 * np.bincount(codes, confidence) / sizes) / (sizes + 2)
    least = likely * (1 - likely) / sizes / 2
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), least))
    return covariance


def _root(covariance: np.ndarray) -> np.ndarray:
    """A matrix whose square is the covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def _invert(gaps: np.ndarray, noise: np.ndarray, observed: float, level: float) -> tuple[float, float]:
    """Lowest and highest error that make `observed` ordinary; `gaps` and `noise` (draws, bins), weighted by share."""
    below, above = (part * (1 - level) for part in TAILS)
    floor = np.abs(noise).sum(1)
    grid = np.linspace(0, observed + 4 * float(floor.std()) + float(floor.mean()), GRID)
    direction = gaps / observed if observed > 0 else np.full(len(gaps), 1 / len(gaps))
    given = np.abs(grid[:, None, None] * direction + noise).sum(-1)  # (grid, draws)
    reachable = (given >= observed).mean(1) > below
    likely = (given <= max(observed, float(np.median(floor)))).mean(1) > above
    return float(grid[int(reachable.argmax())]), float(grid[np.flatnonzero(likely)[-1]])
