"""May a margin be read as a probability? Reliability, calibration error against its own noise, temperature.

A Bradley-Terry margin d says that the chosen completion is preferred with probability sigmoid(d). As "chosen" is
always the first, d is folded: confidence sigmoid(|d|), and right where d > 0. Preference tuning tends to make models
over-confident (arXiv 2309.16240, 2505.01997); fitted temperature above 1 says by how much.

ECE, the expected calibration error, is a mean of absolute gaps, so noise never cancels in it: a perfectly calibrated
model has an ECE above 0, and a bootstrap of it adds the noise a second time. Its percentile interval can lie wholly
above the truth. `ece_interval` inverts a test instead: which true errors make the observed one ordinary?
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from scipy import special

from mlxdpo_eval.metrics.intervals import Interval, clustered_share, number_clusters

DRAWS = 1000
GRID = 101
LUCK = 0.2  # quantile of a calibrated model's ECE below which a smaller one is luck
TAILS = (0.6, 0.4)  # of 1 - level: below and above. A truth of 0 has no tail above, so it is held in 97 %.


class Bin(NamedTuple):
    """Pairs of like confidence: mean confidence, share right with its interval."""

    n: int
    confidence: float
    accuracy: float
    interval: Interval | None


class Floor(NamedTuple):
    """ECE of simulated, perfectly calibrated models with these confidences: mean, 95 % quantile, and the p-value.

    `p` is the share of simulations whose ECE is at least the one observed; a small p shows miscalibration.
    """

    mean: float
    high: float
    p: float


class Temperature(NamedTuple):
    """sigmoid(d / T) fitted on one half of the prompts; NLL and ECE before and after on the *other* half.

    T above 1: the model is over-confident (beta or the training was too much). T None: no positive
    temperature fits best, because no fitted margin is on the wrong side (T to 0) or their mean is not positive.
    """

    temperature: float | None
    fitted: int
    tested: int
    nll: tuple[float, float] | None
    ece: tuple[float, float] | None


class Calibration(NamedTuple):
    """Calibration of one set of pairs. `ece` weights bins by size, `ace` equally, `mce` is the worst bin."""

    n: int
    bins: tuple[Bin, ...]
    ece: float
    ece_interval: Interval | None
    ace: float
    mce: float
    floor: Floor
    brier: float
    nll: float
    temperature: Temperature


def calibration_report(
    margins: np.ndarray, prompts: np.ndarray, bins: int = 10, level: float = 0.95, seed: int = 0
) -> Calibration:
    """(B,) margins in logits and cluster names -> every calibration number. Raises `ValueError` for no pairs."""
    d, labels = number_clusters(margins, prompts)
    if not len(d):
        raise ValueError("no margins; expected at least one pair")
    confidence, right = fold_margins(d)
    codes = equal_mass(confidence, bins)
    gaps, sizes = bin_gaps(confidence, right, codes)
    ece = float(np.abs(gaps) @ sizes / len(d))
    return Calibration(
        n=len(d),
        bins=reliability_bins(confidence, right, codes, labels, level),
        ece=ece,
        ece_interval=ece_interval(confidence, right, codes, labels, level, seed),
        ace=float(np.abs(gaps).mean()),
        mce=float(np.abs(gaps).max()),
        floor=Floor(*noise_floor(confidence, codes, ece, seed)),
        brier=float((special.expit(-d) ** 2).mean()),
        nll=nll(d),
        temperature=split_temperature(d, prompts, bins, seed),
    )


def fold_margins(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence sigmoid(|d|) in [1/2, 1), and 1 where d > 0, 1/2 where d is 0, else 0."""
    return special.expit(np.abs(margins)), (np.sign(margins) + 1) / 2


def equal_mass(confidence: np.ndarray, bins: int) -> np.ndarray:
    """(B,) number of each pair's bin, from 0: cut at quantiles, equal confidences together, no bin empty."""
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1")
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    return np.unique(np.searchsorted(edges, confidence, side="right"), return_inverse=True)[1]


def bin_gaps(confidence: np.ndarray, right: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per bin: mean of right - confidence, and size."""
    sizes = np.bincount(codes)
    return np.bincount(codes, right - confidence) / sizes, sizes


def reliability_bins(
    confidence: np.ndarray, right: np.ndarray, codes: np.ndarray, clusters: np.ndarray, level: float = 0.95
) -> tuple[Bin, ...]:
    """The points of a reliability diagram, by rising confidence."""
    found = []
    for k in range(int(codes.max()) + 1):
        here = codes == k
        interval = clustered_share(right[here], clusters[here], level)
        found.append(Bin(int(here.sum()), float(confidence[here].mean()), float(right[here].mean()), interval))
    return tuple(found)


def nll(margins: np.ndarray) -> float:
    """Mean -log sigmoid(d) in nats: the negative log-likelihood of the preferences."""
    return float(np.logaddexp(0, -np.asarray(margins)).mean())


def fit_temperature(margins: np.ndarray) -> float | None:
    """T that minimises the mean of softplus(-d / T), by Newton's method on a = 1 / T; None without a positive one.

    The objective is convex in a. Its slope at 0 is -mean(d) / 2, so a positive optimum needs a positive mean;
    it is finite when some pair is on the wrong side.
    """
    d = np.asarray(margins, np.float64)
    if not len(d) or d.mean() <= 0 or d.min() >= 0:
        return None
    a = 1 / np.abs(d).mean()
    for _ in range(200):
        wrong = special.expit(-a * d)
        slope, curvature = -(d * wrong).mean(), (d * d * wrong * (1 - wrong)).mean()
        # Far out the curvature vanishes and a full step leaps past 0; halving or doubling a at most does not.
        moved = float(np.clip(a - slope / max(curvature, 1e-300), a / 2, a * 2))
        if abs(moved - a) <= 1e-12 * a:
            break
        a = moved
    return 1 / a


def split_temperature(margins: np.ndarray, clusters: np.ndarray, bins: int = 10, seed: int = 0) -> Temperature:
    """Temperature from half of the clusters, its effect reported on the rest.

    The halves are drawn by a digest of each cluster's name, so the order of the rows does not matter.
    """
    d, labels = number_clusters(margins, clusters)
    names = dict(zip(labels.tolist(), clusters, strict=True))
    drawn = sorted(names, key=lambda label: hashlib.sha256(f"{seed} {names[label]}".encode()).digest())
    fit_on = np.isin(labels, drawn[: len(drawn) // 2])
    here, there = d[fit_on], d[~fit_on]
    t = fit_temperature(here)
    if t is None or not len(there):
        return Temperature(t, len(here), len(there), None, None)
    before, after = there, there / t
    return Temperature(t, len(here), len(there), (nll(before), nll(after)), (_ece(before, bins), _ece(after, bins)))


def _ece(margins: np.ndarray, bins: int) -> float:
    confidence, right = fold_margins(margins)
    gaps, sizes = bin_gaps(confidence, right, equal_mass(confidence, bins))
    return float(np.abs(gaps) @ sizes / len(margins))


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
