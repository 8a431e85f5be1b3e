"""The story of rounds: collect, train, measure, weigh; again, until they are done or the judge is being gamed.

Every stage leaves a file that appears whole, and a stage whose file is there is not done again: whoever is killed
anywhere goes on from there. With `rounds.every` the rounds are short and the optimizer goes on between them: online
DPO on the policy's own answers (arXiv 2402.04792), its pairs `every` steps old at most.

OUT/rounds.yaml    the recipe, resolved            OUT/rounds.json   the rounds side by side, and why they stopped
OUT/start.json     the start, measured             OUT/report.html
OUT/round-1/       a run directory, with data/pairs.jsonl (what was collected) and eval/round.json (measured); with
                   a merged reference, reference/ from round 2 on
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import Config, Drawing, dump_config, load_config
from mlxdpo.data.read import heldout_prompts, heldout_source, prompt_key, read_pairs
from mlxdpo.inference.trained_run import ModelContext, TrainedRun, encode_pairs, model_logps
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.io.staging import single_process
from mlxdpo.io.words import counted
from mlxdpo.model.adapters import adapters_off, load_run, read_settings
from mlxdpo.online.collect.run import report_file
from mlxdpo.online.partial_output import LOCK, changed_setting
from mlxdpo.online.prompts import (
    Asked,
    PolicySource,
    Prompts,
    as_rows,
    holds_answers,
    read_prompts,
    source_of,
    start_source,
)
from mlxdpo.online.rounds.reference import MERGED, MOST_PAIRS, SHARES, learn_weights, write_merged
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.plan import learning_rate, settled
from mlxdpo.training.rate_probe import usual_rate
from mlxdpo.types import Event, Preference, UserError

Stop = Callable[[], bool]
Measured = Mapping[str, Any]


class Stages(NamedTuple):
    """What rounds are done with, given by the caller.

    gather    (source, prompts, drawing, file, stop) writes a round's pairs
    train     (config, resume, warm, stop) trains; `warm` is a checkpoint whose optimizer goes on
    measure   (opened, held-out rows, the start as measured, None for the start itself) -> a round, answer by answer
    weigh     (start and rounds so far, as measured) -> the last round's numbers, and why to stop ("" to go on)
    """

    gather: Callable[[Callable[[], PolicySource], Prompts, Drawing, Path, Stop], Iterator[Event]]
    train: Callable[[Config, Run | None, Path | None, Stop], Iterator[Event]]
    measure: Callable[[TrainedRun, Sequence[Preference], Measured | None], Measured]
    weigh: Callable[[Sequence[Measured]], tuple[dict[str, Any], str]]


def iterate(config: Config, hands: Stages, should_stop: Stop = lambda: False) -> Iterator[Event]:
    """Run rounds; yields "begin", whatever the stages yield, "round" after each, then "over" or "interrupted".

    Raises `UserError` as `check_rounds`, `begin_rounds`, `split_prompts` and the stages do.
    """
    check_rounds(config)
    prompts, heldout = split_prompts(config)
    folder = begin_rounds(config)
    config = config.model_copy(update={"out": str(folder)})
    yield Event("begin", 0, {"folder": folder, "prompts": len(prompts.asked), "heldout": len(heldout)})
    with single_process(folder / LOCK, f"{folder}: another process is running these rounds; stop it first, or wait"):
        measured = [_measure_once(folder / START, lambda: open_start(config, folder), heldout, hands, None)]
        rows: list[dict[str, Any]] = [hands.weigh(measured)[0] | {"round": 0}]
        parent, reason = None, ""
        for number in range(1, config.rounds.count + 1):
            work = _Round(config, folder, number, parent)
            for stage in (work.gather(prompts, hands, should_stop), work.train(hands, should_stop)):
                for event in stage:
                    yield event
                    if event.kind == "interrupted":
                        return
                _free_memory()
                if should_stop():
                    yield Event("interrupted", number, {})
                    return
            run = Run.open(work.path)
            opener = lambda run=run: open_round(config, run)  # noqa: E731
            measured.append(_measure_once(run.path / "eval" / "round.json", opener, heldout, hands, measured[0]))
            row, reason = hands.weigh(measured)
            rows.append(_round_row(row, run, number, parent))
            _write_rounds(folder, config, rows, reason)
            yield Event("round", number, {"rows": rows, "reason": reason})
            parent = run
            if reason:
                break
    yield Event("over", len(rows) - 1, {"folder": folder, "rows": rows, "reason": reason})


def open_start(config: Config, folder: Path) -> TrainedRun:
    """The start, its own reference."""
    policy = start_source(config, "start").policy
    side: ModelContext = partial(contextlib.nullcontext, policy.model)
    return TrainedRun(Run(folder), config, policy, side, side)


def open_round(config: Config, run: Run) -> TrainedRun:
    """A round's tuned model with the start of round 1 as reference; one set of weights where adapters switch off."""
    policy = load_run(run)
    bare = config.model.adapter is None and read_settings(run.adapter).method != "full"
    first: ModelContext = (
        partial(adapters_off, policy.model)
        if bare
        else partial(contextlib.nullcontext, start_source(config, "start").policy.model)
    )
    return TrainedRun(run, config, policy, first, first)


class _Round:
    """One round: where it stands, and its two stages that can be stopped half-way."""

    def __init__(self, config: Config, folder: Path, number: int, parent: Run | None):
        self.config, self.folder, self.number, self.parent = config, folder, number, parent
        self.path = folder / f"round-{number}"
        self.pairs = self.path / "data" / "pairs.jsonl"

    def gather(self, prompts: Prompts, hands: Stages, should_stop: Stop) -> Iterator[Event]:
        """Pairs from the parent's answers, or the start's."""
        if self.pairs.exists() and not self.pairs.with_name(f"{self.pairs.name}.partial").exists():
            return
        yield Event("gather", self.number, {"round": self.number})
        drawing = drawing_of(self.config, self.number)
        asked = prompts_of(self.config, prompts, self.number)
        yield from hands.gather(self._source, asked, drawing, self.pairs, should_stop)

    def _source(self) -> PolicySource:
        return start_source(self.config, "start") if self.parent is None else source_of(self.parent)

    def train(self, hands: Stages, should_stop: Stop) -> Iterator[Event]:
        """The round's own training, from its last checkpoint if it has one."""
        if trained(self.path):
            return
        resume = Run.open(self.path) if (self.path / "config.yaml").exists() else None
        if self.config.rounds.reference == "merged" and self.parent is not None:
            yield Event("merged", self.number, {"round": self.number, "weights": self._merge()})
        config = resume.config() if resume else round_config(self.config, self.folder, self.number, self.parent)
        online = self.config.rounds.every is not None
        warm = checkpoint.steps(self.parent.checkpoints)[-1] if online and self.parent is not None else None
        yield from hands.train(config, resume, warm, should_stop)

    def _merge(self) -> Mapping[str, float]:
        """The weight of each part of this round's merged reference, which is written if it is missing."""
        folder = self.path / MERGED
        if not folder.exists():
            earlier = [Run.open(self.folder / f"round-{number}") for number in range(1, self.number)]
            weights = learn_weights(self._rewards(earlier)).tolist()
            start = self.config.model.adapter
            parts = {"start": (None if start is None else Path(start), max(0.0, 1 - sum(weights)))}
            parts |= {run.path.name: (run.adapter, weight) for run, weight in zip(earlier, weights, strict=True)}
            write_merged(parts, folder)
        return read_json(folder / SHARES)

    def _rewards(self, earlier: Sequence[Run]) -> np.ndarray:
        """(K, N) implicit reward margins of each earlier round's policy on this round's pairs, nats."""
        config = round_config(self.config, self.folder, self.number, self.parent)
        rows = read_pairs(config.data)[0][:MOST_PAIRS]
        start = open_start(self.config, self.folder)
        examples = encode_pairs(start, rows)[1]
        before, found = model_logps(start.policy.model, examples, config.data.group, config.train.batch_size), []
        del start  # one model at a time
        for run in earlier:
            _free_memory()
            moved = model_logps(load_run(run).model, examples, config.data.group, config.train.batch_size) - before
            found.append(config.loss.beta * (moved[0] - moved[1]))
        return np.stack(found)


def _measure_once(
    file: Path, opened: Callable[[], TrainedRun], heldout: Sequence[Asked], hands: Stages, start: Measured | None
) -> Measured:
    if not file.exists():
        write_json(file, hands.measure(opened(), as_rows(heldout), start))
        _free_memory()
    return read_json(file)


def _round_row(row: Mapping[str, Any], run: Run, number: int, parent: Run | None) -> dict[str, Any]:
    file = report_file(run.path / "data" / "pairs.jsonl")
    report = read_json(file)
    with as_written(file):
        names = ("rows", "answers", "answers_left_out", "prompts_without_pair", "mean_score")
        out = {name: report[name] for name in names}
    own = {"round": number, "run": run.path.name, "parent": None if parent is None else parent.path.name}
    return {**own, "collected": out, **row}


def _write_rounds(folder: Path, config: Config, rows: Sequence[Mapping[str, Any]], reason: str) -> None:
    """rounds.json: the rounds side by side. `kept` is the last round before the judge was being gamed."""
    done = len(rows) - 1
    found = {
        "format": 1,
        "judge": config.collect.judge,
        "second": config.rounds.second or None,
        "reference": config.rounds.reference,
        "every": config.rounds.every,
        "asked_for": config.rounds.count,
        "stopped": reason or None,
        "kept": done - 1 if reason else done,
        "rounds": list(rows),
    }
    write_json(folder / RESULTS, found)


def _free_memory() -> None:
    """The weights of a finished stage are gone before the next one loads its own."""
    gc.collect()
    mx.clear_cache()


RECIPE, RESULTS, START = "rounds.yaml", "rounds.json", "start.json"


def check_rounds(config: Config) -> None:
    """Raise `UserError` for a recipe that rounds cannot follow."""
    rounds = config.rounds
    if config.stage != "dpo":
        raise UserError(f"stage {config.stage} does not support rounds; set stage to dpo")
    if not config.collect.judge:
        raise UserError("no judge ranks the answers; set collect.judge, such as --collect.judge vader")
    if rounds.second == config.collect.judge:
        raise UserError(f"rounds.second {rounds.second} is also the ranking judge; name another one, or none")
    if rounds.reference != "first" and config.reference.model is not None:
        raise UserError(
            f"rounds.reference {rounds.reference} is incompatible with reference.model {config.reference.model}"
        )
    if rounds.reference == "merged" and config.lora.method != "lora":
        raise UserError(f"rounds.reference merged merges LoRA adapters; lora.method is {config.lora.method}")
    if rounds.reference == "merged" and rounds.every is not None:
        raise UserError(f"rounds.every {rounds.every} makes rounds too short to merge; use rounds.reference previous")
    if rounds.every is not None and config.train.steps is not None:
        raise UserError(f"rounds.every {rounds.every} already says how many steps a round takes; drop train.steps")
    if config.collect.judge.startswith("votes:") and (rounds.count > 1 or rounds.every):
        raise UserError("votes apply to existing answers, so they make one round; set --rounds 1")


def begin_rounds(config: Config) -> Path:
    """The folder of the rounds, its recipe written; an existing one must hold the same recipe (more rounds may be
    asked for, but for online ones, whose schedule spans them all).

    Raises `UserError` naming the setting that is another one.
    """
    folder = Path(config.out) if config.out else _free_rounds_folder(config)
    file = folder / RECIPE
    if file.exists():
        then, now = (one.model_dump(mode="json") for one in (load_config(file), config))
        if config.rounds.every is None:
            now["rounds"]["count"] = then["rounds"]["count"]
        if changed := changed_setting(then, now | {"out": then["out"]}):
            raise UserError(f"{folder} contains rounds with a different {changed}; choose another --out, or restore it")
    elif (folder / "config.yaml").exists():
        raise UserError(f"{folder} contains a run, not rounds; choose another --out")
    text = dump_config(config.model_copy(update={"out": str(folder)}))
    if not file.exists() or file.read_text("utf-8") != text:
        write_text(file, text)
    return folder


def _free_rounds_folder(config: Config) -> Path:
    stem = f"{Path(config.model.path).name}-{Path(config.data.path).stem}-rounds".lower()
    return next(p for n in range(1, 10**6) if not (p := Path("runs") / f"{stem}-{n}").exists())


def split_prompts(config: Config) -> tuple[Prompts, list[Asked]]:
    """(prompts to answer and learn from, held-out prompts to measure with, at most `rounds.heldout`).

    Held out are those of `data.eval`, else a share of `data.eval_fraction`. Raises `UserError` when there are none.
    """
    prompts, named = read_prompts(config.data), heldout_source(config.data)
    if named is not None:
        heldout = read_prompts(config.data, *named).asked
        keys = {prompt_key(one.prompt) for one in heldout}
    else:
        every = {prompt_key(one.prompt) for one in prompts.asked}
        keys = heldout_prompts(every, config.data.eval_fraction, config.train.seed)
        heldout = [one for one in prompts.asked if prompt_key(one.prompt) in keys]
    kept = [one for one in prompts.asked if prompt_key(one.prompt) not in keys]
    if not kept or len(heldout) < 2:
        raise UserError(
            f"{config.data.path}: {counted(len(kept), 'prompt')} to learn from and {len(heldout)} held out; rounds "
            f"need at least 1 and 2: give data.eval, or raise data.eval_fraction"
        )
    out = len(prompts.asked) - len(kept)
    left_out = prompts.left_out | ({"held out, to measure with": out} if out else {})
    return Prompts(kept, left_out, frozenset(keys)), heldout[: config.rounds.heldout]


def prompts_of(config: Config, prompts: Prompts, number: int) -> Prompts:
    """The prompts of round `number` (from 1): the next ones of a fixed random order, which begins again at its end."""
    asked, size = prompts.asked, _prompts_per_round(config)
    if size is None or size >= len(asked):
        return prompts
    order = np.random.default_rng([config.collect.seed, 7]).permutation(len(asked)).tolist()
    places = [order[at % len(asked)] for at in range((number - 1) * size, number * size)]
    return prompts._replace(asked=[asked[at] for at in places])


def _prompts_per_round(config: Config) -> int | None:
    if config.rounds.prompts is None and config.rounds.every is not None:
        return config.rounds.every * config.train.batch_size * config.train.gradient_accumulation
    return config.rounds.prompts


def drawing_of(config: Config, number: int) -> Drawing:
    """How round `number` draws: as the recipe says, with noise of its own."""
    values = config.collect.model_dump(exclude={"judge"})
    seed = np.random.SeedSequence([config.collect.seed, number]).generate_state(1)[0]
    return Drawing.model_validate(values | {"seed": int(seed)})


def round_config(config: Config, folder: Path, number: int, parent: Run | None) -> Config:
    """The recipe of round `number`: its own pairs, from its parent's adapter, against the reference that was asked."""
    out = folder / f"round-{number}"
    values = config.model_dump(exclude_unset=True, exclude={"collect", "rounds"})
    for name in ("model", "data", "train", "optim"):
        values.setdefault(name, {})
    data = {k: v for k, v in values["data"].items() if k not in ("path", "split", "eval", "format", "columns")}
    values["data"] = data | {
        "path": str(out / "data" / "pairs.jsonl"),
        "eval_fraction": 0.0,
        "eval": _heldout_pairs_path(config),
    }
    values["train"]["seed"] = config.train.seed + number - 1
    values["out"] = str(out)
    if parent is not None:
        own = read_settings(parent.adapter).model_dump(exclude_none=True)
        values["lora"] = own | {"dropout": config.lora.dropout}
        values["model"]["adapter"] = str(parent.adapter)
        if config.rounds.reference == "first" and config.reference.model is None:
            first = {"model": config.model.path, "adapter": config.model.adapter}
            values["reference"] = values.get("reference", {}) | first
        if config.rounds.reference == "merged":
            merged = {"model": config.model.path, "adapter": str(out / MERGED)}
            values["reference"] = values.get("reference", {}) | merged
    if (every := config.rounds.every) is not None:
        # A piece of one schedule: constant within the piece, at the rate the whole one has where it begins.
        total = config.rounds.count * every
        config = settled(config, usual_rate(config, total), 1.0)  # probes are of one run, and pieces are too short
        rate = learning_rate(config.optim, (number - 1) * every, total)
        values["optim"] |= {"lr": rate, "schedule": "constant", "warmup": 0.0}
        values["train"] |= {"steps": every, "epochs": float(every)}
    return load_config(None, values)


def _heldout_pairs_path(config: Config) -> str | None:
    """Held-out pairs for the curves of a round, where `data.eval` has answers; online rounds are too short for them."""
    if config.rounds.every is not None or (named := heldout_source(config.data)) is None:
        return None
    return config.data.eval if named[0] == config.data.eval and holds_answers(config.data, *named) else None


def trained(run: Path) -> bool:
    """Whether a round's training is over."""
    files: Sequence[str] = ("adapters.safetensors", "adapter_config.json")
    return all((run / "adapter" / name).exists() for name in files)
