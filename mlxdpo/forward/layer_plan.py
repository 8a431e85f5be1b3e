"""A model's call taken apart into its layers by watching them, so that parts of a batch can go side by side (on a CPU)
or layers be left out that would give the same again; and what belongs to a part in the backward pass too.

What MLX calls again in a backward pass is made here, because it must stay in its part's stream: gradients written by
hand, and functions under a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.streams import interleave, map_streams, pin_to_stream, stream
from mlxdpo.forward.watch import watched_all
from mlxdpo.machine.openblas import single_blas
from mlxdpo.types import Batch

States = Callable[[], mx.array]
"""Runs a model once: its states at the end."""


class LayerPlan(NamedTuple):
    """What enters the first layer, each layer as a function of that, and how to read the states at the end."""

    enter: mx.array
    layers: Sequence[Callable[[mx.array], mx.array]]
    leave: Callable[[mx.array], mx.array]


def plan_layers(model: nn.Module, run: States) -> LayerPlan | None:
    """The layers of `run`, which calls `model` once; None where they do more than turn one array into the next.

    Nothing is computed: `run` is called with layers that let everything through, and once more behind the last.
    """
    entered: list[mx.array] = []
    layers: list[Callable[[mx.array], mx.array]] = []

    def note(own: Any, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Instead of a layer: what it is given besides `h` is kept for later."""
        entered.append(h)
        layers.append(lambda h: own(h, *args, **kwargs))
        return h

    def leave(h: mx.array) -> mx.array:
        """What comes behind the last layer, which gives `h`."""
        with watched_all(model.layers, lambda layer: lambda own, before, *args, **kwargs: h):
            return run()

    try:
        with watched_all(model.layers, lambda layer: note):
            run()
    except (TypeError, ValueError):  # a layer that returns or takes something else than one array
        return None
    alone = bool(entered) and all(h is entered[0] for h in entered)
    return LayerPlan(entered[0], layers, leave) if alone else None


def run_side_by_side(model: nn.Module, runs: Sequence[States]) -> list[mx.array]:
    """The states of several runs, each in its stream, layer by layer where they can be taken apart."""
    found = map_streams(lambda run: plan_layers(model, run), runs) if len(runs) > 1 else [None]
    plans = [plan for plan in found if plan is not None]
    if len(plans) < len(runs):
        return map_streams(lambda run: run(), runs)
    states = [(plan.enter,) for plan in plans]
    for layers in zip(*(plan.layers for plan in plans), strict=True):
        for number, layer in enumerate(layers):
            with stream(number):
                states[number] = (layer(*states[number]),)
        states = interleave(states)
    return map_streams(lambda plan, state: plan.leave(*state), plans, states)


def join_columns(parts: Sequence[mx.array], count: int) -> mx.array:
    """(n,) of what each part really has, one after the other, widened to (count,)."""
    return widened(mx.concatenate(list(parts)) if len(parts) > 1 else parts[0], count)


def widened(a: mx.array, count: int) -> mx.array:
    """(..., n) widened to (..., count): what only fills a batch gets what the first has."""
    if a.shape[-1] == count:
        return a
    return mx.concatenate([a, mx.repeat(a[..., :1], count - a.shape[-1], axis=-1)], axis=-1)


def evaluate_batch(batch: Batch, *found: Any) -> None:
    """Evaluate what was found of a batch; two matmuls at a time would fight for the BLAS's threads."""
    with single_blas() if batch.parts else contextlib.nullcontext():
        mx.eval(*found)


def with_gradient(function: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its gradient written by hand: `gradient(primals, cotangents, outputs)`, as `mx.custom_function`
    has it. For one call: the gradient is computed where that call is."""
    call = mx.custom_function(function)
    call.vjp(pin_to_stream(gradient))
    return call


def checkpointed(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of `module`, computed again in the backward pass; the trained arrays enter as inputs."""
    return nn.utils.checkpoint(module, pin_to_stream(function))
