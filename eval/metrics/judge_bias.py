"""How far may a judge be believed? Agreement with humans, consistency, and what it prefers besides quality.

Raw agreement flatters: kappa lies 33 to 41 points below it over 21 judges, and a judge may repeat itself 95 % of the
time while it prefers a position (arXiv 2606.19544). So each number stands beside its chance level or control.
Verdicts are 1 (the first side: the tuned model's answer is better), 0 (tie), -1 (worse).

A few human votes take the bias out of a judge's rate over many answers. The judge's mean alone converges on the judge's
opinion; the human votes alone waste the judge. PPI++ (arXiv 2311.01453) adds to the judge's mean the difference that
humans make where both have voted, and is never asymptotically wider than the human votes alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from mlxdpo_eval.metrics.intervals import (
    Interval,
    clustered_mean,
    clustered_share,
    number_clusters,
    percentile_levels,
    quantile_t,
)


class Agreement(NamedTuple):
    """Judge against human on the same answers. `expected` is the agreement of two independent raters like these.

    `kappa` is None where both raters always give one and the same verdict: nothing is left to agree on.
    `longest` is the agreement of a judge that always prefers the longer answer: a judge below it adds nothing.
    """

    n: int
    raw: float
    raw_interval: Interval | None
    expected: float
    kappa: float | None
    kappa_interval: Interval | None
    longest: float | None


class Position(NamedTuple):
    """Verdicts of both orders. `first` is the share of decided verdicts for the answer shown first, 1/2 without bias.

    `consistent` is the share of answers that win in both orders or lose in both; `p` is the exact binomial
    test over the rest, where the position decided; `bias` is in logits, above 0 for the answer shown first.
    """

    n: int
    consistent: float
    consistent_interval: Interval | None
    first: float | None
    p: float | None
    bias: float
    bias_interval: Interval | None


class Longer(NamedTuple):
    """Share of decided verdicts of unlike lengths that prefer the longer answer; humans' share beside it if known."""

    n: int
    prefers_longer: float | None
    interval: Interval | None
    humans: float | None


def agreement(
    judge: Sequence[int] | np.ndarray,
    human: Sequence[int] | np.ndarray,
    prompts: Sequence[object] | np.ndarray,
    length_difference: Sequence[float] | np.ndarray | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Raw agreement and Cohen's kappa over {-1, 0, 1}, with intervals by prompt. Raises `ValueError` for no items.

    kappa = (po - pe) / (1 - pe), pe = sum_c p_judge(c) p_human(c) (Cohen 1960). Its interval is the expanded
    percentile interval of `n` resamples of prompts. `length_difference`: first answer's length less the other's.
    """
    a, b = _verdicts(judge), _verdicts(human)
    same, labels = number_clusters((a == b).astype(float), prompts)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} verdicts of the judge and {len(b)} of humans; expected as many, at least one")
    table = np.bincount(3 * a + b, minlength=9) / len(a)
    kappa, expected = (float(v[0]) for v in _kappa(table[None]))
    longest = None if length_difference is None else float((np.sign(length_difference).astype(int) + 1 == b).mean())
    return Agreement(
        len(a),
        float(same.mean()),
        clustered_share(same, labels, level),
        expected,
        None if np.isnan(kappa) else kappa,
        _kappa_interval(3 * a + b, labels, kappa, n, level, seed),
        longest,
    )


def _verdicts(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """-1, 0, 1 as 0, 1, 2; anything else is an invalid verdict, which is neither a tie nor a loss."""
    found = np.asarray(values)
    if not np.isin(found, (-1, 0, 1)).all():
        first = found[~np.isin(found, (-1, 0, 1))][0]
        raise ValueError(f"a verdict is {first}; expected 1, 0 or -1: drop invalid ones and count them")
    return found.astype(np.int64) + 1


def _kappa(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tables, 9) shares -> kappa (nan where both raters know one verdict only) and expected agreement."""
    grid = tables.reshape(-1, 3, 3)
    observed, expected = np.einsum("tii->t", grid), (grid.sum(2) * grid.sum(1)).sum(1)
    left = 1 - expected
    return np.where(left > 1e-12, (observed - expected) / np.where(left > 1e-12, left, 1), np.nan), expected


def _kappa_interval(
    cells: np.ndarray, labels: np.ndarray, kappa: float, n: int, level: float, seed: int
) -> Interval | None:
    count = int(labels.max()) + 1
    if count < 2 or np.isnan(kappa):
        return None
    by_cluster = np.zeros((count, 9))
    np.add.at(by_cluster, (labels, cells), 1)
    tables = _multiplicities(count, n, seed) @ by_cluster
    values, _ = _kappa(tables / tables.sum(1, keepdims=True))
    values = values[~np.isnan(values)]  # resamples with one verdict only have no kappa
    low, high = np.quantile(values, percentile_levels(level, count))
    return Interval(kappa, float(low), float(high), count) if low < high else None


def _multiplicities(count: int, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n).astype(np.float64)


def position_bias(
    first_order: Sequence[float] | np.ndarray,
    second_order: Sequence[float] | np.ndarray,
    prompts: Sequence[object] | np.ndarray,
    level: float = 0.95,
) -> Position:
    """From logits s1, s2 that the tuned model's answer is better: shown first, then shown second.

    bias = mean (s1 - s2) / 2: an additive preference for the first place drops out of (s1 + s2) / 2. Hard
    verdicts enter as +-1 or 0; the bias then is half the difference in net wins. Raises `ValueError`.
    """
    s1, labels = number_clusters(first_order, prompts)
    s2, _ = number_clusters(second_order, prompts)
    if not len(s1):
        raise ValueError("no verdicts; expected at least one in both orders")
    consistent = (np.sign(s1) == np.sign(s2)).astype(float)
    for_first = np.concatenate([s1[s1 != 0] > 0, s2[s2 != 0] < 0])
    flipped = s1 * s2 < 0
    firsts = int((flipped & (s1 > 0)).sum())
    bias = (s1 - s2) / 2
    return Position(
        len(s1),
        float(consistent.mean()),
        clustered_share(consistent, labels, level),
        float(for_first.mean()) if len(for_first) else None,
        float(stats.binomtest(firsts, int(flipped.sum())).pvalue) if flipped.any() else None,
        float(bias.mean()),
        clustered_mean(bias, labels, level),
    )


def repeat_agreement(
    verdicts: Sequence[int] | np.ndarray,
    again: Sequence[int] | np.ndarray,
    prompts: Sequence[object] | np.ndarray,
    level: float = 0.95,
) -> tuple[float, Interval | None]:
    """Share of verdicts that come out the same the second time, with its interval. Raises `ValueError` for none."""
    a, b = _verdicts(verdicts), _verdicts(again)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} verdicts and {len(b)} repeats; expected as many, at least one")
    same = (a == b).astype(float)
    return float(same.mean()), clustered_share(same, prompts, level)


def preference_for_longer(
    verdicts: Sequence[int] | np.ndarray,
    length_difference: Sequence[float] | np.ndarray,
    prompts: Sequence[object] | np.ndarray,
    human: Sequence[int] | np.ndarray | None = None,
    level: float = 0.95,
) -> Longer:
    """P(the longer answer wins) among verdicts that are no tie, of answers that differ in length."""
    v, difference = _verdicts(verdicts) - 1, np.sign(np.asarray(length_difference, np.float64))
    _, labels = number_clusters(difference, prompts)
    longer = v * difference
    kept = longer != 0
    humans = None if human is None else (_verdicts(human) - 1) * difference
    return Longer(
        int(kept.sum()),
        float((longer[kept] > 0).mean()) if kept.any() else None,
        clustered_share((longer[kept] > 0).astype(float), labels[kept], level),
        None if humans is None or not humans.any() else float((humans[humans != 0] > 0).mean()),
    )


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
