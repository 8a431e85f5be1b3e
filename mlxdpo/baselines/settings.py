"""Which settings of a recipe have a meaning in stages ppo and rloo; all others are refused, never ignored."""

from __future__ import annotations

from typing import Any

from mlxdpo.config import Config
from mlxdpo.types import UserError

IDLE = (
    "loss",
    "reward",
    "collect",
    "rounds",
    "reference.sync_every",
    "lora.dropout",
    "train.gradient_checkpointing",
    "train.patience",
    "train.keep_model",
    "data.on_long_prompt",
    "data.on_long_completion",
)
PPO_ONLY = ("epochs", "minibatches", "clip", "value_clip", "value_coef", "gamma", "lam")


def check_rollout_settings(config: Config) -> None:
    """Raise `UserError` for another stage, a setting without meaning in it, or samples that have no siblings."""
    if config.stage not in ("ppo", "rloo"):
        raise UserError(f"stage {config.stage} does not tune on its own samples; set stage to ppo or rloo")
    idle = [*IDLE, *(f"rollout.{knob}" for knob in PPO_ONLY if config.stage == "rloo")]
    given, plain = config.model_dump(), Config().model_dump()
    for name in idle:
        section, _, knob = name.partition(".")
        for key in (knob,) if knob else plain[section]:
            _refuse_changed(f"{section}.{key}", given[section][key], plain[section][key], config.stage)
    if config.train.eval_every not in (0, Config().train.eval_every):
        raise UserError(f"train.eval_every {config.train.eval_every} has no meaning in stage {config.stage}; drop it")
    if config.stage == "rloo" and config.rollout.samples < 2:
        raise UserError("rollout.samples is 1, but rloo compares the completions of a prompt; set it to 2 or more")


def _refuse_changed(name: str, value: Any, default: Any, stage: str) -> None:
    if value != default:
        raise UserError(f"{name} {value} has no meaning in stage {stage}; drop it")
