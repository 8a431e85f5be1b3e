"""Prediction-powered inference: a few human votes take the bias out of a judge's rate over many answers.

The judge's mean alone converges on the judge's opinion; the human votes alone waste the judge. PPI++ (arXiv
2311.01453) adds to the judge's mean the difference that humans make where both have voted, and is never
asymptotically wider than the human votes alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo_eval.metrics.intervals import Interval, number_clusters, quantile_t


class Debiased(NamedTuple):
    """The de-biased rate with its interval, and what it was made of.

    `weight` is lambda, the trust in the judge: 0 is human votes alone. `judge` and `human` are the plain means;
    `saving` is 1 - (se / se of human votes alone)²: the share of human votes that the judge saves.
    """

    estimate: Interval
    weight: float
    judge: float
    human: float
    saving: float


def debiased(
    human: Sequence[float] | np.ndarray,
    judge: Sequence[float] | np.ndarray,
    judge_only: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | np.ndarray | None = None,
    prompts_only: Sequence[Hashable] | np.ndarray | None = None,
    level: float = 0.95,
) -> Debiased | None:
    """PPI++ estimate of the mean human outcome, from n answers with both votes and N with the judge's alone.

        lambda = cov(h, f_n) / ((1 + n / N) var(f)),  theta = lambda mean(f_N) + mean(h - lambda f_n)
        se² = lambda² var(f_N) / N + var(h - lambda f_n) / n

    (arXiv 2311.01453, for a mean.) With `prompts` (of the n) and `prompts_only` (of
    the N) each var / n is the clustered variance of that mean instead; no prompt may be in both parts.
    Student's t with one degree of freedom less than there are clusters with human votes. None below two of
    them in either part, or when every human vote and judgement agrees with itself, so that no spread is seen.
    Raises `ValueError` for lengths that differ.
    """
    h, labels = number_clusters(human, range(len(human)) if prompts is None else prompts)
    f, _ = number_clusters(judge, labels)
    g, labels_only = number_clusters(judge_only, range(len(judge_only)) if prompts_only is None else prompts_only)
    if prompts is not None and prompts_only is not None and (both := set(prompts) & set(prompts_only)):
        raise ValueError(f"{len(both)} prompts, such as {next(iter(both))!r}, have rows with and without a human vote")
    if min(labels.max(initial=-1), labels_only.max(initial=-1)) < 1:
        return None
    weight = _weight(h, f, g, labels, labels_only)
    rectified = h - weight * f
    estimate = weight * float(g.mean()) + float(rectified.mean())
    variance = weight**2 * _covariance(g, g, labels_only) + _covariance(rectified, rectified, labels)
    alone, count = _covariance(h, h, labels), int(labels.max()) + 1
    if variance <= 0 or alone <= 0:
        return None
    half = quantile_t(level, count) * float(np.sqrt(variance))
    interval = Interval(estimate, estimate - half, estimate + half, count)
    return Debiased(interval, weight, float(np.mean([*f, *g])), float(h.mean()), 1 - variance / alone)


def _weight(h: np.ndarray, f: np.ndarray, g: np.ndarray, labels: np.ndarray, labels_only: np.ndarray) -> float:
    """The lambda that minimises se²; 0 for a judge that always says the same."""
    total = _covariance(f, f, labels) + _covariance(g, g, labels_only)
    return _covariance(h, f, labels) / total if total > 0 else 0.0


def _covariance(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float:
    """Covariance of the two means over clustered rows; with one row per cluster, the sample covariance over n."""
    count = int(labels.max()) + 1
    sums_a, sums_b = (np.bincount(labels, v - v.mean(), count) for v in (a, b))
    return float(count / (count - 1) * (sums_a * sums_b).sum() / len(a) ** 2)
