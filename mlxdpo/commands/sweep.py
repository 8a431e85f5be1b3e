"""`mlxdpo sweep [RECIPE.yaml] --loss.beta 0.05,0.1,0.3 --optim.lr auto,1e-4 --seeds 3 --out runs/sweep`"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import Config, load_config
from mlxdpo.runs import Run
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo_eval.sweep_results import SweepResults


def run(
    *words: Annotated[str, Parameter(name="RECIPE", allow_leading_hyphen=True)],
    out: Path,
    seeds: int = 1,
    answers: int = 50,
    json: bool = False,
) -> int:
    """Train a recipe under every combination of settings; report which are best and which are indistinguishable.

    Any setting of `mlxdpo train` is an option here, with one value or several: --loss.beta 0.05,0.1,0.3 (settings that
    are lists belong in the recipe). The runs share one data set, its encoding and the reference's log-probs. At each
    held-out evaluation from a quarter of its steps on, a run stops when it is significantly worse (99 %) than the best
    finished run of its seed at the same share of steps; a setting that lost gets no further seeds.

    Writes OUT/report.html, OUT/results.json and a run directory for each setting and seed. Rerunning the
    command keeps finished runs and resumes an interrupted one; a larger --seeds adds seeds.

    Args:
        words: YAML file with any settings of a run, and options such as --loss.beta 0.05,0.1.
        out: Folder of the sweep.
        seeds: Seeds for each combination: train.seed, train.seed + 1, ...
        answers: Held-out prompts that each finished run answers, to measure its KL to the reference; 0: none.
        json: Print the results as JSON.
    """
    from mlxdpo.commands import terminal
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.estimate.forecast import planned_steps
    from mlxdpo_eval.report.sweep import write_sweep
    from mlxdpo_eval.sweep import drift_of, plan_sweep, run_sweep

    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give 1 or more")
    recipe, settings = read_words(words)
    plan = plan_sweep(lambda given: load_config(recipe, given), settings, seeds, out, planned_steps)
    say = terminal.warn if json else lambda text: terminal.console.print(text, style="bold", markup=False)
    say(f"{len(plan.configs)} settings, {seeds} seeds; compared by held-out {plan.measure}")
    with stop_flag() as should_stop:
        done = run_sweep(plan, _trainer(json), should_stop, lambda found: drift_of(found, answers), say)
    if not done:
        terminal.warn("stopped; run the same command again to resume")
        return 130
    found = write_sweep(out)
    _show_sweep(found, out, json)
    return 0


def read_words(words: tuple[str, ...]) -> tuple[Path | None, dict[str, list[str]]]:
    """The recipe and the settings, each with its values. Raises `UserError` naming every option that is unknown."""
    from mlxdpo.commands.guesses import option_sentence
    from mlxdpo.io.settings import dotted_names

    recipe: Path | None = None
    settings: dict[str, list[str]] = {}
    left = list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--"):
            if recipe is not None:
                raise UserError(f"{name}: {recipe} is already the recipe; separate several values by commas: a,b")
            recipe = Path(name + equals + value)
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        setting = name.removeprefix("--").replace("-", "_")
        if setting in settings:
            raise UserError(
                f"{name} is given twice; separate its values by commas: {','.join(settings[setting])},{value}"
            )
        settings[setting] = _values_of(value)
    known = [f"--{name.replace('_', '-')}" for name in dotted_names(Config) if name != "out"]
    spelled = [f"--{setting.replace('_', '-')}" for setting in settings]
    if wrong := [word for word in spelled if word not in known]:
        raise UserError(*(option_sentence(word, known, "train") for word in wrong))
    return recipe, settings


def _values_of(text: str) -> list[str]:
    """The values between commas; a file whose name has a comma is one value."""
    values = [value.strip() for value in text.split(",")]
    return [text] if len(values) == 1 or os.path.exists(text) else [value for value in values if value]


def _trainer(quiet: bool) -> Any:
    from mlxdpo.commands.terminal import show_training
    from mlxdpo.commands.trackers import check_trackers, tracked
    from mlxdpo.estimate.forecast import check_fits
    from mlxdpo.inference.generate import generate
    from mlxdpo.training.run import train

    def one(config: Config, resume: Run | None, stop: Callable[[], bool]) -> Iterator[Any]:
        """One run, shown and tracked."""
        check_trackers(config)
        events = train(config, resume=resume, should_stop=stop, fits=check_fits, generate=generate)
        return tracked(events if quiet else show_training(events), config)

    return one


def _show_sweep(found: SweepResults, out: Path, json: bool) -> None:
    from rich.table import Column, Table

    from mlxdpo.commands.terminal import console
    from mlxdpo.io.json_file import read_json
    from mlxdpo_eval.report.sweep import SWEEP_COLUMNS, sweep_cells
    from mlxdpo_eval.sweep_results import sweep_sentence

    if json:
        print(jsonlib.dumps(read_json(out / "results.json"), ensure_ascii=False))
        return
    shown = ("setting", "held-out", "KL, nats an answer", "outcome")
    table = Table(*(Column(name, overflow="fold") for name in shown))
    for cells in sweep_cells(found):
        row = dict(zip(SWEEP_COLUMNS, cells, strict=True))
        table.add_row(*(row[name].replace("[", r"\[") for name in shown))
    console.print(table)
    console.print(sweep_sentence(found), style="bold", markup=False)
    console.print(f"report: {out / 'report.html'}  numbers: {out / 'results.json'}", markup=False)
