"""Did the tuned model's text change in form? Length, endings, repetition and diversity, before and after.

Length blow-up and loops are the usual ways in which preference tuning fails. Each number comes with an interval by
prompt; `drift.text_stats` has the numbers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo_eval.metrics.drift import distinct_n, repetition
from mlxdpo_eval.metrics.intervals import (
    Interval,
    clustered_mean,
    clustered_share,
    mean_or_none,
    number_clusters,
    percentile_levels,
    quantile_t,
)

Texts = Sequence[Sequence[Hashable]]


class Estimate(NamedTuple):
    """A number and its interval; either is None where the texts cannot carry it."""

    value: float | None
    interval: Interval | None


class TextReport(NamedTuple):
    """One set of completions: mean tokens, share that stopped by itself (EOS), repetition, distinct bigrams."""

    n: int
    length: Estimate
    stopped: Estimate
    repetition: Estimate
    distinct_2: Estimate


def text_report(
    completions: Texts, stopped: Sequence[bool], prompts: Sequence[Hashable], level: float = 0.95
) -> TextReport:
    """Numbers of drift.text_stats with intervals; completions as token ids. Raises `ValueError` on lengths."""
    if not len(completions) == len(stopped) == len(prompts):
        raise ValueError(
            f"{len(completions)} completions, {len(stopped)} flags, {len(prompts)} prompts; expected one of each"
        )
    repeated = [(r, p) for c, p in zip(completions, prompts, strict=True) if (r := repetition(c)) is not None]
    rates, named = [r for r, _ in repeated], [p for _, p in repeated]
    lengths, ended = [float(len(c)) for c in completions], [float(s) for s in stopped]
    return TextReport(
        len(completions),
        Estimate(mean_or_none(lengths), clustered_mean(lengths, prompts, level)),
        Estimate(mean_or_none(ended), clustered_share(ended, prompts, level)),
        Estimate(mean_or_none(rates), clustered_share(rates, named, level)),
        distinct_interval(completions, prompts, level=level),
    )


def length_ratio(
    base: Sequence[float],
    tuned: Sequence[float],
    prompts: Sequence[Hashable],
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean tuned length over mean base length, paired by prompt: expanded percentile interval over prompts.

    A ratio of means, not a mean of ratios, which one short answer can dominate. None without any base token.
    """
    before, labels = number_clusters(base, prompts)
    after, _ = number_clusters(tuned, prompts)
    if before.sum() <= 0:
        return Estimate(None, None)
    ratio, count = float(after.sum() / before.sum()), int(labels.max()) + 1
    if count < 2:
        return Estimate(ratio, None)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=n)
    below = times @ np.bincount(labels, before)
    ratios = (times @ np.bincount(labels, after))[below > 0] / below[below > 0]
    low, high = (float(q) for q in np.quantile(ratios, percentile_levels(level, count)))
    # The same lengths before and after give one ratio, up to rounding.
    return Estimate(ratio, Interval(ratio, low, high, count) if high - low > 1e-12 else None)


def distinct_interval(completions: Texts, prompts: Sequence[Hashable], n: int = 2, level: float = 0.95) -> Estimate:
    """distinct-n of the whole set, with a delete-one-prompt jackknife interval (t, C - 1 degrees of freedom).

    A bootstrap would repeat prompts, and a repeated text has no new n-grams: all its resamples lie below the
    number they are to surround. The jackknife repeats nothing. Its variance is (C - 1) / C sum (v_c - mean)²
    (Efron and Tibshirani 1993, equation 11.5).
    """
    value, names = distinct_n(completions, n), list(dict.fromkeys(prompts))
    if value is None or len(names) < 2:
        return Estimate(value, None)
    left = _without_each(completions, prompts, names, n)
    if left is None:
        return Estimate(value, None)
    count = len(names)
    error = float(np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum()))
    if error <= 1e-12:
        return Estimate(value, None)
    half = quantile_t(level, count) * error
    return Estimate(value, Interval(value, max(0.0, value - half), min(1.0, value + half), count))


def _without_each(
    completions: Texts, prompts: Sequence[Hashable], names: Sequence[Hashable], n: int
) -> np.ndarray | None:
    """distinct-n of the set less each prompt in turn; None where one prompt holds every n-gram."""
    by_prompt: dict[Hashable, Counter] = {name: Counter() for name in names}
    for ids, name in zip(completions, prompts, strict=True):
        by_prompt[name].update(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    holders = Counter(gram for grams in by_prompt.values() for gram in grams)
    total = sum(grams.total() for grams in by_prompt.values())
    own = np.array([sum(holders[gram] == 1 for gram in by_prompt[name]) for name in names])
    rest = total - np.array([by_prompt[name].total() for name in names])
    return (len(holders) - own) / rest if rest.min() > 0 else None
