"""Best of n: draw n answers, keep the one with the highest reward. Nothing is trained, and n times as much is drawn.

What a reward model can buy without any optimiser; the DPO paper compares with it (arXiv 2305.18290 section 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln


def best(rewards: Sequence[float]) -> int:
    """Which of an answer's rewards is the highest; the first of equals, so that the choice does not depend on noise."""
    return int(np.argmax(rewards))


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: at least KL(best of n || the model), and close to it where n is small.

    Often quoted as that KL itself (arXiv 2009.01325 appendix G.3). It is an upper bound (arXiv 2401.01879),
    reached where no answer has a probability worth mentioning and no two have the same reward.
    Raises `ValueError` for n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; the best of at least one answer is meant")
    return math.log(n) - (n - 1) / n


def selection(rewards: np.ndarray, n: int) -> np.ndarray:
    """(N,) the chance of each of N answers to be the best of n drawn from them without replacement.

    With it, sum_i chance_i * x_i is the mean of any x over best-of-n: an average over all C(N, n) subsets, instead of
    N / n of them. The answer of rank i (from 1, worst first) is the best of C(i - 1, n - 1) subsets; equals share.
    Raises `ValueError` for n outside 1..N.
    """
    total = len(rewards)
    if not 1 <= n <= total:
        raise ValueError(f"n is {n} with {total} answers; expected 1 to {total}")
    order = np.argsort(rewards, kind="stable")
    ranks = np.arange(1, total + 1)
    chance = np.zeros(total)
    chance[n - 1 :] = np.exp(_log_choose(ranks[n - 1 :] - 1, n - 1) - _log_choose(np.array(total), n))
    result, at = np.empty(total), 0
    for _, count in zip(*np.unique(rewards, return_counts=True), strict=True):
        result[order[at : at + count]] = chance[at : at + count].mean()
        at += count
    return result


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def distribution(probabilities: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """(V,) probability of each outcome to be the best of n independent draws, equals decided by which came first.

    F(r)^n - F(r-)^n for all outcomes of reward r together (arXiv 2401.01879), divided among them as they are
    drawn. For small sets of outcomes: what the bound is compared with.
    """
    result = np.zeros(len(probabilities))
    for level in np.unique(rewards):
        here, below = rewards == level, probabilities[rewards < level].sum()
        mass = probabilities[here].sum()
        if mass > 0:
            result[here] = ((below + mass) ** n - below**n) * probabilities[here] / mass
    return result
