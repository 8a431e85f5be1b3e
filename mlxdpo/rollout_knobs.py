"""The knobs of tuning on the policy's own samples against a reward: stages ppo and rloo (`mlxdpo.baselines`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlxdpo.knobs import Section


class RolloutConfig(Section):
    """Stages ppo and rloo: what is drawn at each step, and what is made of it. Defaults are TRL's."""

    samples: int = Field(default=2, ge=1)
    """Completions drawn for each prompt; a step takes train.batch_size * train.accumulate prompts."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest completion."""
    kl: float = Field(default=0.05, ge=0)
    """What a nat of distance from the reference costs in reward."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How that distance is read off a sampled token: the log-ratio, or an estimate that is never negative."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Reward that a completion loses which does not end by itself."""
    epochs: int = Field(default=4, ge=1)
    """ppo: how often each batch of completions is used."""
    minibatches: int = Field(default=1, ge=1)
    """ppo: optimizer steps in each of those passes."""
    clip: float = Field(default=0.2, gt=0)
    """ppo: how far the probability ratio may go and still be rewarded for it."""
    value_clip: float = Field(default=0.2, gt=0)
    """ppo: how far a value may move in one step and still be rewarded for it."""
    value_coef: float = Field(default=0.1, ge=0)
    """ppo: weight of the value loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """ppo: discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """ppo: lambda of the advantages; 1 trusts rewards alone, 0 the value of the next token."""
