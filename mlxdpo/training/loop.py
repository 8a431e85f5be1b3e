"""The loop over optimizer steps: a generator of events. It computes and keeps checkpoints; others print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from mlxdpo.data.planning import Indices, outline
from mlxdpo.distributed.group import PeerLost
from mlxdpo.training import checkpoint
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.likelihood_warning import LikelihoodWatch
from mlxdpo.training.metrics import Scored, pair_metrics, thumb_metrics, token_means
from mlxdpo.training.plan import Plan, learning_rate
from mlxdpo.training.reference_sync import ReferenceSync
from mlxdpo.training.step import gradient_norm, make_update
from mlxdpo.training.window import CompiledFns, TrainState, check_finite, compute_window, evaluate_heldout
from mlxdpo.types import Event


def metrics(job: TrainState, found: Scored, prefix: str = "") -> dict[str, float]:
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


def run_loop(job: TrainState, progress: Progress, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """Walk from `progress` to the last step; yields "step", "eval", "checkpoint", "note" and "interrupted" events.

    Asked to stop, it drops the unfinished window, saves the last whole step and returns: going on from there
    computes the window again and is the straight run, to the bit. Raises `NonFiniteError` naming the pairs before a
    bad gradient reaches the weights.
    """
    plan = Plan(job.config, outline(job.train.examples, job.config.data.group))
    tools = CompiledFns(job)
    update, watch = make_update(job.model, job.optimizer), LikelihoodWatch(job.loss, bool(job.heldout.examples))
    moving, scorer = tools.moving, tools.scorer
    if progress.step:
        moving.restore(checkpoint.folder_of(job.checkpoints, progress.step))
    elif job.heldout.examples:
        yield Event("eval", 0, metrics(job, evaluate_heldout(job, scorer, moving), "eval_"))
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
        lr, clip = learning_rate(job.config.optim, progress.step, plan.total), job.config.optim.max_grad_norm
        update(gradients, min(1.0, clip / (norm + 1e-6)) if clip else 1.0, lr)
        progress = _advance(job, progress, batches, time.perf_counter() - started)
        values = {**metrics(job, pairs), "learning_rate": lr, "grad_norm": norm}
        yield Event("step", progress.step, values | plan.pace(progress))
        warning = watch.step(pairs)
        if moving.due(progress.step):
            moving.move()
        if job.heldout.examples and _due(progress.step, job.config.train.eval_every, plan.total):
            found = evaluate_heldout(job, scorer, moving)
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
                checkpoint.prune(job.checkpoints, job.config.train.keep_checkpoints, progress.best_step)
            _align(job)
            yield Event("checkpoint", progress.step, {"path": str(path)})
    if progress.step < plan.total:
        text = f"stopped early at step {progress.step}: held-out loss was lowest at step {progress.best_step}"
        yield Event("note", progress.step, {"text": text})


def _align(job: TrainState) -> None:
    """Give every process the weights of process 0: on unlike machines the same update may round differently."""
    if job.peers.size > 1:
        trained = job.model.trainable_parameters()
        job.model.update(job.peers.sum(trained if job.peers.first else tree_map(mx.zeros_like, trained)))
        mx.eval(job.model.parameters())


def _save(job: TrainState, moving: ReferenceSync, progress: Progress) -> Path:
    if not job.peers.first:
        return checkpoint.folder_of(job.checkpoints, progress.step)
    return checkpoint.save(job.checkpoints, job.model, job.config.lora, job.optimizer, progress, moving.save)


def _advance(job: TrainState, progress: Progress, batches: Sequence[Indices], seconds: float) -> Progress:
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


def _patience_over(job: TrainState, progress: Progress) -> bool:
    patience = job.config.train.patience
    return patience is not None and progress.waited >= patience


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
