"""Simulated evaluations whose truth is known: does an interval of 95 % hold it 95 % of the time?

Each study draws data as an evaluation would see them and asks every method, ours and those in common use, on the
same draw. Dependent rows of a prompt come from a Gaussian copula, which leaves each row's own probability
exactly as set, so that the truth stays known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from mlxdpo_eval import pairwise
from mlxdpo_eval.metrics import calibration, intervals, judge_bias, length, sequential

RESAMPLES = 500
VOTES = 200


class Answer(NamedTuple):
    """One method on one draw: whether it holds the truth (None: it gave no interval), and its width."""

    method: str
    held: bool | None
    width: float


class Study(NamedTuple):
    """A kind of number. `ours` names the method that mlxdpo reports, `wanted` the coverage it has to have."""

    name: str
    ours: tuple[str, ...]
    wanted: tuple[float, float]
    about: str
    draw: Callable[[np.random.Generator], list[Answer]]


def _answer(method: str, interval: intervals.Interval | tuple[float, float] | None, truth: float) -> Answer:
    if interval is None:
        return Answer(method, None, 0.0)
    low, high = interval[1:3] if isinstance(interval, intervals.Interval) else interval
    return Answer(method, bool(low <= truth <= high), float(high - low))


def _around(mean: float, error: float, z: float = 1.959964) -> tuple[float, float]:
    return float(mean - z * error), float(mean + z * error)


def _sem(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _dependent(rng: np.random.Generator, chance: np.ndarray, prompts: np.ndarray, rho: float) -> np.ndarray:
    """(rows,) 0 or 1, each 1 with its own `chance`, rows of one prompt correlated (normal scores: rho)."""
    common = rng.normal(size=int(prompts.max()) + 1)[prompts]
    score = np.sqrt(rho) * common + np.sqrt(1 - rho) * rng.normal(size=len(chance))
    return (special.ndtr(score) < chance).astype(np.float64)


def _percentile(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The plain percentile interval of a mean over resampled rows."""
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def accuracy(rng: np.random.Generator) -> list[Answer]:
    """50 pairs of 50 prompts, true accuracy .9."""
    right, truth = (rng.random(50) < 0.9).astype(np.float64), 0.9
    share = right.mean()
    return [
        _answer("clustered Wilson", intervals.clustered_share(right, np.arange(50)), truth),
        _answer("Wilson", intervals.wilson(float(right.sum()), 50), truth),
        _answer("Wald: p ± 1.96 se", _around(share, np.sqrt(share * (1 - share) / 50)), truth),
    ]


def win_rate(rng: np.random.Generator) -> list[Answer]:
    """80 prompts of 2 to 6 answers, true rate .6 with ties: a tie where two correlated votes differ."""
    prompts, truth = np.repeat(np.arange(80), rng.integers(2, 7, size=80)), 0.6
    chance = np.full(len(prompts), truth)
    won = (_dependent(rng, chance, prompts, 0.7) + _dependent(rng, chance, prompts, 0.7)) / 2
    seed = int(rng.integers(1 << 31))
    return [
        _answer("clustered Wilson", intervals.clustered_share(won, prompts), truth),
        _answer("prompt bootstrap", intervals.cluster_bootstrap(won, prompts, n=RESAMPLES, seed=seed), truth),
        _answer("row bootstrap", _percentile(won, rng), truth),
        _answer("Wald: p ± 1.96 sem", _around(won.mean(), _sem(won)), truth),
    ]


def mean_of_subsets(rng: np.random.Generator) -> list[Answer]:
    """Subsets of 20, 40, 100 and 240 prompts with 2 dependent answers; true rates .9, .55, .7, .4, mean .6375."""
    sizes, rates = [20, 40, 100, 240], [0.9, 0.55, 0.7, 0.4]
    prompts, parts = np.repeat(np.arange(400), 2), np.repeat(np.arange(4), np.multiply(sizes, 2))
    won, truth = _dependent(rng, np.array(rates)[parts], prompts, 0.6), float(np.mean(rates))
    subsets = np.array([won[parts == part].mean() for part in range(4)])
    return [
        _answer("mean of rates, clustered", pairwise.macro_mean(won, parts.tolist(), prompts)[1], truth),
        _answer("all rows in one", intervals.clustered_share(won, prompts), truth),
        _answer("spread of the four rates, t", _around(subsets.mean(), _sem(subsets), 3.182446), truth),
    ]


def ended_answers(rng: np.random.Generator) -> list[Answer]:
    """120 prompts of 2 answers; a fifth are cut off and win .2 of the time, the others .65."""
    prompts, ended, truth = np.repeat(np.arange(120), 2), rng.random(240) > 0.2, 0.65
    won = _dependent(rng, np.where(ended, truth, 0.2), prompts, 0.6)
    return [
        _answer("clustered Wilson of those that ended", intervals.clustered_share(won[ended], prompts[ended]), truth),
        _answer("clustered Wilson of all", intervals.clustered_share(won, prompts), truth),
    ]


def controlled_win_rate(rng: np.random.Generator) -> list[Answer]:
    """120 prompts of 2 answers, longer than the baseline on average; at equal length they win .6 of the time."""
    prompts, theta, phi = np.repeat(np.arange(120), 2), special.logit(0.6), 1.0
    difference = rng.normal(0.5, 1.0, size=240)
    chance = special.expit(theta + phi * np.tanh(difference))
    won = _dependent(rng, chance, prompts, 0.5)
    seed = int(rng.integers(1 << 31))
    ours = length.length_controlled(won, difference, prompts, n=RESAMPLES, seed=seed)
    rows = length.length_controlled(won, difference, np.arange(240), n=RESAMPLES, seed=seed)
    predicted = np.full(240, ours.rate)  # AlpacaEval's own: one prediction per row, all alike without difficulties
    return [
        _answer("refit per prompt resample", ours.interval, 0.6),
        _answer("refit per row resample", rows.interval, 0.6),
        _answer("AlpacaEval: sem of predictions", _around(ours.rate, _sem(predicted)), 0.6),
    ]


def corrected_judge(rng: np.random.Generator) -> list[Answer]:
    """60 human votes, 500 answers only a judge has seen; true rate .58, the judge says .62 and agrees on 78 %."""
    truth, ability = 0.58, (0.845, 0.31)  # P(judge: win | human: win), P(judge: win | human: loss)
    human = (rng.random(560) < truth).astype(np.float64)
    judge = (rng.random(560) < np.where(human == 1, *ability)).astype(np.float64)
    found = judge_bias.debiased(human[:60], judge[:60], judge[60:])
    return [
        _answer("PPI++", found.estimate if found else None, truth),
        _answer("human votes alone, t", intervals.clustered_mean(human[:60], np.arange(60)), truth),
        _answer("judge alone, Wald", _around(judge.mean(), _sem(judge)), truth),
    ]


def _calibration(true_temperature: float) -> Callable[[np.random.Generator], list[Answer]]:
    def draw(rng: np.random.Generator) -> list[Answer]:
        """What the calibration's numbers say of 400 dependent pairs."""
        margins = np.abs(rng.normal(0.8, 1.5, size=400))
        chance = special.expit(margins / true_temperature)
        confidence, prompts = special.expit(margins), np.repeat(np.arange(200), 2)
        right = _dependent(rng, chance, prompts, 0.3)
        codes = calibration.equal_mass(confidence, 10)
        gaps, sizes = calibration.bin_gaps(confidence, chance, codes)
        truth, seed = float(np.abs(gaps) @ sizes / 400), int(rng.integers(1 << 31))
        return [
            _answer("test inversion", calibration.ece_interval(confidence, right, codes, prompts, seed=seed), truth),
            _answer("row bootstrap of ECE", _bootstrap_ece(right - confidence, codes, rng), truth),
        ]

    return draw


def _bootstrap_ece(errors: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    times = rng.multinomial(len(errors), np.full(len(errors), 1 / len(errors)), size=RESAMPLES)
    sums = (times * errors) @ np.eye(int(codes.max()) + 1)[codes]
    low, high = np.quantile(np.abs(sums).sum(1) / len(errors), [0.025, 0.975])
    return float(low), float(high)


def peeking(rng: np.random.Generator) -> list[Answer]:
    """200 votes without a difference, looked at after each: held means that no look ever called one."""
    wins, n = np.cumsum(rng.random(VOTES) < 0.5), np.arange(1, VOTES + 1)
    e_alarm = sequential.log_e_value(wins, n - wins).max() >= np.log(20)
    z_alarm = (np.abs(wins - n / 2) / np.sqrt(n / 4)).max() > 1.96
    return [
        Answer("e-process, E ≥ 20", not e_alarm, 0.0),
        Answer("z beyond ±1.96 at any look", not z_alarm, 0.0),
    ]


def anytime(rng: np.random.Generator) -> list[Answer]:
    """200 votes with a true rate of .6: held means that the interval held it after every one of them."""
    wins, n, truth = np.cumsum(rng.random(VOTES) < 0.6), np.arange(1, VOTES + 1), 0.6
    refuted = sequential.log_e_value(wins, n - wins, truth).max() >= np.log(20)
    low, high = sequential.anytime_interval(float(wins[-1]), float(VOTES - wins[-1]))
    z = 1.959964
    centre = (wins + z * z / 2) / (n + z * z)
    half = z * np.sqrt(wins * (n - wins) / n + z * z / 4) / (n + z * z)
    left = (np.abs(centre - truth) > half).any()
    return [
        Answer("anytime interval", not refuted, high - low),
        Answer("Wilson at every look", not left, float(2 * half[-1])),
    ]


BAND = (0.93, 0.975)
STUDIES = (
    Study(
        "accuracy", ("clustered Wilson",), BAND,
        "50 pairs, true accuracy .9. Wald's interval leaves [0, 1] near the ends and is too narrow there; "
        "Wilson's formula, with the sample size the clustered standard error implies, does neither.",
        accuracy,
    ),
    Study(
        "win rate", ("clustered Wilson", "prompt bootstrap"), BAND,
        "80 prompts of 2 to 6 dependent answers with ties, true rate .6. Resampling rows takes copies for "
        "evidence; prompts are what was drawn. The bootstrap's levels are expanded to Student's t.",
        win_rate,
    ),
    Study(
        "mean of subsets", ("mean of rates, clustered",), BAND,
        "Subsets of 20 to 240 prompts, true rates .9, .55, .7, .4, mean .6375. The rate of all rows is another "
        "number, and four rates alone say little about their mean.",
        mean_of_subsets,
    ),
    Study(
        "rate of answers that ended", ("clustered Wilson of those that ended",), BAND,
        "120 prompts of 2 dependent answers, a fifth of them cut off by the token limit, which lose four times in "
        "five; the others win .65 of the time.",
        ended_answers,
    ),
    Study(
        "length-controlled win rate", ("refit per prompt resample",), BAND,
        "120 prompts of 2 answers, true rate at equal length .6. AlpacaEval's standard error is the spread of its "
        "predictions, 0 without prompt difficulties; ours refits the regression on resampled prompts.",
        controlled_win_rate,
    ),
    Study(
        "judge corrected by humans", ("PPI++",), BAND,
        "60 human votes and 500 answers that only a judge saw, true rate .58, judge biased to .62. The judge alone is "
        "sure of the wrong number; PPI++ is narrower than the human votes alone and as honest.",
        corrected_judge,
    ),
    Study(
        "ECE, over-confident (T 1.5)", ("test inversion",), BAND,
        "400 pairs, 10 bins. An ECE counts noise as miscalibration, its bootstrap counts it twice; we report every "
        "ECE that would make the observed one ordinary, noise included.",
        _calibration(1.5),
    ),
    Study(
        "ECE, calibrated", ("test inversion",), BAND,
        "The same with a perfectly calibrated model: the truth 0 is at the edge of what is possible, which a plain "
        "bootstrap never reaches.",
        _calibration(1.0),
    ),
    Study(
        "ECE, error about the noise (T 1.2)", ("test inversion",), (0.93, 1.0),
        "In between, where the true error is about the noise, ours is conservative: it holds the truth more often than "
        "it says, because the true gaps nearest to those seen point the way the noise pointed.",
        _calibration(1.2),
    ),
    Study(
        "no false alarm while peeking", ("e-process, E ≥ 20",), (0.95, 1.0),
        "200 votes without a difference, a look after each. A test meant for one look calls a difference in "
        "four cases of ten; the e-process may be looked at for ever.",
        peeking,
    ),
    Study(
        "interval at every look", ("anytime interval",), (0.95, 1.0),
        "200 votes, true rate .6, all 200 intervals have to hold it. Ones for a single look do not; the anytime "
        "interval is wider for it.",
        anytime,
    ),
)  # fmt: skip
