"""How a batch goes through the layers of a model, whole or in the parts it was cut into (`Batch.parts`).

A caller gives the plan of one part and what to read from its last states; here the parts are computed side by side,
layer by layer (`streams.py`), and joined. What MLX calls again in a backward pass is made here too, because it belongs
to a part as well: gradients written by hand, and layers under a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.streams import Arrays, interleave, map_streams, pin_to_stream, stream
from mlxdpo.machine.openblas import single_blas
from mlxdpo.types import Batch


class LayerPlan(NamedTuple):
    """What enters the first layer, each layer as a function of what enters it, and how to read the states at the end.

    The arrays of a state are (..., D) hidden states; every layer gives as many as it takes.
    """

    enter: Arrays
    layers: Sequence[Callable[..., Arrays]]
    leave: Callable[..., mx.array]

    def run(self) -> mx.array:
        """The states at the end, of this plan alone."""
        state = self.enter
        for layer in self.layers:
            state = layer(*state)
        return self.leave(*state)


def join_rows(parts: Sequence[mx.array], batch: Batch) -> mx.array:
    """(R,) numbers of the batch's rows from those of its parts' rows."""
    return join_columns(parts, batch.length.shape[0])


def join_columns(parts: Sequence[mx.array], count: int) -> mx.array:
    """(..., n) of each part, one after the other, widened to (..., count)."""
    return widened(mx.concatenate(list(parts), axis=-1) if len(parts) > 1 else parts[0], count)


def widened(a: mx.array, count: int) -> mx.array:
    """(..., n) widened to (..., count): what only fills a batch gets what the first has."""
    if a.shape[-1] == count:
        return a
    return mx.concatenate([a, mx.repeat(a[..., :1], count - a.shape[-1], axis=-1)], axis=-1)


def run_layers(
    batch: Batch,
    plan: Callable[[Batch], LayerPlan],
    read: Callable[[Batch, mx.array], Any],
    join: Callable[[list[Any], Batch], Any] = join_rows,
) -> Any:
    """What `read` makes of a batch and its states at the end of `plan`, computed in parts and joined."""
    parts = batch.parts or (batch,)
    plans = map_streams(plan, parts)
    states = [plan.enter for plan in plans]
    for layers in zip(*(plan.layers for plan in plans), strict=True):
        for number, layer in enumerate(layers):
            with stream(number):
                states[number] = layer(*states[number])
        states = interleave(states)
    found = []
    for number, (part, plan_of_part, state) in enumerate(zip(parts, plans, states, strict=True)):
        with stream(number):
            found.append(read(part, plan_of_part.leave(*state)))
    return join(found, batch)


def run_whole(batch: Batch, read: Callable[[Batch], Any], join: Callable[[list[Any], Batch], Any] = join_rows) -> Any:
    """The same for a model whose layers are not known: `read` runs all of it."""
    return join(map_streams(read, batch.parts or (batch,)), batch)


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


def checkpointed(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of `layer`, computed again in the backward pass; the trained arrays enter as inputs."""
    return nn.utils.checkpoint(layer, pin_to_stream(function))
