"""Ask in both orders and average the logits; verdicts are kept on disk by what was asked.

    s1 = logit p(after is better | after shown first),  s2 = the same with after shown second,  s = (s1 + s2) / 2

An additive preference for a place drops out of s exactly; averaging probabilities leaves some of it. Invalid in one
order is invalid: never a tie, never a loss. Nobody is asked about equal answers, and no rate counts them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mlxdpo_eval.judges.kept import ask_unknown
from mlxdpo_eval.judges.protocol import Judge, KeepsAnswers, Question, Scalar, Verdict

Texts = Sequence[str]


class AnswerPair(NamedTuple):
    """A prompt with the answers before and after tuning."""

    prompt: str
    before: str
    after: str


class BothOrders(NamedTuple):
    """Logits that `after` is better, shown first and shown second; None with the reason. `equal`: nobody was asked.

    `note` is what the judge said about the pair, where it says more than which answer.
    """

    first: float | None
    second: float | None
    reason: str = ""
    absent: bool = False
    equal: bool = False
    note: str = ""

    @property
    def logit(self) -> float | None:
        """The average of both orders, from which a place has dropped out."""
        return None if self.first is None or self.second is None else (self.first + self.second) / 2


def ask_both(judge: Judge, pairs: Sequence[AnswerPair], *, cached: bool = True) -> list[BothOrders]:
    """The verdict on each pair of answers, in order; each distinct question is asked once, known ones not at all.

    With `cached` off all are asked and none is kept: to see whether the judge repeats itself.
    """
    orders = [(Question(t.prompt, t.after, t.before), Question(t.prompt, t.before, t.after)) for t in pairs]
    asked = dict.fromkeys(q for both in orders for q in both if q.first != q.second)
    verdicts = ask_questions(judge, list(asked), cached)
    return [_combine_orders(*(verdicts.get(q) for q in both)) for both in orders]


def _combine_orders(shown_first: Verdict | None, shown_second: Verdict | None) -> BothOrders:
    if shown_first is None or shown_second is None:
        return BothOrders(0.0, 0.0, equal=True)
    for verdict in (shown_first, shown_second):
        if verdict.logit is None:
            return BothOrders(None, None, verdict.reason, verdict.absent)
    assert shown_first.logit is not None and shown_second.logit is not None
    notes = dict.fromkeys(note for note in (shown_first.note, shown_second.note) if note)
    return BothOrders(shown_first.logit, -shown_second.logit, note="\n".join(notes))


def ask_questions(judge: Judge, questions: Sequence[Question], cached: bool = True) -> dict[Question, Verdict]:
    """The verdict on each of distinct questions; known ones are not asked again when `cached`."""
    if not cached or not judge.cached:
        source = judge if cached or not isinstance(judge, KeepsAnswers) else judge.fresh()
        return dict(zip(questions, source.ask(questions), strict=True))
    failed: dict[Question, Verdict] = {}

    def ask(part: list[Question]) -> Iterator[Mapping[str, Any] | None]:
        """Answers to be kept, None for failures."""
        for question, verdict in zip(part, judge.ask(part), strict=True):
            if verdict.logit is None:
                failed[question] = verdict
            yield None if verdict.logit is None else _kept_verdict(verdict)

    found = ask_unknown(judge.identity, questions, ask, "logit")
    return {
        q: failed[q] if kept is None else Verdict(kept["logit"], note=kept.get("note", "")) for q, kept in found.items()
    }


def _kept_verdict(verdict: Verdict) -> dict[str, Any]:
    return {"logit": verdict.logit, **({"note": verdict.note} if verdict.note else {})}


def score_answers(judge: Judge, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    """For each prompt a score of each of its answers, higher is better; NaN where there is no valid verdict.

    A judge that only compares is asked about every two answers in both orders; an answer's score is the mean
    probability, over the others, that it is the better one (the Borda count of soft verdicts). An invalid verdict
    counts for neither.
    """
    if isinstance(judge, Scalar):
        return _scalar_scores(judge, prompts, answers)
    return _borda_scores(judge, prompts, answers)


def _scalar_scores(judge: Scalar, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    asked = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
    flat = iter(judge.scores(asked, list(itertools.chain(*answers))) if asked else [])
    return [list(itertools.islice(flat, len(own))) for own in answers]


def _borda_scores(judge: Judge, prompts: Texts, answers: Sequence[Texts]) -> list[list[float]]:
    games = [(n, a, b) for n, own in enumerate(answers) for a, b in itertools.combinations(range(len(own)), 2)]
    found = ask_both(judge, [AnswerPair(prompts[n], answers[n][b], answers[n][a]) for n, a, b in games])
    won: list[list[list[float]]] = [[[] for _ in own] for own in answers]
    for (n, a, b), both in zip(games, found, strict=True):
        if both.logit is not None:
            p = float(special.expit(both.logit))
            won[n][a].append(p)
            won[n][b].append(1 - p)
    return [[float(np.mean(p)) if p else math.nan for p in own] for own in won]
