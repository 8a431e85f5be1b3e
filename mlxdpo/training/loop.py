"""The loop over optimizer steps: a generator of events. It trains and keeps checkpoints; its caller prints.

What a step does with its batches stands in `step.train_step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxdpo.data.planning import Indices
from mlxdpo.distributed.group import PeerLost
from mlxdpo.machine.device import memory_use
from mlxdpo.model.adapters import dropout_off
from mlxdpo.training import checkpoint, distributed
from mlxdpo.training.checkpoint import Progress, SaveClock
from mlxdpo.training.collapse import CollapseWatch
from mlxdpo.training.distributed import first_pairs, gather_pairs
from mlxdpo.training.metrics import Scored, pair_values
from mlxdpo.training.plan import learning_rate
from mlxdpo.training.reference import Scorer
from mlxdpo.training.step import CompiledFns, TrainState, check_finite, make_scorer, scored_pairs, train_step
from mlxdpo.training.watched_answers import answer_stats, looks
from mlxdpo.types import Event


def run_loop(state: TrainState, progress: Progress, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """Train from `progress` to the last step; yields "step", "eval", "answers", "checkpoint", "note" and "interrupted"
    events.

    Asked to stop, it drops the unfinished step, saves the last whole one and returns: going on from there computes the
    step again and gives the bytes of the run that was never stopped. Raises `NonFiniteError` naming the pairs before a
    bad gradient reaches the weights.
    """
    config, plan, fns = state.config, state.plan, CompiledFns(state)
    watch, clock = (
        CollapseWatch(state.loss, bool(state.heldout.examples), config.loss.beta),
        SaveClock(config.train.save_minutes),
    )
    watched = looks(config.train, plan.steps) if state.stage.writes else set()
    if progress.step:
        fns.reference.restore(checkpoint.folder_of(state.checkpoints, progress.step))
    else:
        yield from _notes(0, watch.pairs(state.train.examples))
        if state.heldout.examples:
            yield _eval_event(state, 0, evaluate_heldout(state, fns, _scorer_at_start(state, fns)))
        if state.answers is not None:
            yield Event("answers", 0, state.answers.start.metrics())
    while progress.step < plan.steps and not _patience_over(state, progress):
        started, batches = time.perf_counter(), plan.batches(progress.step)
        lr = learning_rate(config.optim, progress.step, plan.steps)
        with _saved_if_a_peer_is_lost(state, fns, progress):  # the weights are those of the last whole step
            taken = train_step(state, fns, batches, progress.step, lr, should_stop)
        if taken is None:
            yield Event("interrupted", progress.step, {"path": str(_save(state, fns, progress))})
            return
        pairs, norm = taken
        progress = _advance(state, progress, batches, time.perf_counter() - started)
        values = {**measures(state, pairs), "learning_rate": lr, "grad_norm": norm}
        yield Event("step", progress.step, values | _pace(state, progress))
        if worse := watch.step(pairs, progress.step <= plan.steps_per_epoch):
            kept = f"; {_what_is_kept(state, progress)}" if watch.lost and watched else ""
            yield Event("note", progress.step, {"text": worse + kept})
        if fns.reference.due(progress.step):
            fns.reference.move()
        if state.heldout.examples and _due(progress.step, config.train.eval_every, plan.steps):
            found = evaluate_heldout(state, fns)
            event = _eval_event(state, progress.step, found)
            progress = _compare(progress, event.values["eval_loss"])
            yield event
            yield from _notes(progress.step, watch.evaluation(found))
        if progress.step in watched:
            with _saved_if_a_peer_is_lost(state, fns, progress):  # the steps count; this look is not done again
                progress = yield from _look_at_answers(state, progress, watch)
        yield from _checkpoint(state, fns, progress, clock)
    if progress.step < plan.steps:
        text = (
            f"stopped early at step {progress.step} of {plan.steps} (train.patience {config.train.patience}): held-out "
            f"loss was lowest at step {progress.best_step}; a larger patience continues"
        )
        yield Event("note", progress.step, {"text": text})


def _notes(step: int, *texts: str | None) -> Iterator[Event]:
    yield from (Event("note", step, {"text": text}) for text in texts if text)


def _look_at_answers(state: TrainState, progress: Progress, watch: CollapseWatch) -> Generator[Event, None, Progress]:
    """Say what the model's answers have become; the step is sound where they show no sign of a collapse.

    Process 0 alone asks for answers, and all processes go by what it saw.
    """
    step, answers, sound, said = progress.step, state.answers, not watch.lost, [watch.labels()]
    if answers is not None:
        now = answer_stats(answers, state.model)
        yield Event("answers", step, now.metrics())
        whole, worse = watch.answers(now, answers.start, answers.chosen)
        sound = sound and whole
        said.append(worse and f"{worse}; {_what_is_kept(state, progress)}")
    yield from _notes(step, *said)
    if state.group.agree(not sound):
        return replace(progress, collapsed=True)
    return replace(progress, sound_step=step, collapsed=False)


def _what_is_kept(state: TrainState, progress: Progress) -> str:
    if progress.sound_step is None:
        return "no checkpoint is from before that"
    return f"{checkpoint.folder_of(state.checkpoints, progress.sound_step)}, from before that, is kept"


def _checkpoint(state: TrainState, fns: CompiledFns, progress: Progress, clock: SaveClock) -> Iterator[Event]:
    """Save what the number of the step, its evaluation or its answers, or the clock asks for; remove older ones."""
    train, marked = state.config.train, (progress.best_step, progress.sound_step)
    last = progress.step == state.plan.steps or _patience_over(state, progress)
    by_step = last or progress.step % train.save_every == 0 or progress.step in marked
    with _saved_if_a_peer_is_lost(state, fns, progress):
        by_time = not by_step and _by_the_clock(state, clock)
    if not (by_step or by_time):
        return
    path = _save(state, fns, progress)
    clock.restart()
    if state.group.first:
        checkpoint.prune(state.checkpoints, train.keep_checkpoints, marked, train.save_every)
    if by_step:  # aligned where the clock says so, unlike machines would train by their clocks
        distributed.align_weights(state.group, state.model)
    yield Event("checkpoint", progress.step, {"path": str(path)})


def measures(state: TrainState, pairs: Scored, prefix: str = "") -> dict[str, float]:
    """The stage's metrics of pairs that were scored."""
    found = state.stage.metrics(pairs, state.loss, state.config.loss.beta)
    return {f"{prefix}{name}": value for name, value in found.items()}


def _eval_event(state: TrainState, step: int, found: Scored) -> Event:
    """Means, and the numbers of each pair in the data's order, not the batches'."""
    order = np.argsort([i for indices in state.plan.heldout for i in indices])
    pairs = {name: values[order] for name, values in pair_values(found, state.loss, state.config.loss.beta).items()}
    return Event("eval", step, measures(state, found, "eval_"), pairs)


def _scorer_at_start(state: TrainState, fns: CompiledFns) -> Scorer:
    """Before the first step a policy that is its own reference has log-probs that are known (`check_start` has seen
    that they agree): nothing is computed."""
    known = state.config.reference.model is None and state.loss.needs == {"reference"}
    return make_scorer(state.model, lambda model, batch: batch.ref) if known else fns.scorer


def evaluate_heldout(state: TrainState, fns: CompiledFns, scorer: Scorer | None = None) -> Scored:
    """The held-out pairs, with `scorer` if given; an objective that takes something from all pairs of a step takes it
    from all of these."""
    size, batches, parts = state.config.train.batch_size, state.plan.heldout, []
    for indices, own in zip(batches, state.mine(state.heldout, batches), strict=True):
        if not own:
            parts.append(None)
            continue
        batch = fns.reference.refreshed(state.heldout.batch(indices, size))
        with dropout_off(state.model):
            parts.append(first_pairs((scorer or fns.scorer)(batch), len(indices)))
    pairs = gather_pairs(state.group, parts, [len(indices) for indices in batches])
    found = scored_pairs(state.loss(pairs), pairs, len(state.heldout.examples))
    check_finite(state.heldout, batches, found)
    return found


def _pace(state: TrainState, progress: Progress) -> dict[str, float]:
    """Epoch, tokens, tokens per second, memory (GB) and seconds left."""
    return {
        "epoch": progress.step / state.plan.steps_per_epoch,
        "num_tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        **memory_use(),
        "seconds_left": progress.seconds / progress.step * (state.plan.steps - progress.step),
    }


def _save(state: TrainState, fns: CompiledFns, progress: Progress) -> Path:
    if not state.group.first:
        return checkpoint.folder_of(state.checkpoints, progress.step)
    return checkpoint.save(
        state.checkpoints, state.model, state.config.lora, state.optimizer, progress, fns.reference.save
    )


@contextmanager
def _saved_if_a_peer_is_lost(state: TrainState, fns: CompiledFns, progress: Progress) -> Iterator[None]:
    try:
        yield
    except PeerLost:
        _save(state, fns, progress)
        raise


def _by_the_clock(state: TrainState, clock: SaveClock) -> bool:
    """Whether time asks for a checkpoint, by the clock of process 0: they all stand at the same step then."""
    if not state.config.train.save_minutes:
        return False
    return state.group.agree(state.group.first and clock.due())


def _advance(state: TrainState, progress: Progress, batches: Sequence[Indices], seconds: float) -> Progress:
    examples = [state.train.examples[i] for indices in batches for i in indices]
    return replace(
        progress,
        step=progress.step + 1,
        pairs=progress.pairs + len(examples),
        tokens=progress.tokens + sum(map(state.stage.tokens, examples)),
        seconds=progress.seconds + seconds,
    )


def _compare(progress: Progress, loss: float) -> Progress:
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_loss=loss, best_step=progress.step, waited=0)
    return replace(progress, waited=progress.waited + 1)


def _patience_over(state: TrainState, progress: Progress) -> bool:
    patience = state.config.train.patience
    return patience is not None and progress.waited >= patience


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
