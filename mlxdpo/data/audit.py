"""What numbers say of pairs: labels that the other pairs contradict, near-duplicates, shortcuts. Pure NumPy.

Labels are judged by cross-fitting: a Bradley-Terry model, linear in what is known of the two answers, learns from all
folds but one and says of that one how probable its labels are. So no pair is judged by a model that has seen it. A
wrong label among the others costs it little: each fit is done twice, the second time with every pair weighted by how
much the first believed it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

FOLDS = 5
PENALTIES = (
    0.0001,
    0.001,
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
)  # of the squared weights, per pair, of features with variance 1

WRONG_PRIOR = (2.0, 8.0)  # wrong and right labels, as if seen before: where logits say nothing, a fifth is wrong
FACTOR_PRIOR = (0.7, 0.7)  # mean and deviation of the log factor: without it few pairs that say little are overrated


class Fit(NamedTuple):
    """Cross-fitted judgement of N pairs.

    logits    (N,) log-odds that the label is right, from a model that has not seen the pair
    accuracy  share of labels that are more probable than not
    penalty   of the squared weights, the one with the lowest cross-fitted loss
    """

    logits: np.ndarray
    accuracy: float
    penalty: float


def fold_numbers(groups: Sequence[Any], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) the fold of each pair; pairs of one group (one prompt) share theirs."""
    names = list(dict.fromkeys(groups))
    shuffled = np.random.Generator(np.random.PCG64([seed, 7])).permutation(len(names)) % folds
    place = dict(zip(names, shuffled.tolist(), strict=True))
    return np.array([place[group] for group in groups])


def cross_fit(blocks: Sequence[np.ndarray], groups: Sequence[Any], folds: int = FOLDS, seed: int = 0) -> Fit:
    """Judge the labels of N pairs by differences of features, chosen less rejected, in blocks (N, D) of their kinds.

    Every block counts alike, however many columns it has. The last ones are left out where the cross-fitted loss is
    lower without them; by that loss the penalty is chosen too. Exchanging the two answers of a pair changes the sign of
    its row, and of its logit. Raises `ValueError` for fewer groups than folds.
    """
    number = fold_numbers(groups, folds, seed)
    if len(set(number.tolist())) < folds:
        raise ValueError(f"{len(set(groups))} prompts are too few for {folds} folds")
    scaled = [_scaled_block(block) for block in blocks]
    tried = []
    for count in range(1, len(blocks) + 1):
        # The same inner products in as many columns as there are pairs, at most.
        u, s, _ = np.linalg.svd(np.concatenate(scaled[:count], axis=1), full_matrices=False)
        kept = s > 1e-9 * s.max(initial=1e-300)
        tried += [(_cross_fitted(u[:, kept] * s[kept], number, folds, penalty), penalty) for penalty in PENALTIES]
    logits, penalty = min(tried, key=lambda one: np.logaddexp(0, -one[0]).mean())
    return Fit(logits, float((logits > 0).mean()), penalty)


def label_posterior(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """(N,) probabilities that labels are right, and the estimated share of wrong ones, from cross-fitted logits (N,).

    A share e of the labels was turned round at random (arXiv 2403.00409 section 3): with s = sigmoid(factor * logit),
    what the other pairs say, the label at hand has the likelihood (1 - e) s + e (1 - s), and is right with the
    probability (1 - e) s over that (Bayes). Factor and share have the highest likelihood times their priors. A logit
    calibrated by the labels alone would call an obviously wrong label right with the probability e.
    """

    def loss(at: np.ndarray) -> float:
        """Negative log of likelihood and prior, at the log factor and the log-odds of the share."""
        right, wrong = np.logaddexp(0, at[1]), np.logaddexp(0, -at[1])  # -log of 1 - e, and of e
        scaled = np.exp(at[0]) * logits
        likely = np.logaddexp(-right - np.logaddexp(0, -scaled), -wrong - np.logaddexp(0, scaled))
        prior = WRONG_PRIOR[0] * wrong + WRONG_PRIOR[1] * right + ((at[0] - FACTOR_PRIOR[0]) / FACTOR_PRIOR[1]) ** 2 / 2
        return prior - likely.sum()

    # From several places: where logits say little, a small factor and a large share explain the labels alike.
    begins = itertools.product((0.0, 1.5), (-3.0, -1.4))
    tried = [minimize(loss, at, bounds=[(-4, 6), (-7, -0.1)], method="L-BFGS-B") for at in begins]
    factor, odds = min(tried, key=lambda one: one.fun).x
    return expit(np.exp(factor) * logits - odds), float(expit(odds))


def _scaled_block(block: np.ndarray) -> np.ndarray:
    """Columns with a mean square of 1, divided by the root of their number."""
    scale = np.sqrt((block**2).mean(axis=0))
    return block / np.where(scale > 0, scale, 1) / np.sqrt(block.shape[1])


def _cross_fitted(rows: np.ndarray, number: np.ndarray, folds: int, penalty: float) -> np.ndarray:
    logits = np.zeros(len(rows))
    for fold in range(folds):
        seen = rows[number != fold]
        weights = _fit_logistic(seen, np.ones(len(seen)), penalty)
        weights = _fit_logistic(seen, expit(seen @ weights), penalty)
        logits[number == fold] = rows[number == fold] @ weights
    return logits


def _fit_logistic(rows: np.ndarray, trust: np.ndarray, penalty: float) -> np.ndarray:
    """Weights w with the lowest mean of trust * log(1 + e^(-w.x)) + penalty |w|^2 / 2."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Its value and gradient."""
        logits = rows @ weights
        value = (trust * np.logaddexp(0, -logits)).mean() + penalty * weights @ weights / 2
        return value, rows.T @ (-trust * expit(-logits)) / len(rows) + penalty * weights

    return minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
