"""The models that rounds look at: where round 1 started, and a round's own against it."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from mlxdpo.config import Config
from mlxdpo.inference.trained_run import Side, TrainedRun
from mlxdpo.model.adapters import adapters_off, load_adapter, load_run, read_settings
from mlxdpo.model.policy import load_policy
from mlxdpo.online.collect.run import PolicySource, policy_source
from mlxdpo.runs import Run


def start_source(config: Config, name: str) -> PolicySource:
    """The model of a recipe as it is before any training, with the adapter it starts from."""
    policy, adapter = load_policy(config.model), config.model.adapter
    if adapter is not None:
        load_adapter(policy.model, Path(adapter))
    return policy_source(policy, config.data, name, None if adapter is None else Path(adapter))


def open_start(config: Config, folder: Path) -> TrainedRun:
    """The start, its own reference."""
    policy = start_source(config, "start").policy
    side: Side = partial(contextlib.nullcontext, policy.model)
    return TrainedRun(Run(folder), config, policy, side, side)


def open_round(config: Config, run: Run) -> TrainedRun:
    """A round's tuned model with the start of round 1 as reference; one set of weights where adapters switch off."""
    policy = load_run(run)
    bare = config.model.adapter is None and read_settings(run.adapter).method != "full"
    first: Side = (
        partial(adapters_off, policy.model)
        if bare
        else partial(contextlib.nullcontext, start_source(config, "start").policy.model)
    )
    return TrainedRun(run, config, policy, first, first)
