"""The story of a run: prepare (load, read, encode, plan, score the reference, attach the adapter), then step and keep.

for event in train(load_config("recipe.yaml")):
    print(event)
"""

from __future__ import annotations

import contextlib
import datetime
import gc
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.dataset import Dataset, Made, Sofar, encoding, reading
from mlxdpo.data.template import on_day
from mlxdpo.data.transforms import Transform
from mlxdpo.distributed.group import ALONE, Group
from mlxdpo.forward.choose_forward import ForwardFns
from mlxdpo.forward.patch_mlx_lm import chunked_attention_on
from mlxdpo.io.words import counted
from mlxdpo.losses import Loss
from mlxdpo.machine.memory_guard import MemoryGuard
from mlxdpo.model.adapters import attach_lora, dropout_off, load_arrays, save_adapter, with_adapter
from mlxdpo.model.policy import Policy, load_policy, tokenizer_of
from mlxdpo.runs import INPUTS, LENGTH, Run
from mlxdpo.training import checkpoint, distributed, preflight
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.given import config_of
from mlxdpo.training.loop import run_loop
from mlxdpo.training.manifest import describe_run
from mlxdpo.training.pace import measure_pace, within_minutes
from mlxdpo.training.plan import TrainPlan, epochs_for, learning_rate, length_note, make_plan, settled
from mlxdpo.training.rate_probe import choose_rate, rate_sentence
from mlxdpo.training.reference import find_reference, shared_rows, with_reference
from mlxdpo.training.reference_sync import check_reference_sync
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import ReferencedPairs, TrainState, make_optimizer, make_scorer
from mlxdpo.training.watched_answers import Generate, unasked_note, watch_answers
from mlxdpo.types import Event, UserError

Stop = Callable[[], bool]
Fits = Callable[[Config, Dataset], None]


def train(
    config: Config | None = None,
    *,
    model: Any = None,
    data: Any = None,
    resume: Run | None = None,
    warm: Path | None = None,
    should_stop: Stop = lambda: False,
    group: Group = ALONE,
    fits: Fits | None = None,
    generate: Generate | None = None,
    **settings: Any,
) -> Iterator[Event]:
    """Run a recipe, or resume `resume`; yields what happens and writes the run directory.

    Without a `config` the recipe is made of `model`, `data` (a path, a Hub id or rows: dicts in any row shape) and
    `settings` by name (`given.config_of`): train(model="smollm2", data=rows, **{"optim.lr": 1e-4}).

    `warm` is another run's checkpoint whose optimizer state the first step starts from (rounds of one training).
    Of several processes in `group` each must call this alike; process 0 alone writes. `fits` is called before the model
    is loaded, to raise for a run that is too large (`estimate.forecast.check_fits`); `generate` answers the prompts of
    `train.sample_every` (`inference.generate.generate`), and without it none are asked.

    Raises `UserError` when the recipe, the data or a changed input stops it; nothing is written before the model
    and the data are read.
    """
    if config is None:
        config = config_of(model, data, None, settings)
    elif model is not None or data is not None or settings:
        raise UserError("give a config, or model, data and settings; config.model_copy changes single settings")
    return _carry_out(config, resume, warm, should_stop, group, fits, generate)


def _carry_out(
    config: Config,
    resume: Run | None,
    warm: Path | None,
    should_stop: Stop,
    group: Group,
    fits: Fits | None,
    generate: Generate | None,
) -> Iterator[Event]:
    if resume is not None and group.first:
        resume.check_trained()
        resume.need(*INPUTS)
    with contextlib.ExitStack() as held:
        prepared = yield from prepare(config, resume, should_stop, group, held, fits, generate)
        if prepared is None:
            return
        (run, state), progress = prepared, Progress()
        if warm is not None:
            checkpoint.restore_optimizer(warm, state.optimizer)
        if group.first:
            checkpoint.remove_unfinished(run.path)
        if resume is not None:
            state, progress = yield from _go_on(run, state, group)
        if progress.step == 0 and state.config.reference.model is None:
            preflight.check_start(state)
        settled_state = yield from _settle(state, run, should_stop)
        if settled_state is None:
            yield Event("interrupted", 0, {})
            return
        state = settled_state
        step, guard = progress.step, MemoryGuard()
        for event in run_loop(state, progress, lambda: should_stop() or guard.short()):
            if event.kind in ("step", "eval", "answers") and group.first:
                run.log({"step": event.step, **event.values})
            yield event
            if event.kind == "interrupted":
                guard.raise_if_low(run.checkpoints)
                return
            step = event.step
        yield _keep_adapter(state, run, step)


def _go_on(run: Run, state: TrainState, group: Group) -> Generator[Event, None, tuple[TrainState, Progress]]:
    """The state of the last checkpoint, and what there is to say about it."""
    checkpoints, progress = distributed.restore_for_group(group, state.checkpoints, state.model, state.optimizer)
    state = replace(state, checkpoints=checkpoints)
    _check_length(run, state, progress)
    if group.first:
        for text in filter(None, (_make_longer(run, state, progress.step), _lost_lines(run, progress.step))):
            yield Event("note", progress.step, {"text": text})
        run.log({"resumed_from": progress.step})
    yield Event("resumed", progress.step, {})
    return state, progress


def _check_length(run: Run, state: TrainState, progress: Progress) -> None:
    """Raise `UserError` where a run is to end before the steps that it has done."""
    if progress.step > state.plan.steps:
        raise UserError(
            f"{run.path}: {counted(progress.step, 'step')} done, and what was asked for ends after {state.plan.steps}; "
            f"ask for more with --train.epochs or --train.steps"
        )


def _make_longer(run: Run, state: TrainState, step: int) -> str:
    """Keep in the run that it trains longer than it did, if it does; what to say of it.

    The learning rate is a function of step and total: it goes on where the schedule over the new total has it.
    """
    train, before, total = state.config.train, run.config(), state.plan.steps
    if all(getattr(train, name) == getattr(before.train, name) for name in LENGTH):
        return ""
    run.make_longer(state.config, step)
    if step == total:
        return f"all {total} steps are done"
    optim = state.config.optim
    rate = learning_rate(optim, step, total)
    return (
        f"{counted(step, 'step')} done, {total - step} to go; the learning rate continues at {rate:.3g}, as the "
        f"{optim.schedule} schedule over all {total} steps has it"
    )


def _settle(state: TrainState, run: Run, should_stop: Stop) -> Generator[Event, None, TrainState | None]:
    """The state with what the recipe leaves open found by trying: steps by the minutes it gives, then the rate.

    What is found is written into the run's configuration, and the run is the one of a recipe that names it. None when
    asked to stop.
    """
    if state.config.train.minutes is not None:
        pace = measure_pace(state, should_stop)
        if pace is None:
            return None
        state, text = within_minutes(state, pace)
        yield Event("note", 0, {"text": text, "steps": state.plan.steps})
        if state.group.first:
            run.settle("train", **{name: getattr(state.config.train, name) for name in ("epochs", "steps", "minutes")})
    if state.config.optim.lr != "auto":
        return state
    chosen = yield from choose_rate(state, should_stop)
    if chosen is None:
        return None
    yield Event("note", 0, {"text": rate_sentence(chosen)})
    if state.group.first:
        run.settle("optim", lr=chosen.lr)
        run.write_manifest(run.manifest() | {"rate": chosen.as_json()})
    optim = state.config.optim.model_copy(update={"lr": chosen.lr})
    return replace(state, config=state.config.model_copy(update={"optim": optim}))


def _lost_lines(run: Run, step: int) -> str | None:
    """What to say where `metrics.jsonl` does not reach the checkpoint that a run goes on from: it was shortened."""
    try:
        last = max((line["step"] for line in run.metrics()), default=0)
    except UserError as error:
        return f"{error}; the run continues without it"
    if last >= step:
        return None
    file = run.path / "metrics.jsonl"
    return f"{file}: ends at step {last}, the checkpoint is of step {step}; the lines between are lost, restore them"


def prepare(
    config: Config,
    resume: Run | None,
    should_stop: Stop,
    group: Group,
    held: contextlib.ExitStack,
    fits: Fits | None,
    generate: Generate | None = None,
) -> Generator[Event, None, tuple[Run, TrainState] | None]:
    """The run directory and everything that the loop needs, or None when asked to stop.

    What must stay while the run lasts (the directory's lock, the attention that is traced) is entered into `held`. What
    can be refused is refused before the model is loaded: a typing error should not cost a download.
    """
    stage = stage_of(config)
    loss = stage.loss(config)
    check_reference_sync(config, loss)
    optimizer = make_optimizer(config.optim)
    read = yield from _read_pairs(config, stage.transform(config, loss), resume, should_stop, fits)
    if read is None:
        return None
    config, data = read
    config = settled(config, stage.rate, epochs_for(config, data.train))
    policy = load_policy(config.model)
    asked = with_adapter(config, policy.model)
    config, split_note = distributed.config_for_group(asked, group)
    reference, adapter = find_reference(config, policy)
    longest = preflight.check_rows_fit(data, policy, reference)
    plan = make_plan(config, data.train, data.heldout)
    forward, note = preflight.choose_forward(policy.model, data, plan, config)
    manifest = describe_run(config, policy, reference, adapter, data)
    distributed.check_alike(group, config, manifest)
    run = distributed.open_run(group, asked, resume)
    summary = preflight.preview_plan(data, plan, forward.level)
    begun = {"run": run, "config": config, "data": data, "policy": policy, "plan": summary}
    yield Event("start", 0, begun | {"shown": stage.shown(data.train[0], loss)})
    remarks = (preflight.recurrence_note(policy.model, summary), stage.remark(data, config, loss))
    said = (length_note(config.train, plan), split_note, note, *remarks, unasked_note(config.train, generate))
    yield from (Event("note", 0, {"text": text}) for text in (*policy.reading.notes, *said) if text)
    held.enter_context(distributed.holding(group, run, manifest))
    for model in (policy.model, reference.model):  # before anything is traced: a trace keeps the attention it has
        held.enter_context(chunked_attention_on(model, longest))
    scored = (config, loss, forward, policy, reference, manifest["reference"], data, plan, should_stop, group)
    logps = yield from _reference_logps(*scored)
    if logps is None:
        return None
    if reference is not policy:
        del reference, scored, model
        gc.collect()
        mx.clear_cache()
    if config.model.adapter is None:
        attach_lora(policy.model, config.lora, config.train.seed)
    asker = generate if group.first and stage.writes else None  # before a checkpoint is restored: answers of the start
    answers = watch_answers(asker, policy, data.train, summary.tokens, plan.steps, config.train)
    stage.attach(policy.model)
    forward = stage.forward(preflight.with_details(forward, loss, config), config)
    train = ReferencedPairs(data.train, logps[0], plan.shapes)
    heldout = ReferencedPairs(data.heldout, logps[1], plan.heldout_shapes)
    rest = (run.checkpoints, forward, group, answers)
    return run, TrainState(config, stage, policy.model, optimizer, loss, plan, train, heldout, *rest)


def _read_pairs(
    config: Config, transform: Transform, resume: Run | None, should_stop: Stop, fits: Fits | None
) -> Generator[Event, None, tuple[Config, Dataset] | None]:
    """The recipe with the day that its chat template is told, and the pairs as token ids, with the tokenizer alone.

    None when asked to stop. Too few and too many pairs for this machine are refused here.
    """
    rows = yield from _report(reading(config.data, config.train.seed, transform), should_stop)
    if rows is None:
        return None
    tokenizer = tokenizer_of(config.model)
    if resume is None:
        config = config.model_copy(update={"data": on_day(config.data, tokenizer, datetime.date.today())})
    encoded = encoding(rows, config.data, tokenizer, frozenset(tokenizer.eos_token_ids))
    data = yield from _report(encoded, should_stop)
    if data is None:
        return None
    preflight.check_heldout(config, data)
    if fits is not None:
        fits(config, data)
    return config, data


def _report(steps: Generator[Sofar, None, Made], should_stop: Stop) -> Generator[Event, None, Made | None]:
    """What `steps` return, or None when asked to stop: of this part nothing is kept."""
    while True:
        try:
            so_far = next(steps)
        except StopIteration as end:
            return end.value
        yield Event("reading", 0, so_far._asdict())
        if should_stop():
            steps.close()
            yield Event("interrupted", 0, {})
            return None


def _reference_logps(
    config: Config,
    loss: Loss,
    forward: ForwardFns,
    policy: Policy,
    reference: Policy,
    identity: dict[str, Any],
    data: Dataset,
    plan: TrainPlan,
    should_stop: Stop,
    group: Group,
) -> Generator[Event, None, list[np.ndarray] | None]:
    """The reference's log-probs of training and held-out pairs, each (N, 2) or (N, 4), or None when asked to stop.

    Zeros where the loss asks no reference. Called before the adapter is attached: the policy is its own reference.
    """
    if "reference" not in loss.needs:
        return [np.zeros((len(part), 2), np.float32) for part in (data.train, data.heldout)]
    own = forward if reference is policy else preflight.choose_forward(reference.model, data, plan, config)[0]
    scorer = make_scorer(reference.model, preflight.with_details(own, loss, config).score)
    found: list[np.ndarray] = []
    parts = (
        ("training", data.train, plan.training, plan.shapes),
        ("held-out", data.heldout, plan.heldout, plan.heldout_shapes),
    )
    for name, examples, batches, shapes in parts:
        rows = shared_rows(examples) if "shared" in loss.needs else None
        scoring = with_reference(examples, scorer, identity, batches, config.train.batch_size, shapes, rows, group)
        logps = None
        while logps is None:
            with dropout_off(reference.model):
                done, logps = next(scoring)
            yield Event("reference", 0, {"part": name, "done": done, "total": len(examples)})
            if group.agree(should_stop()):
                scoring.close()  # saves what was scored
                yield Event("interrupted", 0, {})
                return None
        found.append(logps)
        yield Event("referenced", 0, {"part": name, "total": len(examples)})
    return found


def _keep_adapter(state: TrainState, run: Run, step: int) -> Event:
    """Fill adapter/ (and what else the stage keeps) with the last step or the best one, as the recipe asks."""
    source = checkpoint.folder_of(run.checkpoints, step)
    if not state.group.first:
        return Event("done", step, {"run": run, "adapter": run.adapter, "from": source.name, "best": None})
    progress = checkpoint.read_progress(source)
    best = progress.best_step
    if best is not None and progress.collapsed and progress.sound_step is not None:
        best = min(best, progress.sound_step)
    if state.config.train.keep_model == "best" and best is not None:
        source = checkpoint.folder_of(run.checkpoints, best)
        load_arrays(state.model, source)
    state.stage.keep(state.model, run)
    save_adapter(state.model, state.config.lora, run.adapter)
    return Event("done", step, {"run": run, "adapter": run.adapter, "from": source.name, "best": best})
