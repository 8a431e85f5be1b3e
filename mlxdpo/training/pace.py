"""How long a run will take here, measured on its own first batch, and `train.minutes`: fewer steps where it would take
longer than that.

Three steps of one batch, of which the first traces the step and is not counted; then everything is put back, and the
run begins as if its recipe had named the number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from mlxdpo.training.plan import clock, make_plan
from mlxdpo.training.step import CompiledFns, TrainState, make_optimizer, train_step, weights_restored

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
