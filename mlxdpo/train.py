"""The story of a run: load, read, encode, score the reference, attach the adapter, step, keep.

for event in train(load_config("recipe.yaml")):
    print(event)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator

import mlx.core as mx

from mlxdpo import checkpoint, start
from mlxdpo.checkpoint import Progress
from mlxdpo.config import Config
from mlxdpo.data.frames import frames_for
from mlxdpo.data.load import Dataset, encode_split, read_split
from mlxdpo.data.planning import Indices
from mlxdpo.data.store import Examples
from mlxdpo.loop import Job, Part, run_loop
from mlxdpo.losses import resolve
from mlxdpo.manifest import check_same, describe_run
from mlxdpo.model.adapters import attach_lora, dropout_off, load_arrays, save_adapter
from mlxdpo.model.light import light_attention
from mlxdpo.model.policy import load_policy
from mlxdpo.outlook import heldout_batches, training_batches
from mlxdpo.platform import wire_memory
from mlxdpo.reference import Scorer, with_reference
from mlxdpo.runs import Run
from mlxdpo.step import make_optimizer, make_scorer
from mlxdpo.types import Event

Stop = Callable[[], bool]


def train(config: Config, *, resume: Run | None = None, should_stop: Stop = lambda: False) -> Iterator[Event]:
    """Run a recipe, or go on with `resume`; yields what happens and writes the run directory.

    Raises `UserError` when the recipe, the data or a changed input stops it; nothing is written before the model
    and the data are read.
    """
    objective, knobs = resolve(config.loss)
    optimizer = make_optimizer(config.optim)
    rows = read_split(config.data, config.train.seed)  # before the model: a typing error should not cost a download
    wire_memory()
    policy = load_policy(config.model)
    config = start.with_adapter(config, policy.model)
    reference, adapter = start.find_reference(config, policy)
    data = encode_split(rows, config.data, policy.tokenizer, policy.eos_ids)
    del rows  # they may be gigabytes on disk
    start.check_heldout(config, data)
    longest = start.longest_row(data)
    start.check_window(policy, longest)
    ways, note = start.choose_ways(policy.model, data, config)
    manifest = describe_run(config, policy, reference, adapter, data)
    run = resume or Run.create(config)
    outlook = start.preview(policy.model, data, config, ways)
    yield Event("start", 0, {"run": run, "config": config, "data": data, "policy": policy, "outlook": outlook})
    if resume and (run.path / "manifest.json").exists():
        check_same(run.manifest(), manifest, run.path)
    if note:
        yield Event("note", 0, {"text": note})
    # Entered before anything is traced: a trace keeps the attention it was made with.
    with run.exclusive(), light_attention(policy.model, longest), light_attention(reference.model, longest):
        run.write_manifest(manifest)
        score = (ways if reference is policy else start.choose_ways(reference.model, data, config)[0]).score
        scorer = make_scorer(reference.model, score)
        with dropout_off(reference.model):
            parts = yield from _score_reference(config, scorer, manifest["reference"], data, should_stop)
        if parts is None:
            return
        if reference is not policy:
            del reference
            gc.collect()
            mx.clear_cache()
        if config.model.adapter is None:
            attach_lora(policy.model, config.lora, config.train.seed)
        job = Job(config, policy.model, optimizer, objective, knobs, *parts, run.checkpoints, ways)
        yield from _train(job, run, resume is not None, should_stop)


def _train(job: Job, run: Run, resumed: bool, should_stop: Stop) -> Iterator[Event]:
    """From the start or the last checkpoint to the final adapter."""
    progress = Progress()
    checkpoint.sweep(run.path)
    if resumed:
        if saved := checkpoint.steps(run.checkpoints):
            progress = checkpoint.restore(saved[-1], job.model, job.optimizer)
        run.log({"resumed_from": progress.step})
        yield Event("resumed", progress.step, {})
    if progress.step == 0 and job.config.reference.model is None:
        start.check(job)
    step = progress.step
    for event in run_loop(job, progress, should_stop):
        if event.kind in ("step", "eval"):
            run.log({"step": event.step, **event.values})
        yield event
        if event.kind == "interrupted":
            return
        step = event.step
    yield _keep(job, run, step)


def _score_reference(
    config: Config, scorer: Scorer, identity: dict, data: Dataset, should_stop: Stop
) -> Generator[Event, None, tuple[Part, Part] | None]:
    """The reference's log-probs of training and held-out pairs, or None when asked to stop."""
    train, parts = config.train, []
    plans: list[tuple[str, Examples, list[Indices]]] = [
        ("training", data.train, training_batches(config, data.train)),
        ("held-out", data.heldout, heldout_batches(config, data.heldout)),
    ]
    for name, examples, batches in plans:
        frames = frames_for(examples, batches, train.batch_size)
        scoring, logps = with_reference(examples, scorer, identity, batches, train.batch_size, frames), None
        while logps is None:
            done, logps = next(scoring)
            yield Event("reference", 0, {"part": name, "done": done, "total": len(examples)})
            if should_stop():
                scoring.close()  # saves what was scored
                yield Event("interrupted", 0, {})
                return None
        parts.append(Part(examples, logps, frames))
        yield Event("referenced", 0, {"part": name, "total": len(examples)})
    return parts[0], parts[1]


def _keep(job: Job, run: Run, step: int) -> Event:
    """Fill adapter/ with the last step or the best one, as the recipe asks."""
    source = checkpoint.folder_of(run.checkpoints, step)
    best = checkpoint.read_progress(source).best_step
    if job.config.train.final == "best" and best is not None:
        source = checkpoint.folder_of(run.checkpoints, best)
        load_arrays(job.model, source)
    save_adapter(job.model, job.config.lora, run.adapter)
    return Event("done", step, {"run": run, "adapter": run.adapter, "from": source.name, "best": best})
