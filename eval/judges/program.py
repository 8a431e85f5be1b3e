"""Programmed rewards as judges: each answer gets a number, the higher one wins. No order, no failure to parse.

What a reward returns that is no number (NaN, None, an error) makes the verdict invalid, with the reason.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdpo import UserError
from mlxdpo_eval.judges.protocol import Judge, Question, Verdict, certain, invalid

LARGEST = 1e100  # beyond it, squares in an interval overflow
Reward = Callable[[str, str], float]
"""(prompt, answer) -> a number, higher is better."""


def longest(prompt: str, answer: str) -> float:
    """Characters: the control that knows nothing but length."""
    return float(len(answer))


def shortest(prompt: str, answer: str) -> float:
    """Characters, fewer is better."""
    return -float(len(answer))


LENGTH_REWARDS: dict[str, Reward] = {"longest": longest, "shortest": shortest}


@dataclass(frozen=True)
class RewardJudge:
    """Compares the rewards of two answers."""

    name: str
    identity: Mapping[str, Any]
    reward: Reward
    cached: bool = False  # as quick as the cache, and a file may change without its name

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The reward of each answer; NaN where it gave no number."""
        return [_reward_value(self.reward, p, a)[0] for p, a in zip(prompts, answers, strict=True)]

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """The sign of the difference."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        first, why_first = _reward_value(self.reward, question.prompt, question.first)
        second, why_second = _reward_value(self.reward, question.prompt, question.second)
        return invalid(why_first or why_second) if why_first or why_second else certain(first - second)


def _reward_value(reward: Reward, prompt: str, answer: str) -> tuple[float, str]:
    try:
        value = float(reward(prompt, answer))
    except UserError:
        raise
    except Exception as error:  # it is the user's code: whatever it raises is one answer without a number
        return math.nan, f"the reward raised {type(error).__name__}"
    return (value, "") if abs(value) < LARGEST else (math.nan, f"the reward is {value}")


def reward_judge(name: str, reward: Reward) -> Judge:
    """A judge from a reward function."""
    return RewardJudge(name, {"kind": "program", "name": name}, reward)


def file_judge(file: str, function: str) -> Judge:
    """Open `FILE.py:FUNCTION`. Raises `UserError` when there is no such file or function."""
    path = Path(file)
    if not os.path.isfile(path):
        raise UserError(f"--judge {file}:{function}: no such file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"mlxdpo_judge_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Any = getattr(module, function, None)
    if not isinstance(found, Callable):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(
            f"--judge {file}:{function}: the file has no such function; it has {', '.join(names) or 'none'}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"{path.name}:{function}"
    reward: Reward = found
    return RewardJudge(name, {"kind": "program", "name": name, "digest": digest}, reward)
