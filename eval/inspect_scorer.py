"""A pairwise scorer and its metric for inspect_ai (0.3): `from mlxdpo_eval.inspect_scorer import pairwise`.

    Task(dataset=samples, solver=generate(), scorer=pairwise())

Each sample's target is the baseline's answer. The grader, inspect's role "grader" or the model itself, compares both in
both orders; a verdict counts when it is one of the labels, and an answer that cannot be read is unscored, not lost.
Needs `pip install inspect_ai`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from inspect_ai.model import Model, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState

from mlxdpo_eval.metrics.intervals import clustered_share

QUESTION = (
    "Which of two answers to a request is better?\n\nRequest:\n{prompt}\n\n"
    "Answer A:\n{first}\n\nAnswer B:\n{second}\n\nReply with a single letter: A, B, or C if they are equally good."
)
LABELS = {"A": 1.0, "B": 0.0, "C": 0.5}


@metric
def pairwise_rate() -> Metric:
    """The win rate with its 95 % interval, clustered by sample so that epochs are no further evidence."""

    def rate(scores: list[SampleScore]) -> dict[str, float]:
        """`rate`, `low`, `high` (NaN without an interval), and `scored` of the samples."""
        valid = [(float(s.score.value), s.sample_id) for s in scores if _is_share(s.score.value)]
        interval = clustered_share([v for v, _ in valid], [str(name) for _, name in valid]) if valid else None
        return {
            "rate": float(np.mean([v for v, _ in valid])) if valid else float("nan"),
            "low": float("nan") if interval is None else interval.low,
            "high": float("nan") if interval is None else interval.high,
            "scored": float(len(valid)),
        }

    return rate


@scorer(metrics=[pairwise_rate()])
def pairwise(grader: str | Model | None = None, template: str = QUESTION) -> Scorer:
    """Compares the answer with the target in both orders: 1 better in both, 0 worse in both, else 1/2.

    `template` has the fields prompt, first and second, and asks for A, B or C. Answers that are equal are a tie and not
    asked about. A sample without a verdict in one of the orders has the value NaN and the replies in its explanation.
    """

    async def score(state: TaskState, target: Target) -> Score:
        """One sample."""
        answer, baseline = state.output.completion, target.text
        if answer.strip() == baseline.strip():
            return Score(value=0.5, answer=answer, explanation="equal answers")
        judge = get_model(grader) if grader is not None else get_model(role="grader")
        asked = [
            template.format(prompt=state.input_text, first=first, second=second)
            for first, second in ((answer, baseline), (baseline, answer))
        ]
        replies = [(await judge.generate(text)).completion for text in asked]
        first, second = (LABELS.get(reply.strip().strip(".*()[]").upper()) for reply in replies)
        if first is None or second is None:
            return Score(value=float("nan"), answer=answer, explanation=f"no verdict in {replies!r}")
        both = first if first == 1 - second else 0.5
        return Score(value=both, answer=answer, explanation=f"shown first {first:g}, shown second {1 - second:g}")

    return score


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1
