"""The runs of a folder: which there are, what state each is in, how far and how good it is.

Only directories found here can be chosen: a name from the browser is looked up, never joined to a path, so that
anything else, `../` included, is not found.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlxdpo.io.json_file import read_json
from mlxdpo.runs import Run
from mlxdpo.types import UserError


def runs_in(folder: Path) -> dict[str, Run]:
    """Name -> run of every run directory right below `folder`, the newest first."""
    found = [path.parent for path in folder.glob("*/config.yaml")] if folder.is_dir() else []
    return {path.name: Run(path) for path in sorted(found, key=lambda path: (-_changed(path), path.name))}


def _changed(path: Path) -> float:
    file = path / "metrics.jsonl"
    return (file if file.exists() else path / "config.yaml").stat().st_mtime


def tuned_runs_in(folder: Path) -> dict[str, Run]:
    """Those that have an adapter to answer with."""
    return {n: run for n, run in runs_in(folder).items() if (run.adapter / "adapters.safetensors").exists()}


def run_named(folder: Path, name: str | None) -> Run:
    """The run of that name. Raises `UserError` when the scan does not find it."""
    found = runs_in(folder)
    if not name:
        raise UserError("no run is chosen; make one with `mlxdpo demo` or in the Train tab, then reload this page")
    if name not in found:
        raise UserError(f"no run called {name!r} in {folder.name}/; there are {', '.join(found) or 'none'}")
    return found[name]


JOB = "job"
"""The subdirectory in which the page keeps what it needs of a training that it started: lock, command, log."""

LARGEST = 1e15  # no measure or step is anywhere near it, and a chart of more is none
TAIL = 256 * 1024  # bytes at the end of metrics.jsonl in which the newest step and evaluation are looked for
HEADERS = ("run", "state", "model", "data", "steps", "loss", "held-out accuracy", "win-rate")


def _formatted(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def scan(runs: Path) -> dict[str, Path]:
    """Run directories below `runs`, one or two levels down, newest first, by their name relative to it."""
    found = [path.parent for path in (*runs.glob("*/config.yaml"), *runs.glob("*/*/config.yaml"))]
    found += [path.parent.parent for path in runs.glob(f"*/{JOB}/job.json")]
    ordered = sorted(set(found), key=lambda path: (-path.stat().st_mtime, path.name))
    return {path.relative_to(runs).as_posix(): path for path in ordered if not path.is_symlink()}


def choose(runs: Path, name: str | None) -> Path:
    """The run called `name`. Raises `UserError` for anything that `scan` does not find."""
    found = scan(runs)
    if not name or name not in found:
        raise UserError(f"there is no run {name or ''!r} in {runs}; choose one of the list, or reload it")
    return found[name]


def state(path: Path) -> str:
    """starting, training, finished, interrupted or failed. Asks the locks, so a killed process is never "training"."""
    known = (path / "config.yaml").exists()
    if known and Run(path).held():
        return "training"
    if busy(path / JOB / "lock"):
        return "starting"
    if (path / "adapter" / "adapters.safetensors").exists():
        return "finished"
    return "interrupted" if known else "failed"


def busy(lock: Path) -> bool:
    """Whether a process holds this lock file."""
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def summary(name: str, path: Path) -> list[str]:
    """A run in one line of text, for the columns of `HEADERS`; of a long `metrics.jsonl` only the end is read.

    Accuracy is the share of held-out pairs ranked right at the newest evaluation, the win-rate the share of pairs of
    answers in which the first judge prefers the tuned one; a dash where it was not measured (yet).
    """
    settings = raw_settings(path)
    last, held = newest(path / "metrics.jsonl")
    return [
        name,
        state(path),
        _source_name(settings.get("model")),
        _source_name(settings.get("data")),
        str(int(last.get("step", 0))),
        _formatted(number_in(last, "loss"), "{:.4f}"),
        _formatted(number_in(held, "eval_rewards/accuracies"), "{:.1%}"),
        _formatted(winrate(path), "{:.1%}"),
    ]


def raw_settings(path: Path) -> dict[str, Any]:
    """config.yaml as it stands: a run of another version is listed even where today's schema refuses it."""
    file = path / "config.yaml"
    if not file.exists():
        return {}
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError):  # ValueError: no UTF-8, a date with a month 13
        return {}
    return found if isinstance(found, dict) else {}


def _source_name(section: Any) -> str:
    where = section.get("path") if isinstance(section, Mapping) else section
    return Path(where).name if isinstance(where, str) else "–"


def newest(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step's line and the last evaluation's, each empty when there is none near the end of the file."""
    last: dict[str, Any] = {}
    held: dict[str, Any] = {}
    if not file.exists():
        return last, held
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL))
        lines = stream.read().split(b"\n")
    whole = lines[:-1] if size <= TAIL else lines[1:-1]  # a cut first line, a torn last one
    for line in reversed(whole):
        values = sound(line) or {}
        if not last and "loss" in values:
            last = values
        if not held and "eval_loss" in values:
            held = values
        if last and held:
            break
    return last, held


def sound(line: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl` that is as the trainer writes them: a whole step, finite numbers. None for others."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("resumed_from", values.get("step")), int):
        return None
    numbers = (value for value in values.values() if isinstance(value, int | float))
    return values if all(-LARGEST < number < LARGEST for number in numbers) else None


def number_in(values: Mapping[str, Any], name: str) -> float | None:
    """The number under a name, None where there is none."""
    value = values.get(name)
    return value if isinstance(value, int | float) else None


def winrate(path: Path) -> float | None:
    """The first judge's win-rate at the newest evaluation; None where there is none, or its file is damaged."""
    try:
        rate = newest_evaluation(path)["winrates"][0]["rate"]
    except (UserError, KeyError, IndexError, TypeError):  # the Evaluation tab says what is wrong with the file
        return None
    return rate if isinstance(rate, int | float) else None


def newest_evaluation(path: Path) -> dict[str, Any]:
    """The newest results file of `mlxdpo eval`, empty without one. Raises `UserError` for a damaged one."""
    files = sorted((path / "eval").glob("results_*.json"))
    return read_json(files[-1]) if files else {}


def summary_rows(runs: Path) -> list[list[str]]:
    """All runs as rows of text."""
    return [summary(name, path) for name, path in scan(runs).items()]
