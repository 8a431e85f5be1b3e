"""The story of rounds: collect, train, measure, weigh; again, until they are done or the judge is being gamed.

Every stage leaves a file that appears whole, and a stage whose file is there is not done again: whoever is killed
anywhere goes on from there. With `rounds.every` the rounds are short and the optimizer goes on between them: online
DPO on the policy's own answers (arXiv 2402.04792), its pairs `every` steps old at most.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxdpo.config import Config, Drawing
from mlxdpo.inference.trained_run import ModelContext, TrainedRun
from mlxdpo.io.atomic import write_json
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.io.staging import single_process
from mlxdpo.model.adapters import adapters_off, load_run, read_settings
from mlxdpo.online.collect.run import report_file
from mlxdpo.online.partial_output import LOCK
from mlxdpo.online.prompts import Asked, PolicySource, Prompts, as_rows, source_of, start_source
from mlxdpo.online.rounds import plan
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.types import Event, Preference

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

    Raises `UserError` as `plan.check_rounds`, `plan.begin_rounds`, `plan.split_prompts` and the stages do.
    """
    plan.check_rounds(config)
    prompts, heldout = plan.split_prompts(config)
    folder = plan.begin_rounds(config)
    config = config.model_copy(update={"out": str(folder)})
    yield Event("begin", 0, {"folder": folder, "prompts": len(prompts.asked), "heldout": len(heldout)})
    with single_process(folder / LOCK, f"{folder}: another process is at these rounds; stop it first, or wait"):
        measured = [_measure_once(folder / plan.START, lambda: open_start(config, folder), heldout, hands, None)]
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
        drawing = plan.drawing_of(self.config, self.number)
        asked = plan.prompts_of(self.config, prompts, self.number)
        yield from hands.gather(self._source, asked, drawing, self.pairs, should_stop)

    def _source(self) -> PolicySource:
        return start_source(self.config, "start") if self.parent is None else source_of(self.parent)

    def train(self, hands: Stages, should_stop: Stop) -> Iterator[Event]:
        """The round's own training, from its last checkpoint if it has one."""
        if plan.trained(self.path):
            return
        resume = Run.open(self.path) if (self.path / "config.yaml").exists() else None
        config = resume.config() if resume else plan.round_config(self.config, self.folder, self.number, self.parent)
        online = self.config.rounds.every is not None
        warm = checkpoint.steps(self.parent.checkpoints)[-1] if online and self.parent is not None else None
        yield from hands.train(config, resume, warm, should_stop)


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
    write_json(folder / plan.RESULTS, found)


def _free_memory() -> None:
    """The weights of a finished stage are gone before the next one loads its own."""
    gc.collect()
    mx.clear_cache()
