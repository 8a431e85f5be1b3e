"""A folder of tiny finished runs for the app's tests, and the app's pieces over it."""

from pathlib import Path

from tiny_runs import recipe, trained_once

from mlxdpo.runs import Run
from mlxdpo.ui.compare.answers import Settings
from mlxdpo.ui.engine import AppState

SHORT = Settings(max_tokens=8, temperature=1.0, seed=3)


def finished_run(folder: Path, name: str = "one", **sections) -> Run:
    """A run under folder/runs, moved far enough to say other things, with about half of its prompts held out."""
    data, lora, optim = ({"eval_fraction": 0.5}, {"scale": 20.0}, {"lr": 3e-2})
    parts = {"data": data, "lora": lora, "optim": optim}
    merged = {key: parts.get(key, {}) | sections.get(key, {}) for key in parts.keys() | sections.keys()}
    return trained_once(folder, recipe(folder, f"runs/{name}", **merged))


def desk_over(folder: Path) -> AppState:
    """The app's desk over folder/runs."""
    return AppState(folder / "runs")
