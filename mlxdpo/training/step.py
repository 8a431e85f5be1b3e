"""The step, as functions compiled over explicit state: gradient of a batch, then one update per window.

Scalars that change (learning rate, clipping factor, share of the window) enter as arrays, so nothing is traced anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mlxdpo.config import OptimConfig
from mlxdpo.forward.layer_plan import evaluate_batch
from mlxdpo.forward.logprobs import Forward, forward_fns, score_pairs
from mlxdpo.losses import Loss
from mlxdpo.machine.device import compiled
from mlxdpo.types import Batch, Pairs, UserError

Gradients = Any  # a tree of arrays, as `trainable_parameters` gives it

OPTIMIZERS: dict[str, Callable[[OptimConfig], optim.Optimizer]] = {
    # bias_correction: torch's AdamW has it always, MLX's only when asked.
    "adamw": lambda o: optim.AdamW(o.lr, betas=list(o.betas), weight_decay=o.weight_decay, bias_correction=True),
    "adam": lambda o: optim.Adam(o.lr, betas=list(o.betas), bias_correction=True),
    "sgd": lambda o: optim.SGD(o.lr, weight_decay=o.weight_decay),
    "rmsprop": lambda o: optim.RMSprop(o.lr),
    "lion": lambda o: optim.Lion(o.lr, betas=list(o.betas), weight_decay=o.weight_decay),
    "adafactor": lambda o: optim.Adafactor(
        o.lr, relative_step=False, scale_parameter=False, weight_decay=o.weight_decay
    ),
    "muon": lambda o: optim.Muon(o.lr, weight_decay=o.weight_decay),
}
TAKES = {
    "weight_decay": {"adamw", "sgd", "lion", "adafactor", "muon"},
    "betas": {"adamw", "adam", "lion"},
}


class Gradient(NamedTuple):
    """Gradient of the weighted loss of a batch, and what its pairs were: losses (B,), `pairs` fields (B,)."""

    losses: mx.array
    pairs: Pairs
    gradients: Gradients


def make_optimizer(config: OptimConfig) -> optim.Optimizer:
    """The optimizer a recipe names. Raises `UserError` for an unknown one or a knob it does not take."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"optim.name `{config.name}` is unknown; known: {', '.join(OPTIMIZERS)}")
    for knob, takers in TAKES.items():
        value = getattr(config, knob)
        if config.name not in takers and value != OptimConfig.model_fields[knob].default:
            raise UserError(
                f"optim.{knob} {value} has no effect on {config.name}; it is for {', '.join(sorted(takers))}"
            )
    return OPTIMIZERS[config.name](config)


def make_scorer(model: nn.Module, forward: Forward | None = None) -> Callable[[Batch], Pairs]:
    """Compiled forward pass: a batch's `Pairs`, evaluated."""
    way = forward or forward_fns(model).score
    score = compiled(lambda batch: score_pairs(model, batch, way), inputs=[model.state])

    def scorer(batch: Batch) -> Pairs:
        """The pairs of a batch, evaluated."""
        pairs = score(batch)
        evaluate_batch(batch, pairs)
        return pairs

    return scorer


def make_gradient(model: nn.Module, loss: Loss, forward: Forward | None = None) -> Callable[..., Gradient]:
    """Compiled (batch, share, seen=None) -> gradient of share * sum_i weight_i * loss_i over a batch's pairs.

    With share = 1 / (pairs in the window), summing the gradients of a window's batches gives exactly the gradient of
    the mean over its pairs, however they are cut into batches. An objective that looks at all pairs of the window gets
    what it saw there (`window.step_statistics`), so that the same holds for it.
    """

    def weighted(batch: Batch, share: mx.array, seen: mx.array | None) -> tuple[mx.array, mx.array, Pairs]:
        """The batch's share of the loss, and what it is made of."""
        pairs = score_pairs(model, batch, forward)
        losses = loss(pairs, seen)
        return (losses * batch.weight).sum() * share, losses, pairs

    value_and_grad = nn.value_and_grad(model, weighted)
    state = [model.state, mx.random.state]

    def gradient(batch: Batch, share: mx.array, seen: mx.array | None) -> tuple[mx.array, Pairs, Gradients]:
        """What is compiled: losses, pairs, gradients."""
        (_, losses, pairs), gradients = value_and_grad(batch, share, seen)
        return losses, pairs, gradients

    # The model is an output too: tracing leaves tracers in its parameters, and outputs put arrays back.
    traced = compiled(gradient, inputs=state, outputs=state)

    def run(batch: Batch, share: mx.array, seen: mx.array | None = None) -> Gradient:
        """Evaluated by the caller, unless it is computed in parts."""
        found = Gradient(*traced(batch, share, seen))
        if batch.parts:
            evaluate_batch(batch, found)
        return found

    return run


def add(left: Gradients | None, right: Gradients) -> Gradients:
    """Sum of two gradient trees; None is zero."""
    return right if left is None else tree_map(mx.add, left, right)


def gradient_norm(gradients: Gradients) -> mx.array:
    """Global L2 norm, float32, ()."""
    return mx.sqrt(sum(mx.sum(mx.square(g.astype(mx.float32))) for _, g in tree_flatten(gradients)))  # type: ignore[arg-type]


def make_update(model: nn.Module, optimizer: optim.Optimizer) -> Callable[[Gradients, float, float], None]:
    """Compiled update: scale the gradients by `factor`, then one optimizer step at learning rate `lr`."""
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def apply(gradients: Gradients, factor: mx.array) -> None:
        """What is compiled: one step of the optimizer on scaled gradients."""
        optimizer.update(model, tree_map(lambda g: g * factor.astype(g.dtype), gradients))

    traced = compiled(apply, inputs=state, outputs=state)

    def update(gradients: Gradients, factor: float, lr: float) -> None:
        """Scale, step, evaluate."""
        optimizer.learning_rate = lr  # type: ignore[assignment]
        traced(gradients, mx.array(factor))
        mx.eval(state)

    return update
