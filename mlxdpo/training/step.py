"""One optimizer step, from token ids to new weights; `train_step` tells it from top to bottom.

    forward     summed log-probs of each batch's completions (`forward.logprobs.score_pairs`)
    loss        one number per pair (`losses`), its mean over the pairs of the step
    backward    gradients of the trained arrays, summed over the step's batches
    update      clipped by their norm, then the optimizer at this step's learning rate

Functions are compiled over explicit state. Scalars that change (learning rate, clipping factor, share of a pair) enter
as arrays, so nothing is traced anew.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxdpo.config import Config, OptimConfig
from mlxdpo.data.batch_shapes import BatchShape
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices
from mlxdpo.distributed.group import ALONE, Group
from mlxdpo.forward.choose_forward import ForwardFns, forward_fns
from mlxdpo.forward.layer_plan import evaluate_batch, widened
from mlxdpo.forward.logprobs import Forward, score_pairs
from mlxdpo.forward.router_balance import batch_balance, watched_routers
from mlxdpo.losses import Loss
from mlxdpo.machine.device import compiled
from mlxdpo.model.adapters import dropout_off
from mlxdpo.training import distributed
from mlxdpo.training.distributed import first_pairs
from mlxdpo.training.metrics import Scored, concatenate_scored
from mlxdpo.training.plan import TrainPlan
from mlxdpo.training.reference_sync import ReferenceSync
from mlxdpo.training.stages import Stage
from mlxdpo.training.watched_answers import WatchedAnswers
from mlxdpo.types import Batch, Example, Pairs, UserError

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


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the weights were not touched by it."""


@dataclass(frozen=True)
class ReferencedPairs:
    """Pairs with the reference's log-probs of their completions, (N, 2) float32, nats, and the shapes of batches.

    (N, 4) for LD-DPO, zeros where the loss asks no reference.
    """

    examples: Sequence[Example]
    ref: np.ndarray
    shapes: tuple[BatchShape, ...] = ()

    def batch(self, indices: Indices, batch_size: int) -> Batch:
        """The pairs `indices`, laid out."""
        return collate(self.examples, indices, batch_size, self.ref, self.shapes)


@dataclass(frozen=True)
class TrainState:
    """Everything that the loop and its steps need, put together by `run.prepare`."""

    config: Config
    stage: Stage
    model: nn.Module
    optimizer: optim.Optimizer
    loss: Loss
    plan: TrainPlan
    train: ReferencedPairs
    heldout: ReferencedPairs
    checkpoints: Path
    forward: ForwardFns
    group: Group = ALONE
    answers: WatchedAnswers | None = None

    def mine(self, part: ReferencedPairs, batches: Sequence[Indices]) -> list[bool]:
        """Which of the batches this process computes: all, or its share of the tokens."""
        if self.group.size == 1:
            return [True] * len(batches)
        lengths = Examples.of(part.examples).row_lengths
        return self.group.mine([float(lengths[list(indices)].sum()) for indices in batches])


class CompiledFns:
    """What computes a run: compiled functions over its model, and the reference, which may follow the policy."""

    def __init__(self, state: TrainState):
        balance = state.config.train.router_aux_loss_coef
        self.gradient = make_gradient(state.model, state.loss, state.forward.train, balance)
        self.scorer = make_scorer(state.model, state.forward.score)
        self.update = make_update(state.model, state.optimizer)
        self.reference = ReferenceSync(state.model, state.config, state.forward.score)


class Gradient(NamedTuple):
    """Gradient of the weighted loss of a batch, and what its pairs were: losses (B,), `pairs` fields (B,)."""

    losses: mx.array
    pairs: Pairs
    gradients: Gradients


def make_optimizer(config: OptimConfig) -> optim.Optimizer:
    """The optimizer a recipe names. Raises `UserError` for an unknown one or a setting it does not take."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"optim.name `{config.name}` is unknown; known: {', '.join(OPTIMIZERS)}")
    for knob, takers in TAKES.items():
        value = getattr(config, knob)
        if config.name not in takers and value != OptimConfig.model_fields[knob].default:
            raise UserError(
                f"optim.{knob} {value} has no effect on {config.name}; it is for {', '.join(sorted(takers))}"
            )
    first = 0.0 if config.lr == "auto" else config.lr  # every update sets the rate of its step
    return OPTIMIZERS[config.name](config.model_copy(update={"lr": first}))


@contextlib.contextmanager
def weights_restored(model: nn.Module) -> Iterator[None]:
    """Put the trained arrays back as they were when the context ends: what is tried inside leaves nothing behind."""
    start = [(name, mx.array(array)) for name, array in tree_flatten(model.trainable_parameters())]
    mx.eval([array for _, array in start])
    try:
        yield
    finally:
        model.load_weights(start, strict=False)
        mx.eval(model.trainable_parameters())


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


def make_gradient(
    model: nn.Module, loss: Loss, forward: Forward | None = None, balance: float = 0.0
) -> Callable[..., Gradient]:
    """Compiled (batch, share, statistics=None) -> gradient of share * sum_i weight_i * loss_i over a batch's pairs.

    With share = 1 / (pairs of the step), summing the gradients of a step's batches gives exactly the gradient of the
    mean over its pairs, however they are cut into batches. An objective that takes something from all pairs of the
    step gets it as `statistics`, so that the same holds for it. `balance` is the weight of the routers' balancing loss,
    which is a batch's, as in TRL: every pair's loss has it.
    """
    way = forward or forward_fns(model).train

    def weighted_loss(batch: Batch, share: mx.array, statistics: mx.array | None) -> tuple[mx.array, mx.array, Pairs]:
        """The batch's share of the step's loss, and what it is made of."""
        with watched_routers(model) if balance else contextlib.nullcontext() as routed:
            pairs = score_pairs(model, batch, way)
        losses = loss(pairs, statistics)
        if routed is not None:
            losses = losses + balance * batch_balance(routed, batch)
        return (losses * batch.weight).sum() * share, losses, pairs

    # The model is an output too: tracing leaves tracers in its parameters, and outputs put arrays back.
    state = [model.state, mx.random.state]
    traced = compiled(nn.value_and_grad(model, weighted_loss), inputs=state, outputs=state)

    def gradient(batch: Batch, share: mx.array, statistics: mx.array | None = None) -> Gradient:
        """Evaluated by its caller, unless the batch is computed in parts."""
        if statistics is not None:  # what only fills a batch gets what its first pair has
            statistics = widened(statistics, batch.chosen.shape[0])
        (_, losses, pairs), gradients = traced(batch, share, statistics)
        found = Gradient(losses, pairs, gradients)
        if batch.parts:
            evaluate_batch(batch, found)
        return found

    return gradient


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

    def scale_and_apply(gradients: Gradients, factor: mx.array) -> None:
        """What is compiled: one step of the optimizer on scaled gradients."""
        optimizer.update(model, tree_map(lambda g: g * factor.astype(g.dtype), gradients))

    traced = compiled(scale_and_apply, inputs=state, outputs=state)

    def update(gradients: Gradients, factor: float, lr: float) -> None:
        """Scale, step, evaluate."""
        optimizer.learning_rate = lr  # type: ignore[assignment]
        traced(gradients, mx.array(factor))
        mx.eval(state)

    return update


def train_step(
    state: TrainState,
    fns: CompiledFns,
    batches: Sequence[Indices],
    step: int,
    lr: float,
    should_stop: Callable[[], bool],
) -> tuple[Scored, float] | None:
    """Take optimizer step `step` (from 0): its pairs, as scored before the update, and the norm of the gradient.

    Asked to stop in the middle it returns None, and the weights are those of the step before. Raises `NonFiniteError`
    naming the pairs before a bad gradient reaches the weights.
    """
    settings, loss, group = state.config.train, state.loss, state.group
    mine, share = state.mine(state.train, batches), mx.array(1 / sum(map(len, batches)))

    def laid_out(number: int) -> Batch | None:
        """A batch against the reference of this moment; None where another process computes it."""
        if not mine[number]:
            return None
        return fns.reference.refreshed(state.train.batch(batches[number], settings.batch_size))

    statistics: list[mx.array | None] = [None] * len(batches)
    if loss.needs_step_statistics:
        examples = [[state.train.examples[i] for i in indices] for indices in batches]
        with dropout_off(state.model):  # what couples the pairs of a step is taken without noise
            statistics = step_statistics(loss, examples, map(laid_out, range(len(batches))), fns.scorer, group)
    scored: list[Scored | None] = []
    gradients, stopped = None, False
    for number, indices in enumerate(batches):
        if stopped := should_stop():
            break
        batch = laid_out(number)
        if batch is None:
            scored.append(None)
            continue
        # Dropout is a function of seed, step and batch alone: nothing random needs saving.
        mx.random.seed(int(np.random.SeedSequence([settings.seed, step, number]).generate_state(1)[0]))
        found = fns.gradient(batch, share, statistics[number])
        gradients = add(gradients, found.gradients)
        mx.eval(gradients, found.losses, found.pairs)
        scored.append(scored_pairs(found.losses, found.pairs, len(indices)))
    if group.size > 1:
        counts = [len(indices) for indices in batches]
        scored, gradients, stopped = distributed.sum_step(group, state.model, counts, scored, gradients, stopped)
    if stopped:
        return None
    pairs, norm = concatenate_scored(scored), gradient_norm(gradients).item()
    check_finite(state.train, batches, pairs, norm)
    clip = state.config.optim.max_grad_norm
    fns.update(gradients, min(1.0, clip / (norm + 1e-6)) if clip else 1.0, lr)
    return pairs, norm


def step_statistics(
    loss: Loss,
    batches: Sequence[Sequence[Example]],
    laid_out: Iterable[Batch | None],
    scorer: Callable[[Batch], Pairs],
    group: Group = ALONE,
) -> list[mx.array | None]:
    """For each batch of a step what the loss takes from all pairs of the step, (K, pairs of the batch), or None.

    Sorting (AOT), the KL term (KTO) and means over tokens (SFT) couple the pairs of a step. Taken over the whole step,
    and not over each batch as other trainers do, they leave the step the same however it is cut into batches. Where
    lengths are enough nothing is computed; else each batch of `laid_out` is scored, None standing for one that another
    process scores.
    """
    if not loss.needs_step_statistics:
        return [None] * len(batches)
    if loss.needs_step_logps:
        scored = zip(laid_out, batches, strict=True)
        parts = [None if batch is None else first_pairs(scorer(batch), len(examples)) for batch, examples in scored]
        pairs = distributed.gather_pairs(group, parts, [len(examples) for examples in batches])
    else:
        every = [example for examples in batches for example in examples]
        unknown = mx.zeros(len(every))
        lengths = (mx.array(counts, mx.float32) for counts in zip(*(example.scored for example in every), strict=True))
        pairs = Pairs(unknown, unknown, unknown, unknown, *lengths)
    statistics = loss.step_statistics(pairs)
    assert statistics is not None
    ends = [sum(map(len, batches[: n + 1])) for n in range(len(batches) - 1)]
    return list(mx.split(statistics, ends, axis=1)) if ends else [statistics]


def scored_pairs(losses: mx.array, pairs: Pairs, count: int) -> Scored:
    """The first `count` pairs of a batch (the rest only fills it) in float64 on the host."""
    desirable = [] if pairs.desirable is None else [pairs.desirable]
    return Scored(*(np.array(a, np.float64)[:count] for a in (losses, *pairs[:6], *desirable)))


def check_finite(part: ReferencedPairs, batches: Sequence[Indices], pairs: Scored, norm: float = 0.0) -> None:
    """Raise `NonFiniteError` naming the pairs whose numbers, or the gradient of which, are not finite."""
    if math.isfinite(norm) and np.isfinite(pairs.losses).all():
        return
    order = [i for indices in batches for i in indices]
    bad = np.asarray(~np.isfinite([pairs.losses, pairs.chosen, pairs.rejected]).all(axis=0))
    names = [part.examples[i].where for i, is_bad in zip(order, bad, strict=True) if is_bad or not bad.any()]
    what = "log-prob or loss is not a finite number" if bad.any() else "gradient is not a finite number"
    raise NonFiniteError(
        f"the {what} at {', '.join(names[:8])}; the weights were not changed by it: look at these pairs, "
        f"lower optim.lr, or set model.dtype float32"
    )
