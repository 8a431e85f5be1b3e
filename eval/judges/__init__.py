"""Judges: who says which of two answers is better. One file per kind; a new one is a function in `JUDGES`.

A judge is named by a specification, `kind` or `kind:rest`:

    local:MODEL                  a language model on this machine, asked for one token
    endpoint:MODEL@URL           an OpenAI-compatible server, e.g. endpoint:qwen3@http://localhost:8080/v1
    rubric:MODEL@URL             the same, 1 to 10 points with reasons for each answer by itself
    panel:RULE:JUDGE,JUDGE,...   several judges: majority of their verdicts, or mean of their logits
    reward:RUN                   a reward model that was trained here (stage: reward)
    votes:FILE                   human votes
    longest, shortest, NAME      a programmed reward (the names given by the caller)
    FILE.py:FUNCTION             your own reward: function(prompt, answer) -> number
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mlxdpo import UserError
from mlxdpo_eval.judges.both import AnswerPair, BothOrders, ask_both
from mlxdpo_eval.judges.endpoint import endpoint_judge
from mlxdpo_eval.judges.local import local_judge
from mlxdpo_eval.judges.panel import panel_judge
from mlxdpo_eval.judges.program import LENGTH_REWARDS, Reward, file_judge, reward_judge
from mlxdpo_eval.judges.protocol import Judge, Question, Scalar, Verdict
from mlxdpo_eval.judges.reward_model import reward_model_judge
from mlxdpo_eval.judges.rubric import rubric_judge
from mlxdpo_eval.judges.votes import votes_judge

__all__ = ["JUDGES", "AnswerPair", "BothOrders", "Judge", "Question", "Scalar", "Verdict", "ask_both", "open_judge"]

JUDGES: dict[str, Callable[[str], Judge]] = {
    "local": local_judge,
    "endpoint": endpoint_judge,
    "rubric": rubric_judge,
    "reward": reward_model_judge,
    "votes": votes_judge,
}
"""Kind -> what opens a judge from the rest of its specification."""
PANEL = "panel"  # of other judges, so it is opened with the caller's rewards


def open_judge(spec: str, rewards: Mapping[str, Reward] | None = None) -> Judge:
    """The judge that `spec` names; `rewards` are programmed rewards the caller knows besides this package's own.

    Raises `UserError` for an unknown name, listing the known ones, and for what the judge cannot use.
    """
    named = LENGTH_REWARDS | dict(rewards or {})
    if spec in named:
        return reward_judge(spec, named[spec])
    kind, _, rest = spec.partition(":")
    if kind == PANEL and rest:
        return panel_judge(rest, lambda member: open_judge(member, rewards))
    if kind in JUDGES and rest:
        return JUDGES[kind](rest)
    if kind.endswith(".py") and rest:
        return file_judge(kind, rest)
    known = ", ".join([*(f"{name}:..." for name in (*JUDGES, PANEL)), *named, "FILE.py:FUNCTION"])
    raise UserError(f"--judge {spec}: no such judge; known: {known}")
