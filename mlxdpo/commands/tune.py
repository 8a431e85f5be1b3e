"""`mlxdpo tune PAIRS [--model M] [--time 1h] [--judge J]`: from pairs to a verdict in one command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mlxdpo.runs import Run
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlxdpo.config import Config

SECONDS = {"s": 1, "m": 60, "h": 3600}


def run(
    pairs: str,
    /,
    *,
    model: Annotated[str, Parameter(name=["--model.path", "--model"])] = "smollm2",
    time: str = "1h",
    judge: list[str] | None = None,
    eval_file: Annotated[str | None, Parameter(name="--data.eval")] = None,
    eval_fraction: Annotated[float | None, Parameter(name="--data.eval-fraction")] = None,
    out: Path | None = None,
    no_open: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Tune a model on preference pairs and evaluate it: check, plan, probe, train, evaluate, report.

    It chooses the learning rate, the number of epochs and what fits into memory. RUN/config.yaml holds what it chose;
    `mlxdpo train RUN/config.yaml --out OTHER` repeats it.

    Args:
        pairs: File, folder or Hub dataset id with preference pairs.
        model: Hub id, Hugging Face folder, or smollm2.
        time: Maximum training time: 90m, 1h, 45s; steps are reduced to fit.
        judge: Judge that compares answers before and after, as for `mlxdpo eval`; repeatable; default: length.
        eval_file: Held-out pairs; unset means a share of the prompts of PAIRS is held out.
        eval_fraction: That share; default: 0.1.
        out: Run directory; unset means a new one below runs/, named after model and data.
        no_open: Do not open the report in a browser.
    """
    from mlxdpo.commands import data_check, train
    from mlxdpo.commands.data_check import CheckConfig
    from mlxdpo.commands.terminal import console, introduce_model
    from mlxdpo.config import load_config

    held = {"eval": eval_file, "eval_fraction": eval_fraction}
    data = {"path": pairs} | {name: value for name, value in held.items() if value is not None}
    length = {"minutes": minutes_of(time)}
    config = load_config(
        None, {"model": model, "data": data, "train": length, "out": None if out is None else str(out)}
    )
    console.print("1/4 the data", style="bold")
    if status := data_check.run(pairs, config=CheckConfig(data=config.data, model=config.model)):
        return status
    console.print("\n2/4 the plan", style="bold")
    config = fitting_config(config)
    console.print("\n3/4 training", style="bold")
    finished: list[tuple[Run, Mapping[str, float]]] = []
    keep = lambda done, last: finished.append((done, last))  # noqa: E731
    if status := train.follow_training(config, None, finish=keep, introduce=introduce_model):
        return status
    console.print("\n4/4 the evaluation", style="bold")
    return say_what_came_out(*finished[0], judge or [], no_open)


def minutes_of(time: str) -> float:
    """The minutes of 90m, 1h, 1h30m or 45s. Raises `UserError` for other text."""
    found = re.findall(r"(\d+(?:\.\d+)?)([smh])", time)
    if not found or "".join(map("".join, found)) != time:
        raise UserError(f"--time {time}: expected a length such as 45m, 1h or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, unit in found) / 60


def fitting_config(recipe: Config) -> Config:
    """The recipe, with gradient checkpointing where it does not fit into this machine's memory without."""
    from mlxdpo.commands.plan import show_forecast
    from mlxdpo.commands.terminal import console
    from mlxdpo.estimate.forecast import CannotPlan, forecast

    try:
        found = forecast(recipe)
        if not found.fits:
            smaller = recipe.train.model_copy(update={"gradient_checkpointing": True})
            recipe = recipe.model_copy(update={"train": smaller})
            found = forecast(recipe)
    except CannotPlan as unknown:
        console.print(f"{unknown}", style="yellow", markup=False)
        return recipe
    show_forecast(found)
    return recipe


def say_what_came_out(run: Run, heldout: Mapping[str, float], judges: list[str], no_open: bool) -> int:
    """Evaluate, write the report, and end with how much changed, whether it is better and what to do next."""
    from mlxdpo.commands import eval as evaluation
    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.outcome import measure_outcome, outcome_sentences

    outcome = measure_outcome(run, console.print)
    status = evaluation.run(run.path, judge=judges or ["longest"])
    console.print()
    for sentence in outcome_sentences(outcome, heldout, run)[:2]:
        console.print(sentence, style="bold", markup=False)
    for command, reason in next_commands(run, outcome.changed, judges):
        console.print(f"next: {command}   ({reason})", style="bold", markup=False)
    if not no_open:
        import webbrowser

        webbrowser.open((run.path / "report.html").resolve().as_uri())
    return status


def next_commands(run: Run, changed: int, judges: list[str]) -> list[tuple[str, str]]:
    """The commands that follow and why: train for longer if nothing changed, otherwise look at it and export it."""
    if not changed:
        from mlxdpo_eval.outcome import longer

        return [(f"mlxdpo train --resume {run.path} {longer(run)}", "no answer changed")]
    votes = "try it" if judges else "blind votes: length does not measure quality"
    return [
        (f"mlxdpo app {run.path}", votes),
        (f"mlxdpo export {run.path} --to mlx,hf --out exported", "take it away"),
    ]
