"""Ask in both orders and average the logits; verdicts are kept on disk by what was asked.

    s1 = logit p(after is better | after shown first),  s2 = the same with after shown second,  s = (s1 + s2) / 2

An additive preference for a place drops out of s exactly; averaging probabilities leaves some of it. Invalid in one
order is invalid: never a tie, never a loss. Equal answers are a tie that nobody is asked about.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mlxdpo.inner import append_line, cache_folder
from mlxdpo_eval.judges.protocol import Judge, Question, Scalar, Verdict

Texts = Sequence[str]
CHUNK = 64  # questions between two writes to the cache: what an interruption may lose


class AnswerPair(NamedTuple):
    """A prompt with the answers before and after tuning."""

    prompt: str
    before: str
    after: str


class BothOrders(NamedTuple):
    """Logits that `after` is better, shown first and shown second; None with the reason. `same`: equal answers."""

    first: float | None
    second: float | None
    reason: str = ""
    absent: bool = False
    same: bool = False

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
    verdicts = _ask_questions(judge, list(asked), cached and judge.cached)
    return [_combine_orders(*(verdicts.get(q) for q in both)) for both in orders]


def _combine_orders(shown_first: Verdict | None, shown_second: Verdict | None) -> BothOrders:
    if shown_first is None or shown_second is None:
        return BothOrders(0.0, 0.0, same=True)
    for verdict in (shown_first, shown_second):
        if verdict.logit is None:
            return BothOrders(None, None, verdict.reason, verdict.absent)
    assert shown_first.logit is not None and shown_second.logit is not None
    return BothOrders(shown_first.logit, -shown_second.logit)


def _ask_questions(judge: Judge, questions: list[Question], cached: bool) -> dict[Question, Verdict]:
    if not cached:
        return dict(zip(questions, judge.ask(questions), strict=True))
    file = cache_file(judge)
    known = _known_verdicts(file)
    keys = {question: question_key(question) for question in questions}
    found = {q: Verdict(known[key]) for q, key in keys.items() if key in known}
    left = [q for q in questions if q not in found]
    for at in range(0, len(left), CHUNK):
        part = left[at : at + CHUNK]
        for question, verdict in zip(part, judge.ask(part), strict=True):
            found[question] = verdict
            if verdict.logit is not None:  # a failure may not be one the next time
                line = {"question": keys[question], "logit": verdict.logit}
                append_line(file, {**line, "sum": _line_sum(line)})
    return found


def _known_verdicts(file: Path) -> dict[str, float]:
    """Kept verdicts by question; a line that is not as it was written counts as not there, and is asked again."""
    known: dict[str, float] = {}
    for raw in file.read_bytes().split(b"\n")[:-1] if file.is_file() else []:
        try:
            line = json.loads(raw)
            written = line.pop("sum", None)  # earlier versions wrote none
            if written in (None, _line_sum(line)) and math.isfinite(line["logit"]):
                known[line["question"]] = line["logit"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return known


def _line_sum(line: Mapping[str, Any]) -> str:
    return _question_digest(map(str, line.values()))[:16]


def cache_file(judge: Judge) -> Path:
    """Where a judge's verdicts are kept: named by its whole identity."""
    return cache_folder() / "verdicts" / f"{_question_digest([json.dumps(judge.identity, sort_keys=True)])}.jsonl"


def question_key(question: Question) -> str:
    """The name of a question: prompt, both answers and their order."""
    return _question_digest(question)


def _question_digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]


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
