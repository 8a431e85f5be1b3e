"""Does the model win, or only write more? Accuracy by length, and win rates at equal length.

The length-controlled rate is AlpacaEval 2's (arXiv 2404.04475) without its prompt difficulties: a logistic
regression of the outcome on the length difference, read at difference 0. Unlike AlpacaEval's standard error,
the spread of the predictions (0 without difficulties), the interval is a sampling error: the regression is
fitted again on every resample of the prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special, stats

from mlxdpo_eval.metrics.intervals import Interval, clustered_share, mean_or_none, number_clusters, percentile_levels

RIDGE = 0.1  # on phi alone, beside at most 1/4 from each vote; keeps phi finite where length decides everything
LIMIT = 20.0  # logits; sigmoid(20) is 1 within 2e-9
CELLS = 1 << 20  # numbers of a block of resamples held at once
NEAR = 0.1


class ByLength(NamedTuple):
    """Pairs of one kind of length difference; None where there are none, no interval where data cannot carry one."""

    name: str
    n: int
    accuracy: float | None
    interval: Interval | None


class LengthBaseline(NamedTuple):
    """What length alone reaches: `rule` is "longer" or "shorter", whichever is right more often."""

    rule: str
    rate: float
    interval: Interval | None


def length_baseline(longer: float, interval: Interval | None) -> LengthBaseline:
    """max(p, 1 - p) of p, the rate at which the longer answer is right, with the interval of that side."""
    if longer >= 0.5:
        return LengthBaseline("longer", longer, interval)
    other = None if interval is None else Interval(1 - longer, 1 - interval.high, 1 - interval.low, interval.clusters)
    return LengthBaseline("shorter", 1 - longer, other)


class LengthReport(NamedTuple):
    """How far a preference for length explains the accuracy on held-out pairs.

    `longer_baseline` is the accuracy of always picking the longer completion (1/2 for equal lengths), `baseline`
    that of the better of this rule and its opposite; `correlation` is Spearman's, of the margin with the length
    difference; None where either does not vary.
    """

    groups: tuple[ByLength, ...]
    longer_baseline: float
    longer_interval: Interval | None
    baseline: LengthBaseline
    correlation: float | None
    controlled: Controlled


class Controlled(NamedTuple):
    """A rate at equal length: sigmoid(theta), with phi the pull of length in logits (above 0: longer wins).

    `raw` is the plain mean. When every outcome is 1 (or every one 0), theta is infinite, the rate that
    outcome, and there is no interval.
    """

    raw: float
    rate: float
    interval: Interval | None
    theta: float
    phi: float
    phi_interval: Interval | None


def length_report(
    margins: np.ndarray,
    chosen_len: np.ndarray,
    rejected_len: np.ndarray,
    prompts: np.ndarray,
    level: float = 0.95,
    seed: int = 0,
) -> LengthReport:
    """(B,) each: reward margins, lengths in any one unit, cluster names. Raises `ValueError` for no pairs."""
    chosen_len, rejected_len = np.asarray(chosen_len, np.float64), np.asarray(rejected_len, np.float64)
    margins, prompts = np.asarray(margins, np.float64), np.asarray(prompts)
    won, longer = (np.sign(margins) + 1) / 2, (np.sign(chosen_len - rejected_len) + 1) / 2
    controlled = length_controlled(won, chosen_len - rejected_len, prompts, level=level, seed=seed)
    return LengthReport(
        by_length(won, chosen_len, rejected_len, prompts, level),
        float(longer.mean()),
        clustered_share(longer, prompts, level),
        length_baseline(float(longer.mean()), clustered_share(longer, prompts, level)),
        spearman(margins, chosen_len - rejected_len),
        controlled,
    )


def by_length(
    won: np.ndarray, chosen_len: np.ndarray, rejected_len: np.ndarray, prompts: np.ndarray, level: float = 0.95
) -> tuple[ByLength, ...]:
    """Accuracy where the chosen completion is longer, shorter, or within 10 % of the longer one's length."""
    longest = np.maximum(chosen_len, rejected_len)
    near = np.abs(chosen_len - rejected_len) <= NEAR * longest
    kinds = {
        "chosen longer": ~near & (chosen_len > rejected_len),
        "chosen shorter": ~near & (chosen_len < rejected_len),
        "within 10 %": near,
    }
    return tuple(
        ByLength(name, int(here.sum()), mean_or_none(won[here]), clustered_share(won[here], prompts[here], level))
        for name, here in kinds.items()
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one of the two does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.asarray(stats.spearmanr(a, b))[0])


def length_controlled(
    wins: np.ndarray,
    length_difference: np.ndarray,
    prompts: np.ndarray,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Controlled:
    """Win rate at equal length: P(win) = sigmoid(theta + phi tanh(dlen / std(dlen))), arXiv 2404.04475.

    `wins` (rows,) in [0, 1], soft or halves for ties; `length_difference` (rows,), the model's length less the
    baseline's, any unit; std with one degree of freedom less, as in alpaca_eval 0.6.6 `glm_winrate.py`, once
    for all resamples: it is the unit of phi. theta is free, phi has a small ridge (`RIDGE`). The interval is
    the expanded percentile interval (`percentile_levels`) of `n` fits to resampled prompts, all solved at once.
    None below two prompts, and when all outcomes are equal. Raises `ValueError` for no rows, lengths that
    differ, or outcomes outside [0, 1].
    """
    y, labels = number_clusters(wins, prompts)
    x, _ = number_clusters(length_difference, prompts)
    if not len(y) or y.min() < 0 or y.max() > 1:
        raise ValueError(f"{len(y)} outcomes; expected at least one, each between 0 and 1")
    raw, count = float(y.mean()), int(labels.max()) + 1
    x = length_term(x)
    if raw in (0.0, 1.0):
        return Controlled(raw, raw, None, (2 * raw - 1) * np.inf, 0.0, None)
    theta, phi = (float(v) for v in fit_length_effect(y, x, np.ones((1, len(y))))[0])
    rate = float(special.expit(theta))
    if count < 2 or np.ptp(y) == 0:
        return Controlled(raw, rate, None, theta, phi, None)
    refits = _refits(y, x, labels, n, seed, np.array([theta, phi]))
    (low, phi_low), (high, phi_high) = np.quantile(refits, percentile_levels(level, count), axis=0)
    return Controlled(
        raw,
        rate,
        Interval(rate, float(special.expit(low)), float(special.expit(high)), count),
        theta,
        phi,
        Interval(phi, float(phi_low), float(phi_high), count) if phi_low < phi_high else None,
    )


def length_term(length_difference: np.ndarray) -> np.ndarray:
    """(rows,) tanh of the standardised length difference, in (-1, 1); 0 where all differences are 0."""
    scale = float(np.std(length_difference, ddof=1)) if len(length_difference) > 1 else 0.0
    # One common difference has no spread: it cannot be told from theta, and rounding must not make it 1.
    varies = scale > 1e-12 * np.abs(length_difference).max()
    return np.tanh(length_difference / scale) if varies else np.zeros_like(length_difference)


def _refits(y: np.ndarray, x: np.ndarray, labels: np.ndarray, n: int, seed: int, start: np.ndarray) -> np.ndarray:
    """(n, 2) theta and phi of resampled clusters, each drawn cluster counted as often as it was drawn."""
    rng, count = np.random.default_rng(seed), int(labels.max()) + 1
    block = max(1, CELLS // len(y))
    parts = []
    for done in range(0, n, block):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(block, n - done))
        parts.append(fit_length_effect(y, x, times[:, labels].astype(np.float64), start))
    return np.concatenate(parts)


def fit_length_effect(
    y: np.ndarray, x: np.ndarray, weights: np.ndarray, start: np.ndarray | None = None, ridge: float = RIDGE
) -> np.ndarray:
    """(fits, 2) maximisers theta, phi of sum_i w_i [y_i log q_i + (1 - y_i) log(1 - q_i)] - ridge phi² / 2.

    q = sigmoid(theta + phi x); `weights` (fits, rows), each fit its own. Newton's method (iteratively
    reweighted least squares), its steps held to 2 so that it cannot leap; theta is held to +-`LIMIT`, reached
    only when all outcomes of a resample agree.
    """
    at = np.tile(np.zeros(2) if start is None else start, (len(weights), 1))
    # One product with x, x² and 1 at a time: the sums of all fits are matrix products.
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    target = weights @ (powers[:, :2] * y[:, None])
    for _ in range(100):
        q = special.expit(at[:, :1] + at[:, 1:] * x)
        wq = weights * q
        gradient = target - wq @ powers[:, :2]
        gradient[:, 1] -= ridge * at[:, 1]
        wq *= 1 - q
        h = wq @ powers
        h[:, 2] += ridge
        h[:, 0] += 1e-10  # a resample whose outcomes all agree has no curvature left at the limit
        step = np.clip(_solve_symmetric(h, gradient), -2, 2)
        moved = np.clip(at + step, -LIMIT, LIMIT)
        done = np.abs(moved - at).max() < 1e-9
        at = moved
        if done:
            break
    return at


def _solve_symmetric(h: np.ndarray, g: np.ndarray) -> np.ndarray:
    """(fits, 2) solutions of the symmetric systems [[h0, h1], [h1, h2]] s = g."""
    determinant = h[:, 0] * h[:, 2] - h[:, 1] ** 2
    first, second = h[:, 2] * g[:, 0] - h[:, 1] * g[:, 1], h[:, 0] * g[:, 1] - h[:, 1] * g[:, 0]
    return np.stack([first, second], axis=1) / determinant[:, None]
