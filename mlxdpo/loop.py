"""The loop over optimizer steps: a generator of events. It computes and keeps checkpoints; others print."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from mlxdpo import checkpoint
from mlxdpo.checkpoint import Progress
from mlxdpo.config import Config, OptimConfig
from mlxdpo.data.planning import Epoch, Indices, Outline, outline, plan_epoch, steps_per_epoch
from mlxdpo.job import Job, Tools, check_finite, compute_window, evaluate
from mlxdpo.metrics import Scored, pair_metrics, thumb_metrics, token_means
from mlxdpo.moving import Moving
from mlxdpo.peers import PeerLost
from mlxdpo.step import gradient_norm, make_update
from mlxdpo.types import Event
from mlxdpo.watch import Watch


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
        try:
            computed = compute_window(job, tools, batches, progress.step, should_stop)
        except PeerLost:
            _save(job, moving, progress)  # the weights are still those of the last whole step
            raise
        if computed is None:
            path = _save(job, moving, progress)
            yield Event("interrupted", progress.step, {"path": str(path)})
            return
        pairs, gradients = computed
        norm = gradient_norm(gradients).item()
        check_finite(job.train, batches, pairs, norm)
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
            if job.peers.first:
                checkpoint.prune(job.checkpoints, job.config.train.keep, progress.best_step)
            _align(job)
            yield Event("checkpoint", progress.step, {"path": str(path)})
    if progress.step < plan.total:
        text = f"stopped early at step {progress.step}: held-out loss was lowest at step {progress.best_step}"
        yield Event("note", progress.step, {"text": text})


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


def _align(job: Job) -> None:
    """Give every process the weights of process 0: on unlike machines the same update may round differently."""
    if job.peers.size > 1:
        trained = job.model.trainable_parameters()
        job.model.update(job.peers.sum(trained if job.peers.first else tree_map(mx.zeros_like, trained)))
        mx.eval(job.model.parameters())


def _save(job: Job, moving: Moving, progress: Progress) -> Path:
    if not job.peers.first:
        return checkpoint.folder_of(job.checkpoints, progress.step)
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
