"""The loop over optimizer steps: a generator of events. It computes and keeps checkpoints; others print."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxdpo import checkpoint
from mlxdpo.checkpoint import Progress
from mlxdpo.config import Config, OptimConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.frames import Frame
from mlxdpo.data.planning import Epoch, Indices, Outline, outline, plan_epoch, plan_straight, steps_per_epoch
from mlxdpo.losses import Loss
from mlxdpo.metrics import Scored, join, pair_metrics, thumb_metrics, token_means
from mlxdpo.model.adapters import dropout_off
from mlxdpo.moving import Moving
from mlxdpo.scoring import Ways
from mlxdpo.step import Gradients, add, gradient_norm, make_gradient, make_scorer, make_update
from mlxdpo.types import Batch, Event, Example, Pairs, UserError
from mlxdpo.watch import Watch
from mlxdpo.windows import filled, first, look_over, together


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


def total_steps(config: Config, pairs: Outline) -> int:
    """Optimizer steps of a run over the training pairs."""
    windows = steps_per_epoch(pairs, config.train.batch_size, config.train.accumulate)
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


def scored(losses: mx.array, pairs: Pairs, count: int) -> Scored:
    """The first `count` pairs of a batch (the rest is filler) in float64 on the host."""
    desirable = [] if pairs.desirable is None else [pairs.desirable]
    return Scored(*(np.array(a, np.float64)[:count] for a in (losses, *pairs[:6], *desirable)))


def evaluate(job: Job, scorer: Callable[[Batch], Pairs], moving: Moving) -> Scored:
    """The held-out pairs; an objective that looks at all pairs of a step looks at all of these."""
    size, parts = job.config.train.batch_size, []
    batches = plan_straight(outline(job.heldout.examples, job.config.data.group), size)
    for indices in batches:
        batch = moving.refreshed(job.heldout.batch(indices, size))
        with dropout_off(job.model):
            parts.append(first(scorer(batch), len(indices)))
    pairs = together(parts)
    found = scored(job.loss(pairs), pairs, len(job.heldout.examples))
    _check_finite(job.heldout, batches, found)
    return found


def metrics(job: Job, found: Scored, prefix: str = "") -> dict[str, float]:
    """TRL's metrics of what was scored."""
    beta = job.config.loss.beta
    if not job.loss.paired:
        values = thumb_metrics(found, beta)
    else:
        means = job.loss.per_token and "reference" not in job.loss.needs
        rewards = pair_metrics(token_means(found) if means else found, beta)
        values = rewards | {f"logps/{side}": float(getattr(found, side).mean()) for side in ("chosen", "rejected")}
    for term in job.loss.terms:
        values |= term.objective.reports(found) if term.objective.reports else {}
    return {f"{prefix}{name}": value for name, value in values.items()}


def run_loop(job: Job, progress: Progress, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """Walk from `progress` to the last step; yields "step", "eval", "checkpoint", "note" and "interrupted" events.

    Asked to stop, it drops the unfinished window, saves the last whole step and returns: going on from there
    computes the window again and is the straight run, to the bit. Raises `NonFiniteError` naming the pairs before a
    bad gradient reaches the weights.
    """
    plan = Plan(job.config, outline(job.train.examples, job.config.data.group))
    tools = Tools(job)
    update, watch = make_update(job.model, job.optimizer), Watch(job.loss, bool(job.heldout.examples))
    moving, scorer = tools.moving, tools.scorer
    if progress.step:
        moving.restore(checkpoint.folder_of(job.checkpoints, progress.step))
    elif job.heldout.examples:
        yield Event("eval", 0, metrics(job, evaluate(job, scorer, moving), "eval_"))
    while progress.step < plan.total and not _patience_over(job, progress):
        started, batches = time.perf_counter(), plan.window(progress.step)
        computed = _window(job, tools, batches, progress.step, should_stop)
        if computed is None:
            path = _save(job, moving, progress)
            yield Event("interrupted", progress.step, {"path": str(path)})
            return
        pairs, gradients = computed
        norm = gradient_norm(gradients).item()
        _check_finite(job.train, batches, pairs, norm)
        lr, clip = learning_rate(job.config.optim, progress.step, plan.total), job.config.optim.clip
        update(gradients, min(1.0, clip / (norm + 1e-6)) if clip else 1.0, lr)
        progress = _advance(job, progress, batches, time.perf_counter() - started)
        values = {**metrics(job, pairs), "learning_rate": lr, "grad_norm": norm}
        yield Event("step", progress.step, values | plan.pace(progress))
        warning = watch.step(pairs)
        if moving.due(progress.step):
            moving.move()
        if job.heldout.examples and _due(progress.step, job.config.train.eval_every, plan.total):
            found = evaluate(job, scorer, moving)
            warning = watch.evaluation(found)
            values = metrics(job, found, "eval_")
            progress = _compare(progress, values["eval_loss"])
            yield Event("eval", progress.step, values)
        if warning:
            yield Event("note", progress.step, {"text": warning})
        last = progress.step == plan.total or _patience_over(job, progress)
        if last or progress.step % job.config.train.save_every == 0 or progress.best_step == progress.step:
            path = _save(job, moving, progress)
            checkpoint.prune(job.checkpoints, job.config.train.keep, progress.best_step)
            yield Event("checkpoint", progress.step, {"path": str(path)})
    if progress.step < plan.total:
        text = f"stopped early at step {progress.step}: held-out loss was lowest at step {progress.best_step}"
        yield Event("note", progress.step, {"text": text})


class Tools:
    """What computes the steps of a job: compiled functions over its model, and the reference, which may move."""

    def __init__(self, job: Job):
        self.gradient = make_gradient(job.model, job.loss, job.ways.train)
        self.scorer = make_scorer(job.model, job.ways.score)
        self.moving = Moving(job.model, job.config, job.ways.score)


class Plan:
    """Which pairs step N takes, and how far along it is. A pure function of outline and configuration."""

    def __init__(self, config: Config, pairs: Outline):
        self.config, self.pairs, self.total = config, pairs, total_steps(config, pairs)
        self.per_epoch = steps_per_epoch(pairs, config.train.batch_size, config.train.accumulate)
        self.epoch = functools.lru_cache(1)(self._epoch)

    def _epoch(self, epoch: int) -> Epoch:
        train = self.config.train
        return plan_epoch(self.pairs, train.batch_size, train.accumulate, train.seed, epoch)

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


def _window(
    job: Job, tools: Tools, batches: Sequence[Indices], step: int, should_stop: Callable[[], bool]
) -> tuple[Scored, Gradients] | None:
    """Pairs and summed gradient of one window, or None when asked to stop in the middle."""
    settings, parts, total = job.config.train, [], None
    share = mx.array(1 / sum(len(indices) for indices in batches))

    def laid_out(indices: Indices) -> Batch:
        """A batch against the reference as it is now."""
        return tools.moving.refreshed(job.train.batch(indices, settings.batch_size))

    examples = [[job.train.examples[i] for i in indices] for indices in batches] if job.loss.looks else batches
    with dropout_off(job.model):  # what couples the pairs is taken without noise
        seen = look_over(job.loss, examples, lambda: map(laid_out, batches), tools.scorer)  # type: ignore[arg-type]
    for number, indices in enumerate(batches):
        if should_stop():
            return None
        batch = laid_out(indices)
        # Dropout is a function of seed, step and batch alone: nothing random needs saving.
        mx.random.seed(int(np.random.SeedSequence([settings.seed, step, number]).generate_state(1)[0]))
        result = tools.gradient(batch, share, filled(seen[number], batch.chosen.shape[0]))
        total = add(total, result.gradients)
        mx.eval(total, result.losses, result.pairs)
        parts.append(scored(result.losses, result.pairs, len(indices)))
    return join(parts), total


def _check_finite(part: Part, batches: Sequence[Indices], pairs: Scored, norm: float = 0.0) -> None:
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


def _save(job: Job, moving: Moving, progress: Progress) -> Path:
    return checkpoint.save(job.checkpoints, job.model, job.config.lora, job.optimizer, progress, moving.save)


def _advance(job: Job, progress: Progress, batches: Sequence[Indices], seconds: float) -> Progress:
    examples = [job.train.examples[i] for indices in batches for i in indices]
    tokens = sum(2 * len(e.prompt) + len(e.chosen) + len(e.rejected) for e in examples)
    return replace(
        progress,
        step=progress.step + 1,
        pairs=progress.pairs + len(examples),
        tokens=progress.tokens + tokens,
        seconds=progress.seconds + seconds,
    )


def _compare(progress: Progress, loss: float) -> Progress:
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_loss=loss, best_step=progress.step, waited=0)
    return replace(progress, waited=progress.waited + 1)


def _patience_over(job: Job, progress: Progress) -> bool:
    patience = job.config.train.patience
    return patience is not None and progress.waited >= patience


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
