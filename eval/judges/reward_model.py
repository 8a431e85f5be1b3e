"""A trained reward model as judge: each answer gets a number, and the difference of two is the log-odds that the first
is better (the Bradley-Terry model it was trained with). No order, no wording.

It knows what its pairs taught it and nothing else; a policy tuned on the same pairs is no surprise to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdpo_eval.judges.protocol import Judge, Question, Verdict, invalid


@dataclass(frozen=True)
class RewardModelJudge:
    """Compares the rewards of two answers; `model` gives them, (prompts, completions) -> numbers."""

    name: str
    identity: Mapping[str, Any]
    model: Any
    cached: bool = True

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The reward of each answer; NaN where it could not be read."""
        return self.model(prompts, answers).tolist()

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Differences of rewards; each answer is computed once."""
        rows = list(dict.fromkeys((q.prompt, answer) for q in questions for answer in (q.first, q.second)))
        found = self.scores([prompt for prompt, _ in rows], [answer for _, answer in rows]) if rows else []
        reward = dict(zip(rows, found, strict=True))
        return [_verdict(reward[q.prompt, q.first] - reward[q.prompt, q.second]) for q in questions]


def _verdict(difference: float) -> Verdict:
    return Verdict(difference) if math.isfinite(difference) else invalid("an answer that cannot be scored")


def reward_model_judge(run: str) -> Judge:
    """Open `reward:RUN`, the run directory of a reward model. Raises `UserError` when it is none."""
    from mlxdpo import Run, open_reward_model  # they load MLX

    model = open_reward_model(Run.open(run))
    name = f"reward:{Path(run).name}"
    return RewardModelJudge(name, {"kind": "reward model", **model.identity}, model)
