"""How long a run will take here, measured on its own first batch, and `train.minutes`: fewer steps where it would take
longer than that.

Three steps of one batch, of which the first traces the step and is not counted; then everything is put back, and the
run begins as if its recipe had named the number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.dataset import Dataset
from mlxdpo.io.progress import clock
from mlxdpo.model.adapters import attach_lora, with_adapter
from mlxdpo.model.policy import load_policy
from mlxdpo.training import preflight
from mlxdpo.training.plan import make_plan
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import (
    CompiledFns,
    ReferencedPairs,
    TrainState,
    make_optimizer,
    train_step,
    weights_restored,
)

MEASURED = 2  # steps of one batch that are timed
SPENT = 0.9  # of the minutes that steps may take; probes, evaluations and checkpoints take the rest


class Pace(NamedTuple):
    """Seconds of one optimizer step, by the tokens of its batches, and of all steps of the run."""

    step: float
    run: float


def measure_pace(state: TrainState, should_stop: Callable[[], bool]) -> Pace | None:
    """The pace of a run, with its weights as they were afterwards; None when asked to stop.

    Of several processes each must call this alike; the time is process 0's.
    """
    timing = replace(state, optimizer=make_optimizer(state.config.optim))
    batch, seconds = state.plan.batches(0)[:1], 0.0
    with weights_restored(state.model):
        fns = CompiledFns(timing)
        for number in range(1 + MEASURED):
            started = time.perf_counter()
            if train_step(timing, fns, batch, number, 1e-6, should_stop) is None:
                return None
            seconds += (time.perf_counter() - started) if number else 0.0
    seconds = float(state.group.share(repr(seconds / MEASURED).encode()).decode())
    pairs = [sum(map(len, state.plan.batches(step))) for step in range(state.plan.steps)]
    a_pair = seconds / len(batch[0])
    return Pace(a_pair * pairs[0], a_pair * sum(pairs))


def pace_of(config: Config, data: Dataset) -> Pace:
    """The pace of a recipe whose epochs are numbers, without a run: the model is loaded, no reference is scored.

    Raises the `UserError`s of loading a model.
    """
    stage, policy = stage_of(config), load_policy(config.model)
    config = with_adapter(config, policy.model)
    loss, plan = stage.loss(config), make_plan(config, data.train, data.heldout)
    forward, _ = preflight.choose_forward(policy.model, data, plan, config)
    if config.model.adapter is None:
        attach_lora(policy.model, config.lora, config.train.seed)
    stage.attach(policy.model)
    forward = stage.forward(preflight.with_details(forward, loss, config), config)
    columns = 4 if "shared" in loss.needs else 2
    pairs = ReferencedPairs(data.train, np.zeros((len(data.train), columns), np.float32), plan.shapes)
    optimizer = make_optimizer(config.optim)
    found = measure_pace(
        TrainState(config, stage, policy.model, optimizer, loss, plan, pairs, pairs, Path(), forward), lambda: False
    )
    assert found is not None  # nobody asked it to stop
    return found


def within_minutes(state: TrainState, pace: Pace) -> tuple[TrainState, str]:
    """The state of a run that keeps to `train.minutes`, with steps in place of the minutes, and what to say of it."""
    minutes, steps = state.config.train.minutes, state.plan.steps
    text = f"{steps} steps take about {clock(pace.run)} here"
    if minutes is not None and pace.run > SPENT * minutes * 60:
        steps = max(1, int(steps * SPENT * minutes * 60 / pace.run))
        text += f"; train.minutes {minutes:g} is enough for {steps}"
    train = state.config.train.model_copy(update={"steps": steps, "epochs": "auto", "minutes": None})
    config = state.config.model_copy(update={"train": train})
    plan = make_plan(config, state.train.examples, state.heldout.examples)
    return replace(state, config=config, plan=replace(plan, shapes=state.plan.shapes)), text
