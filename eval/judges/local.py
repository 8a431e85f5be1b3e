"""A language model on this machine as judge: one forward pass per question, no answer to parse.

The verdict is the difference of the logits of the two labels as the next token, so it is always there. What matters
is whether the model knows anything: a model of 135 million parameters does not. See the judge's report card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdpo import UserError
from mlxdpo_eval.judges.protocol import (
    LABELS,
    TEST_QUESTION,
    WORDING,
    Judge,
    Question,
    Verdict,
    invalid,
    judge_prompt,
)


@dataclass(frozen=True)
class LocalJudge:
    """An MLX model asked for one token. `labels` holds the token ids that count for the first and second label."""

    name: str
    identity: Mapping[str, Any]
    policy: Any
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    cached: bool = True

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Log-odds of the first label against the second, each label in all its spellings."""
        from mlxdpo import load_config  # they load MLX
        from mlxdpo.inner import encode_prompt, next_logits  # they load MLX

        data = load_config().data
        rows = [encode_prompt(judge_prompt(q), self.policy.tokenizer, data).tolist() for q in questions]
        first, second = self.labels
        logits = next_logits(self.policy.model, rows, [*first, *second]).astype(np.float64)
        odds = np.logaddexp.reduce(logits[:, : len(first)], 1) - np.logaddexp.reduce(logits[:, len(first) :], 1)
        return [Verdict(float(o)) if math.isfinite(o) else invalid("its logits are not finite") for o in odds]


def local_judge(model: str) -> Judge:
    """Open `local:MODEL`. Raises `UserError` when a label is no single token, or a test question has no verdict."""
    from mlxdpo import load_config, load_policy  # they load MLX

    policy = load_policy(load_config(None, {"model": {"path": model}}).model)
    labels = tuple(_spellings(policy.tokenizer, label) for label in LABELS)
    if not all(labels):
        raise UserError(f"--judge local:{model}: its tokenizer has no single token for {' and '.join(LABELS)}")
    identity = {"kind": "local", **{k: policy.identity[k] for k in ("digest", "dtype", "quantization")}}
    judge = LocalJudge(f"local:{model}", identity | {"wording": WORDING, "labels": labels}, policy, labels)  # type: ignore[arg-type]
    (verdict,) = judge.ask([TEST_QUESTION])
    if verdict.logit is None:
        raise UserError(f"--judge local:{model}: it failed the test question ({verdict.reason}); use another model")
    return judge


def _spellings(tokenizer: Any, label: str) -> tuple[int, ...]:
    """Single tokens that read as the label: with and without the space some templates leave to the model."""
    found = [tokenizer.encode(text, add_special_tokens=False) for text in (label, f" {label}")]
    return tuple(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))
