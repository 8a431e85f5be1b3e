"""An interval for the expected calibration error, and the error that noise alone makes.

ECE is a mean of absolute gaps, so noise never cancels in it: a perfectly calibrated model has an ECE above 0, and a
bootstrap of it adds the noise a second time. Its percentile interval can lie wholly above the truth. What
follows inverts a test instead: which true errors make the observed one ordinary?
"""

from __future__ import annotations

import numpy as np

from mlxdpo_eval.metrics.intervals import Interval

DRAWS = 1000
GRID = 101
LUCK = 0.2  # quantile of a calibrated model's ECE below which a smaller one is luck
TAILS = (0.6, 0.4)  # of 1 - level: below and above. A truth of 0 has no tail above, so it is held in 97 %.


def noise_floor(
    confidence: np.ndarray, codes: np.ndarray, observed: float, seed: int = 0, n: int = DRAWS
) -> tuple[float, float, float]:
    """ECE of n calibrated models with these confidences: mean, 95 % quantile, share of at least `observed`.

    Each pair comes out right with its own confidence, independently. The share counts the observed one in, so
    it is never 0: (1 + count) / (1 + n).
    """
    rng, pairs = np.random.default_rng(seed), len(confidence)
    order = np.argsort(confidence, kind="stable")  # bins too: they are cut along it
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

    Inverts a parametric bootstrap test (Carpenter 1999; Davison and Hinkley 1997, section 5.5): gaps are taken
    as normal around true ones, with the covariance clustered by prompt; the true gaps of a candidate error e
    are the likeliest that make it up; e is in the interval unless the observed ECE lies in the lowest 2 % or
    highest 3 % of what e would give (at `level` .95). It starts at 0 when a calibrated model would do. An ECE
    below what luck gives a calibrated model counts as the edge of that luck (`LUCK`): it proves nothing.
    Where the true error is about the size of the noise the interval is careful: it holds it in 98 to 99 %. The true
    gaps nearest to those seen point the way the noise pointed, so that such an error seems to give larger ECEs than
    it does.
    Errors *within* bins are not seen, as in any binned ECE. None below two clusters or for fewer than
    ten pairs a bin, where gaps are far from normal.
    """
    _, labels = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(codes)
    if labels.max() < 1 or sizes.min() < 10:
        return None
    share = sizes / len(codes)
    gaps = np.bincount(codes, right - confidence) / sizes
    covariance = _gap_covariance(confidence, right, codes, labels)
    low, high = _invert(gaps, share, covariance, level, seed)
    return Interval(float(np.abs(gaps) @ share), low, high, int(labels.max()) + 1)


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


def _matrix_root(covariance: np.ndarray) -> np.ndarray:
    """A matrix whose square is the covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def _invert(
    gaps: np.ndarray, share: np.ndarray, covariance: np.ndarray, level: float, seed: int
) -> tuple[float, float]:
    """Lowest and highest error that make the observed one ordinary."""
    observed = float(np.abs(gaps) @ share)
    noise = np.random.default_rng(seed).normal(size=(DRAWS, len(gaps))) @ _matrix_root(covariance).T
    floor = np.abs(noise) @ share
    errors = np.linspace(0, observed + float(floor.mean()) + 4 * float(floor.std()), GRID)
    likeliest = _likeliest(errors, gaps, share, np.diag(covariance)) * np.where(gaps < 0, -1, 1)
    given = np.abs(likeliest[:, None] + noise) @ share  # (GRID, DRAWS)
    below, above = (part * (1 - level) for part in TAILS)
    reachable = (given >= observed).mean(1) > below
    likely = (given <= max(observed, float(np.quantile(floor, LUCK)))).mean(1) > above
    return float(errors[int(reachable.argmax())]), float(errors[np.flatnonzero(likely)[-1]])


def _likeliest(errors: np.ndarray, gaps: np.ndarray, share: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """(errors, bins) sizes of true gaps for each candidate error: sum of share * size = error, nearest to the gaps.

    Minimising sum (|gap| - size)² / variance under that constraint moves every bin by lambda share variance,
    none below 0. From each squared gap its variance is taken first: noise alone makes gaps too large, and
    bins without a true one have to count as such, or the lower end lies too high.
    """
    sizes, step = np.sqrt(np.maximum(gaps**2 - variances, 0)), share * variances
    # The error falls along straight lines in lambda, with a knot wherever a bin arrives at 0.
    far = (errors[-1] - float(sizes @ share)) / float(step @ share)
    knots = np.unique(np.concatenate([[-max(far, 1.0)], [0.0], sizes / step]))[::-1]
    reached = np.maximum(sizes - knots[:, None] * step, 0) @ share
    at = np.interp(errors, reached, knots)
    return np.maximum(sizes - at[:, None] * step, 0)
