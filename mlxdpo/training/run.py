"""The story of a run: load, read, encode, score the reference, attach the adapter, step, keep.

for event in train(load_config("recipe.yaml")):
    print(event)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.batch_shapes import batch_shapes_for
from mlxdpo.data.dataset import Dataset, Made, Sofar, encoding, reading
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices
from mlxdpo.distributed.group import ALONE, Group
from mlxdpo.forward.logprobs import ForwardFns
from mlxdpo.forward.patch_mlx_lm import chunked_attention_on
from mlxdpo.losses import Loss
from mlxdpo.machine.device import wire_memory
from mlxdpo.machine.memory_guard import MemoryGuard
from mlxdpo.model.adapters import attach_lora, dropout_off, load_arrays, save_adapter, with_adapter
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, distributed, preflight
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.loop import run_loop
from mlxdpo.training.manifest import describe_run
from mlxdpo.training.plan import heldout_batches, training_batches
from mlxdpo.training.reference import Scorer, find_reference, shared_rows, with_reference
from mlxdpo.training.reference_sync import check_reference_sync
from mlxdpo.training.stages import Stage, stage_of
from mlxdpo.training.step import make_optimizer, make_scorer
from mlxdpo.training.window import ReferencedPairs, TrainState
from mlxdpo.types import Event

Stop = Callable[[], bool]


def train(
    config: Config,
    *,
    resume: Run | None = None,
    warm: Path | None = None,
    should_stop: Stop = lambda: False,
    peers: Group = ALONE,
) -> Iterator[Event]:
    """Run a recipe, or go on with `resume`; yields what happens and writes the run directory.

    `warm` is another run's checkpoint whose optimizer state the first step starts from (rounds of one training).
    Of several `peers` each must call this alike; process 0 alone writes.

    Raises `UserError` when the recipe, the data or a changed input stops it; nothing is written before the model
    and the data are read.
    """
    stage = stage_of(config)
    loss = stage.loss(config)
    check_reference_sync(config, loss)
    optimizer = make_optimizer(config.optim)  # all this before the model: a typing error should not cost a download
    rows = yield from _read(reading(config.data, config.train.seed, stage.take(config, loss)), should_stop)
    if rows is None:
        return
    wire_memory()
    policy = load_policy(config.model)
    asked = with_adapter(config, policy.model)
    config, cut = distributed.config_for_group(asked, peers)
    reference, adapter = find_reference(config, policy)
    data = yield from _read(encoding(rows, config.data, policy.tokenizer, policy.eos_ids), should_stop)
    if data is None:
        return
    del rows  # they may be gigabytes on disk
    preflight.check_heldout(config, data)
    longest = preflight.longest_row(data)
    preflight.check_window(policy, longest)
    ways, note = preflight.choose_forward(policy.model, data, config)
    manifest = describe_run(config, policy, reference, adapter, data)
    distributed.check_alike(peers, config, manifest)
    run = distributed.open_run(peers, asked, resume)
    outlook = preflight.preview_plan(policy.model, data, config, ways)
    begun = {"run": run, "config": config, "data": data, "policy": policy, "outlook": outlook}
    yield Event("start", 0, begun | {"shown": stage.shown(data.train[0], loss)})
    notes = filter(None, (cut, note, stage.remark(data, config, loss)))
    yield from (Event("note", 0, {"text": text}) for text in notes)
    # Entered before anything is traced: a trace keeps the attention it was made with.
    lights = (chunked_attention_on(policy.model, longest), chunked_attention_on(reference.model, longest))
    with distributed.holding(peers, run, manifest), lights[0], lights[1]:
        own = ways if reference is policy else preflight.choose_forward(reference.model, data, config)[0]
        scorer = make_scorer(reference.model, preflight.with_details(own, loss, config).score)
        with dropout_off(reference.model):
            parts = yield from _parts(config, loss, scorer, manifest["reference"], data, should_stop, peers)
        if parts is None:
            return
        if reference is not policy:
            del reference
            gc.collect()
            mx.clear_cache()
        ways = _attach(policy.model, stage, preflight.with_details(ways, loss, config), config)
        job = TrainState(config, policy.model, optimizer, loss, *parts, run.checkpoints, ways, peers)
        yield from _train(job, stage, run, resume is not None, warm, should_stop)


def _read(steps: Generator[Sofar, None, Made], should_stop: Stop) -> Generator[Event, None, Made | None]:
    """What `steps` return, or None when asked to stop: of this part nothing is kept."""
    while True:
        try:
            sofar = next(steps)
        except StopIteration as end:
            return end.value
        yield Event("reading", 0, sofar._asdict())
        if should_stop():
            steps.close()
            yield Event("interrupted", 0, {})
            return None


def _attach(model: nn.Module, stage: Stage, ways: ForwardFns, config: Config) -> ForwardFns:
    """Give the model what is trained, and the ways to run it that the stage needs."""
    if config.model.adapter is None:
        attach_lora(model, config.lora, config.train.seed)
    stage.attach(model)
    return stage.ways(ways, config)


def _train(
    job: TrainState, stage: Stage, run: Run, resumed: bool, warm: Path | None, should_stop: Stop
) -> Iterator[Event]:
    """From the start or the last checkpoint to the final adapter."""
    progress = Progress()
    if warm is not None:
        checkpoint.restore_optimizer(warm, job.optimizer)
    if job.peers.first:
        checkpoint.remove_unfinished(run.path)
    if resumed:
        job, progress = distributed.restored(job)
        if job.peers.first:
            run.log({"resumed_from": progress.step})
        yield Event("resumed", progress.step, {})
    if progress.step == 0 and job.config.reference.model is None:
        preflight.check_start(job)
    step, room = progress.step, MemoryGuard()
    for event in run_loop(job, progress, lambda: should_stop() or room.short()):
        if event.kind in ("step", "eval"):
            event = event._replace(values=stage.report(event.values, job.config))
            if job.peers.first:
                run.log({"step": event.step, **event.values})
        yield event
        if event.kind == "interrupted":
            room.complain(run.checkpoints)
            return
        step = event.step
    yield _keep(job, stage, run, step)


def _parts(
    config: Config, loss: Loss, scorer: Scorer, identity: dict, data: Dataset, should_stop: Stop, peers: Group
) -> Generator[Event, None, tuple[ReferencedPairs, ReferencedPairs] | None]:
    """Training and held-out pairs with what the loss asks of a reference, or None when asked to stop."""
    if "reference" not in loss.needs:
        return _without_reference(config, data)
    return (yield from _score_reference(config, loss, scorer, identity, data, should_stop, peers))


def _without_reference(config: Config, data: Dataset) -> tuple[ReferencedPairs, ReferencedPairs]:
    """Training and held-out pairs where no reference is asked."""

    def part(examples: Examples, batches: list[Indices]) -> ReferencedPairs:
        """Zeros in the place of log-probs."""
        frames = batch_shapes_for(examples, batches, config.train.batch_size)
        return ReferencedPairs(examples, np.zeros((len(examples), 2), np.float32), frames)

    train, heldout = data.train, data.heldout
    return part(train, training_batches(config, train)), part(heldout, heldout_batches(config, heldout))


def _score_reference(
    config: Config, loss: Loss, scorer: Scorer, identity: dict, data: Dataset, should_stop: Stop, peers: Group
) -> Generator[Event, None, tuple[ReferencedPairs, ReferencedPairs] | None]:
    """The reference's log-probs of training and held-out pairs, or None when asked to stop."""
    train, parts = config.train, []
    plans: list[tuple[str, Examples, list[Indices]]] = [
        ("training", data.train, training_batches(config, data.train)),
        ("held-out", data.heldout, heldout_batches(config, data.heldout)),
    ]
    for name, examples, batches in plans:
        frames = batch_shapes_for(examples, batches, train.batch_size)
        rows = shared_rows(examples) if "shared" in loss.needs else None
        scoring = with_reference(examples, scorer, identity, batches, train.batch_size, frames, rows, peers)
        logps = None
        while logps is None:
            done, logps = next(scoring)
            yield Event("reference", 0, {"part": name, "done": done, "total": len(examples)})
            if peers.agree(should_stop()):
                scoring.close()  # saves what was scored
                yield Event("interrupted", 0, {})
                return None
        parts.append(ReferencedPairs(examples, logps, frames))
        yield Event("referenced", 0, {"part": name, "total": len(examples)})
    return parts[0], parts[1]


def _keep(job: TrainState, stage: Stage, run: Run, step: int) -> Event:
    """Fill adapter/ (and what else the stage keeps) with the last step or the best one, as the recipe asks."""
    source = checkpoint.folder_of(run.checkpoints, step)
    if not job.peers.first:
        return Event("done", step, {"run": run, "adapter": run.adapter, "from": source.name, "best": None})
    best = checkpoint.read_progress(source).best_step
    if job.config.train.keep_model == "best" and best is not None:
        source = checkpoint.folder_of(run.checkpoints, best)
        load_arrays(job.model, source)
    stage.keep(job.model, run)
    save_adapter(job.model, job.config.lora, run.adapter)
    return Event("done", step, {"run": run, "adapter": run.adapter, "from": source.name, "best": best})
