"""What a run is made of and what it computes: the pairs and the gradient of a window, the held-out pairs.

Both are dealt out where several processes run together (`peers`), and come back whole to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxdpo.config import Config
from mlxdpo.data.batching import collate
from mlxdpo.data.frames import Frame
from mlxdpo.data.planning import Indices, outline, plan_straight
from mlxdpo.data.store import Examples
from mlxdpo.losses import Loss
from mlxdpo.metrics import Scored, join
from mlxdpo.model.adapters import dropout_off
from mlxdpo.moving import Moving
from mlxdpo.peers import ALONE, Peers
from mlxdpo.scoring import Ways
from mlxdpo.step import Gradients, add, make_gradient, make_scorer
from mlxdpo.types import Batch, Example, Pairs, UserError
from mlxdpo.windows import filled, first, gathered, look_over, table, taken


class NonFiniteError(UserError):
    """A loss or gradient became infinite or NaN; the weights were not touched by it."""


@dataclass(frozen=True)
class Part:
    """Pairs with the reference's log-probs of their completions, (N, 2) float32, nats, and the shapes of batches.

    (N, 4) for LD-DPO, zeros where the loss asks no reference.
    """

    examples: Sequence[Example]
    ref: np.ndarray
    frames: tuple[Frame, ...] = ()

    def batch(self, indices: Indices, batch_size: int) -> Batch:
        """The pairs `indices`, laid out."""
        return collate(self.examples, indices, batch_size, self.ref, self.frames)


@dataclass(frozen=True)
class Job:
    """Everything a loop needs, put together by `train`."""

    config: Config
    model: nn.Module
    optimizer: optim.Optimizer
    loss: Loss
    train: Part
    heldout: Part
    checkpoints: Path
    ways: Ways
    peers: Peers = ALONE

    def mine(self, part: Part, batches: Sequence[Indices]) -> list[bool]:
        """Which of the batches this process computes: all, or its share of the tokens."""
        if self.peers.size == 1:
            return [True] * len(batches)
        lengths = Examples.of(part.examples).row_lengths
        return self.peers.mine([float(lengths[list(indices)].sum()) for indices in batches])


class Tools:
    """What computes the steps of a job: compiled functions over its model, and the reference, which may move."""

    def __init__(self, job: Job):
        self.gradient = make_gradient(job.model, job.loss, job.ways.train)
        self.scorer = make_scorer(job.model, job.ways.score)
        self.moving = Moving(job.model, job.config, job.ways.score)


def scored(losses: mx.array, pairs: Pairs, count: int) -> Scored:
    """The first `count` pairs of a batch (the rest is filler) in float64 on the host."""
    desirable = [] if pairs.desirable is None else [pairs.desirable]
    return Scored(*(np.array(a, np.float64)[:count] for a in (losses, *pairs[:6], *desirable)))


def evaluate(job: Job, scorer: Callable[[Batch], Pairs], moving: Moving) -> Scored:
    """The held-out pairs; an objective that looks at all pairs of a step looks at all of these."""
    size, parts = job.config.train.batch_size, []
    batches = plan_straight(outline(job.heldout.examples, job.config.data.group), size)
    for indices, own in zip(batches, job.mine(job.heldout, batches), strict=True):
        if not own:
            parts.append(None)
            continue
        batch = moving.refreshed(job.heldout.batch(indices, size))
        with dropout_off(job.model):
            parts.append(first(scorer(batch), len(indices)))
    pairs = gathered(job.peers, parts, [len(indices) for indices in batches])
    found = scored(job.loss(pairs), pairs, len(job.heldout.examples))
    check_finite(job.heldout, batches, found)
    return found


def compute_window(
    job: Job, tools: Tools, batches: Sequence[Indices], step: int, should_stop: Callable[[], bool]
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

    examples = [[job.train.examples[i] for i in indices] for indices in batches] if job.loss.looks else batches
    with dropout_off(job.model):  # what couples the pairs is taken without noise
        seen = look_over(job.loss, examples, own, tools.scorer, peers)  # type: ignore[arg-type]
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
    job: Job, batches: Sequence[Indices], parts: Sequence[Scored | None], own: Gradients | None, stop: bool
) -> tuple[Scored, Gradients] | None:
    """What all processes found out about a window, or None when one of them was asked to stop in it.

    Gradients are shares of the window's mean already, so their sum is its gradient, and every pair's numbers reach
    every process, so metrics are those of one process: of all pairs, in the order of the plan.
    """
    counts = [len(indices) for indices in batches]
    found = {
        "stopped": mx.array([float(stop)]),
        "pairs": mx.array(table(Scored, parts or [None] * len(batches), counts)),
        "gradients": tree_map(mx.zeros_like, job.model.trainable_parameters()) if own is None else own,
    }
    found = job.peers.sum(found)
    if found["stopped"].item():
        return None
    columns = taken(found["pairs"])
    pairs = Scored(*(None if column is None else column.astype(np.float64) for column in columns))  # type: ignore[arg-type]
    mx.eval(found["gradients"])
    return pairs, found["gradients"]


def check_finite(part: Part, batches: Sequence[Indices], pairs: Scored, norm: float = 0.0) -> None:
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
