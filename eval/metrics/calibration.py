"""May a margin be read as a probability? Reliability, calibration error against its own noise, temperature.

A Bradley-Terry margin d says that the chosen completion is preferred with probability sigmoid(d). As "chosen" is
always the first, d is folded: confidence sigmoid(|d|), and right where d > 0. Preference tuning tends to make models
over-confident (arXiv 2309.16240, 2505.01997); fitted temperature above 1 says by how much.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from scipy import special

from mlxdpo_eval.metrics.calibration_interval import ece_interval, noise_floor
from mlxdpo_eval.metrics.intervals import Interval, clustered_share, number_clusters


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
