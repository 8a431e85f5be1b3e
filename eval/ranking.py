"""Several answers to one prompt, ranked by any judge: its own scores, or how often each answer beats the others.

A judge that only compares is asked about every two answers in both orders; an answer's score is the mean probability,
over the others, that it is the better one (the Borda count of soft verdicts). An invalid verdict counts for neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from .judges import Judge, Scalar, Trio, ask_both

Texts = Sequence[str]


def scores_of(judge: Judge, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    """For each prompt a score of each of its answers, higher is better; NaN where there is no valid verdict."""
    if isinstance(judge, Scalar):
        return _scalar(judge, prompts, answers)
    return _compared(judge, prompts, answers)


def _scalar(judge: Scalar, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    asked = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
    flat = iter(judge.scores(asked, list(itertools.chain(*answers))) if asked else [])
    return [list(itertools.islice(flat, len(own))) for own in answers]


def _compared(judge: Judge, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    games = [(n, a, b) for n, own in enumerate(answers) for a, b in itertools.combinations(range(len(own)), 2)]
    found = ask_both(judge, [Trio(prompts[n], answers[n][b], answers[n][a]) for n, a, b in games])
    won: list[list[list[float]]] = [[[] for _ in own] for own in answers]
    for (n, a, b), both in zip(games, found, strict=True):
        if both.logit is not None:
            p = float(special.expit(both.logit))
            won[n][a].append(p)
            won[n][b].append(1 - p)
    return [[float(np.mean(p)) if p else math.nan for p in own] for own in won]
