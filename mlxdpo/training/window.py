"""What a run is made of and what it computes: the pairs and the gradient of a window, the held-out pairs.

Both are dealt out where several processes run together (`peers`), and come back whole to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxdpo.config import Config
from mlxdpo.data.batch_shapes import BatchShape
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices, outline, plan_straight
from mlxdpo.distributed.group import ALONE, Group
from mlxdpo.forward.layer_plan import widened
from mlxdpo.forward.logprobs import ForwardFns
from mlxdpo.losses import Loss
from mlxdpo.model.adapters import dropout_off
from mlxdpo.training.metrics import Scored, join
from mlxdpo.training.reference_sync import ReferenceSync
from mlxdpo.training.step import Gradients, add, make_gradient, make_scorer
from mlxdpo.types import Batch, Example, Pairs, UserError

# What an objective must know of all pairs of an optimizer step before their batches are differentiated one by one.
#
# Sorting (AOT), the KL term (KTO) and means over tokens (SFT) couple the pairs of a step. Taken over the whole step,
# and not over each batch as other trainers do, they leave the step the same however it is cut into batches.

WIDEST = 2  # numbers that a field of `Pairs` has of each pair, at most


def first_pairs(pairs: Pairs, count: int) -> Pairs:
    """The first `count` pairs: what follows only fills a batch."""
    return Pairs(*(None if a is None else a[..., :count] for a in pairs))


def concatenate_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several batches in one."""
    columns = zip(*parts, strict=True)
    return Pairs(*(None if column[0] is None else mx.concatenate(column, axis=-1) for column in columns))


def gathered(peers: Group, parts: Sequence[Pairs | None], counts: Sequence[int]) -> Pairs:
    """The pairs of several batches in one, of which `parts` holds this process's own."""
    if peers.size == 1:
        return concatenate_pairs(parts)  # type: ignore[arg-type]
    columns = taken(peers.sum(mx.array(gather_table(Pairs, parts, counts))))
    return Pairs(*(None if column is None else mx.array(column) for column in columns))


def gather_table(kind: type[NamedTuple], parts: Sequence[Any], counts: Sequence[int]) -> np.ndarray:
    """(fields, 1 + 2, pairs) float32: what is known of the pairs of each batch, to be summed over the processes.

    Zeros for the batches of others (None). The first row says how many numbers of each pair a field has, 0 for None.
    """
    found, at = np.zeros((len(kind._fields), 1 + WIDEST, sum(counts)), np.float32), 0
    for part, count in zip(parts, counts, strict=True):
        for field, values in zip(found, part or (), strict=part is not None):
            if values is not None:
                rows = np.atleast_2d(np.array(values, np.float32))
                field[0, at : at + count] = len(rows)
                field[1 : 1 + len(rows), at : at + count] = rows
        at += count
    return found


def taken(summed: mx.array) -> list[np.ndarray | None]:
    """The fields of a summed `table`, each (pairs,) or (2, pairs); None where no process had one.

    Raises `RuntimeError` when the processes did not deal the batches out among them, each once.
    """
    result: list[np.ndarray | None] = []
    for field in np.array(summed):
        numbers = int(field[0, :1].sum())
        if (field[0] != numbers).any() or numbers > WIDEST:
            raise RuntimeError("a batch was computed by two processes or by none; please report this with the recipe")
        result.append(None if numbers == 0 else field[1] if numbers == 1 else field[1 : 1 + numbers])
    return result


def step_statistics(
    loss: Loss,
    batches: Sequence[Sequence[Example]],
    laid_out: Callable[[], Iterable[Batch | None]],
    scorer: Callable[[Batch], Pairs],
    peers: Group = ALONE,
) -> list[mx.array | None]:
    """For each batch of a step what the loss takes from all of the step's pairs, (K, pairs of the batch), or None.

    Where lengths are enough nothing is computed; else `laid_out` is asked for the batches and each is scored; None
    stands for one that another process scores.
    """
    if not loss.needs_step_statistics:
        return [None] * len(batches)
    if loss.needs_step_logps:
        scored = zip(laid_out(), batches, strict=True)
        parts = [None if batch is None else first_pairs(scorer(batch), len(examples)) for batch, examples in scored]
        seen = loss.step_statistics(gathered(peers, parts, [len(examples) for examples in batches]))
    else:
        seen = loss.step_statistics(concatenate_pairs([_lengths(examples) for examples in batches]))
    assert seen is not None
    ends = [sum(map(len, batches[: n + 1])) for n in range(len(batches) - 1)]
    return list(mx.split(seen, ends, axis=1)) if ends else [seen]


def filled(seen: mx.array | None, pairs: int) -> mx.array | None:
    """(K, n) widened to a batch of `pairs`: what fills the batch gets what its first pair has."""
    return None if seen is None else widened(seen, pairs)


def _lengths(examples: Sequence[Example]) -> Pairs:
    """Pairs of which nothing but their lengths is known."""
    nothing = mx.zeros(len(examples))
    lengths = (mx.array([float(len(getattr(e, side))) for e in examples]) for side in ("chosen", "rejected"))
    return Pairs(nothing, nothing, nothing, nothing, *lengths)


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the weights were not touched by it."""


@dataclass(frozen=True)
class ReferencedPairs:
    """Pairs with the reference's log-probs of their completions, (N, 2) float32, nats, and the shapes of batches.

    (N, 4) for LD-DPO, zeros where the loss asks no reference.
    """

    examples: Sequence[Example]
    ref: np.ndarray
    frames: tuple[BatchShape, ...] = ()

    def batch(self, indices: Indices, batch_size: int) -> Batch:
        """The pairs `indices`, laid out."""
        return collate(self.examples, indices, batch_size, self.ref, self.frames)


@dataclass(frozen=True)
class TrainState:
    """Everything a loop needs, put together by `train`."""

    config: Config
    model: nn.Module
    optimizer: optim.Optimizer
    loss: Loss
    train: ReferencedPairs
    heldout: ReferencedPairs
    checkpoints: Path
    ways: ForwardFns
    peers: Group = ALONE

    def mine(self, part: ReferencedPairs, batches: Sequence[Indices]) -> list[bool]:
        """Which of the batches this process computes: all, or its share of the tokens."""
        if self.peers.size == 1:
            return [True] * len(batches)
        lengths = Examples.of(part.examples).row_lengths
        return self.peers.mine([float(lengths[list(indices)].sum()) for indices in batches])


class CompiledFns:
    """What computes the steps of a job: compiled functions over its model, and the reference, which may move."""

    def __init__(self, job: TrainState):
        self.gradient = make_gradient(job.model, job.loss, job.ways.train)
        self.scorer = make_scorer(job.model, job.ways.score)
        self.moving = ReferenceSync(job.model, job.config, job.ways.score)


def scored(losses: mx.array, pairs: Pairs, count: int) -> Scored:
    """The first `count` pairs of a batch (the rest is filler) in float64 on the host."""
    desirable = [] if pairs.desirable is None else [pairs.desirable]
    return Scored(*(np.array(a, np.float64)[:count] for a in (losses, *pairs[:6], *desirable)))


def evaluate_heldout(job: TrainState, scorer: Callable[[Batch], Pairs], moving: ReferenceSync) -> Scored:
    """The held-out pairs; an objective that looks at all pairs of a step looks at all of these."""
    size, parts = job.config.train.batch_size, []
    batches = plan_straight(outline(job.heldout.examples, job.config.data.group), size)
    for indices, own in zip(batches, job.mine(job.heldout, batches), strict=True):
        if not own:
            parts.append(None)
            continue
        batch = moving.refreshed(job.heldout.batch(indices, size))
        with dropout_off(job.model):
            parts.append(first_pairs(scorer(batch), len(indices)))
    pairs = gathered(job.peers, parts, [len(indices) for indices in batches])
    found = scored(job.loss(pairs), pairs, len(job.heldout.examples))
    check_finite(job.heldout, batches, found)
    return found


def compute_window(
    job: TrainState, tools: CompiledFns, batches: Sequence[Indices], step: int, should_stop: Callable[[], bool]
) -> tuple[Scored, Gradients] | None:
    """Pairs and summed gradient of one window, or None when asked to stop in the middle."""
    settings, peers, parts, total = job.config.train, job.peers, [], None
    mine = job.mine(job.train, batches)
    share = mx.array(1 / sum(len(indices) for indices in batches))

    def laid_out(indices: Indices) -> Batch:
        """A batch against the reference as it is now."""
        return tools.moving.refreshed(job.train.batch(indices, settings.batch_size))

    def own() -> Iterator[Batch | None]:
        """This process's batches, None for those of others."""
        return (laid_out(indices) if ours else None for indices, ours in zip(batches, mine, strict=True))

    examples = (
        [[job.train.examples[i] for i in indices] for indices in batches] if job.loss.needs_step_statistics else batches
    )
    with dropout_off(job.model):  # what couples the pairs is taken without noise
        seen = step_statistics(job.loss, examples, own, tools.scorer, peers)  # type: ignore[arg-type]
    for number, indices in enumerate(batches):
        if should_stop():
            return None if peers.size == 1 else _summed(job, batches, [], None, stop=True)
        if not mine[number]:
            parts.append(None)
            continue
        batch = laid_out(indices)
        # Dropout is a function of seed, step and batch alone: nothing random needs saving.
        mx.random.seed(int(np.random.SeedSequence([settings.seed, step, number]).generate_state(1)[0]))
        result = tools.gradient(batch, share, filled(seen[number], batch.chosen.shape[0]))
        total = add(total, result.gradients)
        mx.eval(total, result.losses, result.pairs)
        parts.append(scored(result.losses, result.pairs, len(indices)))
    return (join(parts), total) if peers.size == 1 else _summed(job, batches, parts, total, stop=False)


def _summed(
    job: TrainState, batches: Sequence[Indices], parts: Sequence[Scored | None], own: Gradients | None, stop: bool
) -> tuple[Scored, Gradients] | None:
    """What all processes found out about a window, or None when one of them was asked to stop in it.

    Gradients are shares of the window's mean already, so their sum is its gradient, and every pair's numbers reach
    every process, so metrics are those of one process: of all pairs, in the order of the plan.
    """
    counts = [len(indices) for indices in batches]
    found = {
        "stopped": mx.array([float(stop)]),
        "pairs": mx.array(gather_table(Scored, parts or [None] * len(batches), counts)),
        "gradients": tree_map(mx.zeros_like, job.model.trainable_parameters()) if own is None else own,
    }
    found = job.peers.sum(found)
    if found["stopped"].item():
        return None
    columns = taken(found["pairs"])
    pairs = Scored(*(None if column is None else column.astype(np.float64) for column in columns))  # type: ignore[arg-type]
    mx.eval(found["gradients"])
    return pairs, found["gradients"]


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
