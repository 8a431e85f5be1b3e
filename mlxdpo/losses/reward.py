"""The loss of a reward model: it sees the rewards of both completions where others see log-probs."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.config import LossConfig
from mlxdpo.losses.loss import Loss, Term
from mlxdpo.losses.objective import Objective
from mlxdpo.losses.ratios import Number, less_margin
from mlxdpo.types import Pairs, UserError


def bradley_terry(pairs: Pairs, *, margin: Number = 0.0, center: Number = 0.0) -> mx.array:
    """-log s(r_w - r_l - margin) + center (r_w + r_l)^2, with the rewards r in `pairs.chosen` and `pairs.rejected`.

    First term: arXiv 2203.02155 eq. 1; the margin by which the better answer should win: arXiv 2307.09288 eq. 2
    (Llama 2), to which a row's own is added. Second term: arXiv 2312.09244; without it a constant added to all rewards
    changes nothing. No pair's term looks at another pair, so batches of any size give the same gradient.
    """
    lead = less_margin(pairs.chosen - pairs.rejected - margin, pairs)
    return -nn.log_sigmoid(lead) + center * (pairs.chosen + pairs.rejected) ** 2


def start_bradley_terry(*, margin: float, center: float) -> float:
    """log(1 + e^margin): its value while all rewards are 0, without margins of rows."""
    return math.log1p(math.exp(margin))


def reward_range(scored: Any) -> dict[str, float]:
    """Smallest, mean and largest reward of the completions in `metrics.Scored`, by TRL's names (RewardTrainer)."""
    rewards = np.concatenate([scored.chosen, scored.rejected])
    return {f"{name}_reward": float(getattr(rewards, name)()) for name in ("min", "mean", "max")}


OBJECTIVE = Objective(
    bradley_terry,
    "Bradley-Terry reward model",
    "2203.02155",
    "reference-free",
    start_bradley_terry,
    "stage: reward",
    reports=reward_range,
)


def reward_loss(margin: float, center: float, columns: Collection[str] = ()) -> Loss:
    """The loss of `stage: reward`. Of the columns that rows may have it takes `margin` and `weight`.

    Raises `UserError` for `probability`, which the Bradley-Terry model has no place for.
    """
    if "probability" in columns:
        raise UserError(
            "data.columns probability does not apply in stage reward: a pair has one better answer; drop it"
        )
    term = Term("bradley_terry", OBJECTIVE, 1.0, {"margin": margin, "center": center})
    return Loss((term,), LossConfig(), frozenset(columns) & {"margin", "weight"})
