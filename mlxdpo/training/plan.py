"""What a plan of batches amounts to before anything is computed: shapes, steps, distinct rows, padding.

Everything comes from the lengths and row numbers of the encoded pairs; no token is touched, so a million pairs take
seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import Config, OptimConfig
from mlxdpo.data.batch_shapes import BatchShape, batch_size_of, choose_shape
from mlxdpo.data.batching import cut_by_prompts
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import (
    Epoch,
    Indices,
    Outline,
    first_epoch,
    outline,
    plan_epoch,
    plan_straight,
    steps_per_epoch,
)
from mlxdpo.forward.packed import packing_is_worth_it
from mlxdpo.training.checkpoint import Progress


class PlannedBatch(NamedTuple):
    """A batch's shape, its pairs, its distinct rows and the distinct tokens that are really there."""

    layout: BatchLayout
    pairs: int
    rows: int
    tokens: int


class PlanSummary(NamedTuple):
    """One pass, or as much of it as the run takes.

    steps        optimizer steps of the run
    pairs, rows  pairs of the pass and the distinct rows they come to within their batches (at most 2 * pairs)
    tokens       distinct tokens of the pass
    waste        share of the computed tokens that are padding or repeated, 0..1
    shapes       distinct batch shapes of the pass: each is traced once
    longest      tokens of the longest row, prompt and completion together
    """

    steps: int
    pairs: int
    rows: int
    tokens: int
    waste: float
    shapes: int
    longest: int


def planned_batch(examples: Examples, indices: Indices, packs: bool, frames: Sequence[BatchShape] = ()) -> PlannedBatch:
    """The shape that `data.batching.collate` gives these pairs; `packs` says whether the model can run them packed."""
    need = batch_size_of(examples, indices)
    frame = choose_shape(need, frames, len(indices))
    packed = packs and packing_is_worth_it((frame.prompts, frame.shared), (frame.rows, frame.width), frame.rest)
    index = np.array(indices)
    numbers = (examples.prompt_numbers[index], examples.row_numbers[index], examples.lengths[index])
    parts = len(cut_by_prompts(*numbers))
    layout = BatchLayout(
        frame.prompts, frame.shared, frame.rows, frame.width, frame.rest, frame.scored, packed, parts=parts
    )
    return PlannedBatch(layout, len(indices), need.rows, need.distinct)


def planned_batches(
    examples: Examples, batches: Sequence[Indices], packs: bool, plain: bool, frames: Sequence[BatchShape] = ()
) -> list[PlannedBatch]:
    """`planned_batch` of each batch; `plain` for a model whose parts are not known."""
    found = [planned_batch(examples, indices, packs, frames) for indices in batches]
    return [one._replace(layout=one.layout._replace(plain=True)) for one in found] if plain else found


def training_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of the first pass, or of as much of it as the run takes: a short run needs no more."""
    pairs, train = outline(examples, config.data.group), config.train
    plan = first_epoch(examples, config.data.group, train.batch_size, train.gradient_accumulation, train.seed)
    return [batch for window in plan.windows[: total_steps(config, pairs)] for batch in window]


def heldout_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of a held-out evaluation."""
    return plan_straight(outline(examples, config.data.group), config.train.batch_size)


def plan_sentence(outlook: PlanSummary) -> str:
    """What a person wants to know of a plan before it is carried out."""
    return (
        f"a pass: {outlook.pairs} pairs as {outlook.rows} distinct rows of at most {2 * outlook.pairs}, "
        f"{outlook.tokens} distinct tokens; {outlook.waste:.1%} of what is computed is padding or repeated; "
        f"{outlook.shapes} batch shapes"
    )


def summarize_plan(config: Config, examples: Examples, found: Sequence[PlannedBatch]) -> PlanSummary:
    """The numbers of a plan whose batches were `drawn`."""
    tokens, computed = sum(one.tokens for one in found), sum(one.layout.tokens for one in found)
    return PlanSummary(
        steps=total_steps(config, outline(examples, config.data.group)),
        pairs=sum(one.pairs for one in found),
        rows=sum(one.rows for one in found),
        tokens=tokens,
        waste=1 - tokens / computed,
        shapes=len({one.layout for one in found}),
        longest=int(examples.row_lengths.max(initial=0)),
    )


def total_steps(config: Config, pairs: Outline) -> int:
    """Optimizer steps of a run over the training pairs."""
    windows = steps_per_epoch(pairs, config.train.batch_size, config.train.gradient_accumulation)
    steps = max(1, math.ceil(windows * config.train.epochs - 1e-9))
    return steps if config.train.steps is None else min(steps, config.train.steps)


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then the schedule down to 0 at `total`."""
    warmup = round(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    course = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return optim.lr * course[optim.schedule]


class Plan:
    """Which pairs step N takes, and how far along it is. A pure function of outline and configuration."""

    def __init__(self, config: Config, pairs: Outline):
        self.config, self.pairs, self.total = config, pairs, total_steps(config, pairs)
        self.per_epoch = steps_per_epoch(pairs, config.train.batch_size, config.train.gradient_accumulation)
        self.epoch = functools.lru_cache(1)(self._epoch)

    def _epoch(self, epoch: int) -> Epoch:
        train = self.config.train
        return plan_epoch(self.pairs, train.batch_size, train.gradient_accumulation, train.seed, epoch)

    def window(self, step: int) -> tuple[Indices, ...]:
        """The batches of optimizer step `step` (from 0)."""
        epoch, position = divmod(step, self.per_epoch)
        return self.epoch(epoch).windows[position]

    def pace(self, progress: Progress) -> dict[str, float]:
        """Epoch, tokens, tokens per second, peak memory (GB) and seconds left."""
        return {
            "epoch": progress.step / self.per_epoch,
            "num_tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "seconds_left": progress.seconds / progress.step * (self.total - progress.step),
        }


class BatchLayout(NamedTuple):
    """A batch: G prompts of P shared tokens, R rows of S behind them made of M distinct tokens, N scored ones.

    `packed` says that matmuls see the M tokens and not the R * S padded ones; `plain` full rows and full logits;
    `parts` how many parts of the batch are computed side by side.
    """

    prompts: int
    shared: int
    rows: int
    width: int
    rest: int
    scored: int
    packed: bool = False
    plain: bool = False
    parts: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that go through the matmuls of a block."""
        if self.plain:
            return self.rows * (self.shared + self.width)
        return self.prompts * self.shared + (self.rest if self.packed else self.rows * self.width)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
