"""What `stage` changes in the story of a run: the rows it takes, its objective, how rows are run, what is reported.

`train` tells one story and asks the stage at its turns; a stage is an entry of `STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.nn as nn

from mlxdpo.config import Config, LossConfig
from mlxdpo.data.dataset import Dataset
from mlxdpo.data.transforms import (
    DEMONSTRATIONS,
    END,
    PAIRS,
    REWARDED,
    THUMBS,
    Transform,
    balance,
    thumbs,
    thumbs_with_kl,
)
from mlxdpo.forward.choose_forward import ForwardFns
from mlxdpo.forward.reward_head import attach_head, detach_head, save_head
from mlxdpo.forward.rewards import reward_fns
from mlxdpo.losses import Loss, resolve
from mlxdpo.losses.reward import reward_loss
from mlxdpo.runs import Run
from mlxdpo.training.metrics import Scored, imitation_metrics, preference_metrics, reward_metrics
from mlxdpo.types import Example, UserError

IN_ROUNDS = ("collect", "rounds")  # what only `mlxdpo iterate` reads
Shown = tuple[Example, tuple[str, ...]]


class Stage(NamedTuple):
    """One stage of tuning.

    rate       the peak learning rate that `optim.lr: auto` means; None: found by probes (`rate_probe`)
    idle       settings of the recipe that mean nothing in it: sections, or single knobs by their dotted names
    loss       what a step minimises
    transform  the rows it trains on, and how they are laid out
    forward    how rows are run, given how log-probs are computed
    attach     gives the model what it needs besides its adapter
    metrics    numbers of the pairs of a step or an evaluation, given the loss and `loss.beta`
    tokens     tokens that a row counts for in `num_tokens`
    keep       puts what was attached into the run directory and takes it off the model
    shown      an example for a reader, and what its completions are called
    remark     what a user should know of the data before they are trained on; "" for nothing
    writes     whether the model answers prompts
    """

    rate: float | None
    idle: tuple[str, ...]
    loss: Callable[[Config], Loss]
    transform: Callable[[Config, Loss], Transform]
    forward: Callable[[ForwardFns, Config], ForwardFns]
    attach: Callable[[nn.Module], Any]
    metrics: Callable[[Scored, Loss, float], dict[str, float]]
    tokens: Callable[[Example], int]
    keep: Callable[[nn.Module, Run], None]
    shown: Callable[[Example, Loss], Shown]
    remark: Callable[[Dataset, Config, Loss], str]
    writes: bool = True


def stage_of(config: Config) -> Stage:
    """The stage a recipe names. Raises `UserError` for a setting that has no meaning in it."""
    if config.stage not in STAGES:
        raise UserError(
            f"stage {config.stage} needs a reward function, which only Python can give: see mlxdpo.baselines"
        )
    stage, given, plain = STAGES[config.stage], config.model_dump(), Config().model_dump()
    for name in stage.idle:
        section, _, knob = name.partition(".")
        for key in (knob,) if knob else plain[section]:
            if given[section][key] != plain[section][key]:
                hint = "run `mlxdpo iterate`, or drop it" if section in IN_ROUNDS else "drop it"
                raise UserError(f"{section}.{key} {given[section][key]} has no meaning in stage {config.stage}; {hint}")
    return stage


def _nothing(*_: Any) -> None:
    """Nothing to attach, nothing to keep."""


def _preferences(config: Config, loss: Loss) -> Transform:
    if loss.paired:
        return PAIRS
    return thumbs_with_kl(config.train.seed) if loss.mismatched else THUMBS


def _tokens_of_pair(example: Example) -> int:
    """Prompt and completion of both rows."""
    return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)


def _tokens_of_completion(example: Example) -> int:
    """Prompt and the one completion, which the example holds twice."""
    return len(example.prompt) + len(example.chosen)


def _keep_head(model: nn.Module, run: Run) -> None:
    save_head(model, run.path)
    detach_head(model)


def _as_laid_out(example: Example, loss: Loss) -> Shown:
    if loss.paired:
        return example, ("chosen", "rejected")
    thumb = "thumb up" if example.extras.desirable else "thumb down"
    return example, (thumb, "completion of another prompt, for the KL term") if loss.mismatched else (thumb,)


def _thumbs(data: Dataset, config: Config, loss: Loss) -> str:
    """How the thumbs of unpaired rows stand, and of those held out."""
    if loss.paired:
        return ""
    held = f" ({balance(thumbs(data.heldout), 1, 1).partition(';')[0]} held out)" if len(data.heldout) else ""
    return balance(thumbs(data.train), config.loss.desirable_weight, config.loss.undesirable_weight) + held


def _without_end(example: Example, loss: Loss) -> Shown:
    names = ("chosen", "rejected", "chosen_mask", "rejected_mask")
    sides = {name: None if (a := getattr(example, name)) is None else a[: -len(END)] for name in names}
    return replace(example, **sides), ("chosen", "rejected")


STAGES: dict[str, Stage] = {
    "dpo": Stage(
        rate=None,
        idle=("reward", "rollout", *IN_ROUNDS),
        loss=lambda config: resolve(config.loss, config.data.columns),
        transform=_preferences,
        forward=lambda forward, config: forward,
        attach=_nothing,
        metrics=preference_metrics,
        tokens=_tokens_of_pair,
        keep=_nothing,
        shown=_as_laid_out,
        remark=_thumbs,
    ),
    "sft": Stage(
        rate=1e-4,  # new outputs are taught: more than DPO's nudge
        idle=("loss", "reference", "reward", "rollout", *IN_ROUNDS),
        loss=lambda config: resolve(LossConfig(name="sft"), config.data.columns),
        transform=lambda config, loss: DEMONSTRATIONS,
        forward=lambda forward, config: forward,
        attach=_nothing,
        metrics=imitation_metrics,
        tokens=_tokens_of_completion,
        keep=_nothing,
        shown=lambda example, loss: (example, ("completion",)),
        remark=lambda data, config, loss: "",
    ),
    "reward": Stage(
        rate=1e-4,
        idle=("loss", "reference", "rollout", "train.sample_every", *IN_ROUNDS),
        loss=lambda config: reward_loss(config.reward.margin, config.reward.center, config.data.columns),
        transform=lambda config, loss: REWARDED,
        forward=lambda forward, config: reward_fns(forward.level, config.train.gradient_checkpointing),
        attach=attach_head,
        metrics=reward_metrics,
        tokens=_tokens_of_pair,
        keep=_keep_head,
        shown=_without_end,
        remark=lambda data, config, loss: "",
        writes=False,
    ),
}
