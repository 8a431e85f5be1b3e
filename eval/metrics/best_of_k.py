"""Best-of-k records: does the reward put a right completion first among several? The shape of RewardBench 2.

A record is `{"prompt", "completions", "n_correct"}`: the first `n_correct` completions are right. Its scores come
in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo_eval.metrics.intervals import Interval, clustered_share


class BestOf(NamedTuple):
    """Share of records whose best score is a right completion (ties share), its interval, and chance level."""

    n: int
    accuracy: float
    interval: Interval | None
    chance: float


class Ties(NamedTuple):
    """RewardBench 2's score of prompts with several right answers, and its parts (arXiv 2506.01937)."""

    n: int
    score: float
    tied_accuracy: float
    reference_accuracy: float
    preferred: float
    preferred_hard: float
    ratio: float


def first_is_right(scores: Sequence[float] | np.ndarray, n_correct: int = 1) -> float:
    """Share of the highest scores that right completions hold: 1, 0, or in between when scores tie at the top.

    With one right completion it is RewardBench 2's rule, 1 / (number of ties at the top). Raises `ValueError`
    where right and wrong completions are not both there, or a score is not finite.
    """
    values = np.asarray(scores, np.float64)
    if not 0 < n_correct < len(values):
        raise ValueError(f"{n_correct} right of {len(values)} completions; expected at least one right and one wrong")
    if not np.isfinite(values).all():
        raise ValueError(f"scores are {values.tolist()}; expected finite numbers")
    best = values == values.max()
    return float(best[:n_correct].sum() / best.sum())


def best_of(
    scores: Sequence[Sequence[float]], n_correct: Sequence[int], prompts: Sequence[str], level: float = 0.95
) -> BestOf:
    """Accuracy over records; `chance` is the mean of n_correct / k, what equal or random scores reach."""
    if not len(scores):
        raise ValueError("no records; expected at least one")
    right = [first_is_right(s, n) for s, n in zip(scores, n_correct, strict=True)]
    chance = float(np.mean([n / len(s) for s, n in zip(scores, n_correct, strict=True)]))
    return BestOf(len(right), float(np.mean(right)), clustered_share(right, prompts, level), chance)


class _Gaps(NamedTuple):
    accurate: bool
    to_wrong: float
    among_right: float | None


def _gaps(scores: Sequence[float], n_correct: int) -> _Gaps:
    values = np.asarray(scores, np.float64)
    right, wrong = values[:n_correct], values[n_correct:]
    if not len(right) or not len(wrong):
        raise ValueError(f"{n_correct} right of {len(values)} completions; expected at least one right and one wrong")
    to_wrong = float(right.min() - wrong.max())
    return _Gaps(to_wrong > 0, to_wrong, float(np.ptp(right)) if len(right) > 1 else None)


def ties_score(tied: Sequence[tuple[Sequence[float], int]], reference: Sequence[tuple[Sequence[float], int]]) -> Ties:
    """RewardBench 2's ties score: `tied[i]` and `reference[i]` are (scores, n_correct) of the same question.

    A tied question has several right answers, its reference version one. A good reward separates right from
    wrong by more than right answers differ among themselves:

        0.3 acc(tied) + 0.3 acc(reference) + 0.2 mean[gap > spread] + 0.2 mean[min(gap, reference gap) > spread]
        + 0.01 mean tanh(min(gap, reference gap) / spread - 1)

    gap = lowest right - highest wrong score, spread = highest - lowest right score; the last mean is over
    questions with a spread above 0, the two before over those with more than one right answer (allenai/
    reward-bench 0.1.4, `process_single_model`). An accurate question has a gap above 0. Raises `ValueError`.
    """
    if not tied or len(tied) != len(reference):
        raise ValueError(f"{len(tied)} tied and {len(reference)} reference questions; expected as many, at least one")
    several, single = [_gaps(*t) for t in tied], [_gaps(*r) for r in reference]
    spreads = [
        (t.to_wrong, min(t.to_wrong, r.to_wrong), t.among_right)
        for t, r in zip(several, single, strict=True)
        if t.among_right is not None
    ]
    if not spreads:
        raise ValueError("no tied question has more than one right completion; expected several, listed first")
    parts = (
        float(np.mean([t.accurate for t in several])),
        float(np.mean([r.accurate for r in single])),
        float(np.mean([gap > among for gap, _, among in spreads])),
        float(np.mean([hard > among for _, hard, among in spreads])),
        float(np.mean([np.tanh(hard / among - 1) for _, hard, among in spreads if among > 0] or [0.0])),
    )
    return Ties(len(tied), float(np.dot(parts, (0.3, 0.3, 0.2, 0.2, 0.01))), *parts)
