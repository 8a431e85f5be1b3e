"""Which two answers to a prompt make a pair, from their scores alone. A rule gives (better, worse) index pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[float], float], list[tuple[int, int]]]
"""(scores, least difference) -> (better, worse); equal scores make no pair."""

FEW = "prompts with fewer than two usable answers"
TIED = "prompts whose answers all score the same"
CLOSE = "prompts whose answers score less than the margin apart"


def best_worst(scores: Sequence[float], margin: float) -> list[tuple[int, int]]:
    """The highest score against the lowest; the first of equals."""
    places = range(len(scores))
    best, worst = max(places, key=lambda i: scores[i]), min(places, key=lambda i: scores[i])
    return [(best, worst)] if _apart(scores[best], scores[worst], margin) else []


def every(scores: Sequence[float], margin: float) -> list[tuple[int, int]]:
    """Every two answers that score differently, at least `margin` apart; best first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [(a, b) for a, b in itertools.combinations(order, 2) if _apart(scores[a], scores[b], margin)]


def _apart(high: float, low: float, margin: float) -> bool:
    return high > low and high - low >= margin


RULES: dict[str, Rule] = {"best-worst": best_worst, "all": every, "margin": every, "ranked": every}
"""By the name of `collect.pairs`. A ranked row stands for every pair it holds."""


def why_none(scores: Sequence[float], margin: float) -> str:
    """The reason that a prompt gave no pair."""
    if len(scores) < 2:
        return FEW
    return TIED if max(scores) == min(scores) or not margin else CLOSE
