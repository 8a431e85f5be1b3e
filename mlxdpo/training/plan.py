"""The plan of a run, made once: which pairs each step takes, in which shapes, and what that amounts to.

Everything comes from the lengths and row numbers of the encoded pairs; no token is touched, so a million pairs take
seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlxdpo.config import Config, OptimConfig, TrainConfig
from mlxdpo.data.batch_shapes import BatchShape, batch_shapes_for, batch_size_of, choose_shape, row_columns
from mlxdpo.data.batching import cut_rows
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import (
    Epoch,
    Indices,
    Outline,
    outline,
    plan_epoch,
    plan_straight,
    steps_per_epoch,
)
from mlxdpo.forward.levels import Level
from mlxdpo.io.words import counted
from mlxdpo.types import Example


@dataclass(frozen=True)
class TrainPlan:
    """Which pairs every step of a run takes, made once from lengths, row numbers and settings (`make_plan`).

    steps, steps_per_epoch   optimizer steps of the run, and of one pass over its pairs
    training                 batches of the first pass, or of as much of it as the run takes
    heldout                  batches of a held-out evaluation
    shapes, heldout_shapes   shapes that batches are filled to; none where nothing is compiled
    epoch                    epoch number -> the windows of optimizer steps it is cut into
    """

    steps: int
    steps_per_epoch: int
    training: list[Indices]
    heldout: list[Indices]
    shapes: tuple[BatchShape, ...]
    heldout_shapes: tuple[BatchShape, ...]
    epoch: Callable[[int], Epoch]

    def batches(self, step: int) -> tuple[Indices, ...]:
        """The batches of optimizer step `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch).windows[position]


def make_plan(config: Config, training: Sequence[Example], heldout: Sequence[Example]) -> TrainPlan:
    """The plan of a run: a pure function of settings, lengths and row numbers, so a resume needs no state of it."""
    train, group = config.train, config.data.group
    examples, others = Examples.of(training), Examples.of(heldout)
    pairs, size, windows = outline(examples, group), train.batch_size, train.gradient_accumulation
    epoch = functools.lru_cache(2)(functools.partial(plan_epoch, pairs, size, windows, train.seed))
    steps = total_steps(config, pairs)
    first = [batch for window in epoch(0).windows[:steps] for batch in window]
    straight = plan_straight(outline(others, group), size)
    return TrainPlan(
        steps=steps,
        steps_per_epoch=steps_per_epoch(pairs, size, windows),
        training=first,
        heldout=straight,
        shapes=batch_shapes_for(examples, first, size),
        heldout_shapes=batch_shapes_for(others, straight, size),
        epoch=epoch,
    )


def checked_pairs(plan: TrainPlan, examples: Sequence[Example]) -> Indices:
    """The pairs on which the fast path has to give the plain one's numbers: the first, and the one with the longest
    row, where sliding windows and long positions show."""
    first, longest = plan.training[0][0], int(Examples.of(examples).row_lengths.argmax())
    return tuple(dict.fromkeys((first, longest)))


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


def planned_batch(
    examples: Examples, indices: Indices, level: Level, shapes: Sequence[BatchShape] = ()
) -> PlannedBatch:
    """The shape that `data.batching.collate` gives these pairs, and how a model of that level runs it."""
    need = batch_size_of(examples, indices)
    shape = choose_shape(need, shapes, len(indices))
    group, prompt, own = row_columns(examples, indices)
    cuts = cut_rows(group, prompt, own, need.branches)
    layout = BatchLayout(
        shape.prompts + sum(group[cut.start] == group[cut.start - 1] for cut in cuts[1:]),
        shape.shared,
        shape.rows,
        shape.width,
        shape.rest,
        shape.scored,
        level.name,
        parts=len(cuts),
        tree=shape.tree if level.packs else 0,
    )
    return PlannedBatch(layout, len(indices), need.rows, need.distinct)


def planned_batches(
    examples: Examples, batches: Sequence[Indices], level: Level, shapes: Sequence[BatchShape] = ()
) -> list[PlannedBatch]:
    """`planned_batch` of each batch."""
    return [planned_batch(examples, indices, level, shapes) for indices in batches]


def plan_sentence(summary: PlanSummary) -> str:
    """What a person wants to know of a plan before it is carried out."""
    return (
        f"a pass: {counted(summary.pairs, 'pair')}, {counted(summary.rows, 'distinct answer')}, "
        f"{counted(summary.tokens, 'distinct token')}; {summary.waste:.1%} of what is computed is padding or repeated; "
        f"{counted(summary.shapes, 'batch shape')}"
    )


def summarize_plan(plan: TrainPlan, examples: Examples, found: Sequence[PlannedBatch]) -> PlanSummary:
    """The numbers of a plan, from what its batches come to (`planned_batches`)."""
    tokens, computed = sum(one.tokens for one in found), sum(one.layout.tokens for one in found)
    return PlanSummary(
        steps=plan.steps,
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
    return steps_asked(config.train, windows)


def steps_asked(train: TrainConfig, windows: float) -> int:
    """Optimizer steps of a run whose pass over the pairs is `windows` steps: those of epochs or steps, the fewer of
    both where both are given, `chosen_epochs` where neither is."""
    if train.epochs == "auto" and train.steps is not None:
        return train.steps
    steps = max(1, math.ceil(windows * chosen_epochs(train, windows) - 1e-9))
    return steps if train.steps is None else min(steps, train.steps)


def length_note(train: TrainConfig, plan: TrainPlan) -> str:
    """What was asked for and what will run, where train.steps does not settle it by itself; empty otherwise."""
    if train.steps is None:
        return ""
    if train.epochs != "auto":
        asked = steps_asked(train.model_copy(update={"steps": None}), plan.steps_per_epoch)
        return (
            f"asked for: train.steps {train.steps} and train.epochs {train.epochs:g}, which is "
            f"{counted(asked, 'step')}; the fewer will run, {counted(plan.steps, 'step')}"
        )
    if train.steps <= plan.steps_per_epoch:
        return ""
    passes = train.steps / plan.steps_per_epoch
    each = counted(plan.steps_per_epoch, "step")
    return f"train.steps {train.steps} takes {passes:.3g} passes over the pairs, {each} each"


ENOUGH_STEPS, MOST_EPOCHS = 50, 3


def chosen_epochs(train: TrainConfig, windows: float) -> float:
    """The recipe's passes over pairs that make `windows` steps each; auto: as few as give `ENOUGH_STEPS` steps."""
    if train.epochs != "auto":
        return train.epochs
    return float(min(MOST_EPOCHS, max(1, math.ceil(ENOUGH_STEPS / windows))))


def epochs_for(config: Config, training: Sequence[Example]) -> float:
    """`chosen_epochs` over these pairs."""
    pairs = outline(Examples.of(training), config.data.group)
    windows = steps_per_epoch(pairs, config.train.batch_size, config.train.gradient_accumulation)
    return chosen_epochs(config.train, windows)


def settled(config: Config, rate: float | None, epochs: float) -> Config:
    """The recipe with what it leaves open (auto) as numbers; a `rate` of None stays open until probes have found it."""
    optim = {"lr": rate} if config.optim.lr == "auto" and rate is not None else {}
    train = {"epochs": epochs} if config.train.epochs == "auto" and config.train.steps is None else {}
    found = {"optim": config.optim.model_copy(update=optim), "train": config.train.model_copy(update=train)}
    return config.model_copy(update=found)


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then the schedule down to 0 at `total`."""
    if optim.lr == "auto":
        raise ValueError("optim.lr is still auto: resolve it first (rate_probe)")
    return optim.lr * schedule_share(optim, step, total)


def schedule_share(optim: OptimConfig, step: int, total: int) -> float:
    """What of the peak rate step `step` (from 0) of `total` takes, 0..1."""
    warmup = round(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    course = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return course[optim.schedule]


class BatchLayout(NamedTuple):
    """A batch: G prompts of P shared tokens, R rows of S behind them made of M distinct tokens, N scored ones.

    `level` is how the model runs it (`forward.levels`), `parts` how many parts of it are computed side by side; `tree`
    the tokens of each prompt that attention goes over at once where rows branch more than once, else 0.
    """

    prompts: int
    shared: int
    rows: int
    width: int
    rest: int
    scored: int
    level: str = "prefix"
    parts: int = 1
    tree: int = 0

    @property
    def attended(self) -> tuple[int, int]:
        """How many rows, of how many tokens, attention goes over behind the shared prefix."""
        return (self.prompts, self.tree) if self.tree else (self.rows, self.width)

    @property
    def packed(self) -> bool:
        """Whether matmuls see the M tokens and not the R * S padded ones."""
        return self.level == "packed"

    @property
    def whole(self) -> bool:
        """Whether each row is computed with its whole prompt."""
        return self.level in ("head", "plain")

    @property
    def plain(self) -> bool:
        """Whether full logits are computed."""
        return self.level == "plain"

    @property
    def tokens(self) -> int:
        """Tokens that go through the matmuls of a block."""
        if self.whole:
            return self.rows * (self.shared + self.width)
        return self.prompts * self.shared + (self.rest if self.packed else self.rows * self.width)
