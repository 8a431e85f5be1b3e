"""The runs of a folder: which there are, what state each is in, how far and how good it is.

Only directories found here can be chosen: a name from the browser is looked up, never joined to a path, so that
anything else, `../` included, is not found. Links are not followed. One entry that cannot be read (a pipe, a folder in
place of a file, a name that is no text) is listed as unreadable, and the others as ever.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

import yaml

from mlxdpo.io.json_file import read_json
from mlxdpo.runs import Run
from mlxdpo.types import UserError


def runs_in(folder: Path) -> dict[str, Run]:
    """Name -> run of every run directory right below `folder`, the newest first."""
    found = {name: path for name, path in scan(folder).items() if "/" not in name and _settings(path) is not None}
    return {name: Run(found[name]) for name in sorted(found, key=lambda name: (-_changed(found[name]), name))}


def _changed(path: Path) -> float:
    file = path / "metrics.jsonl"
    return (file if isfile(file) else path / "config.yaml").stat().st_mtime


def tuned_runs_in(folder: Path) -> dict[str, Run]:
    """Those that have an adapter to answer with."""
    return {n: run for n, run in runs_in(folder).items() if isfile(run.adapter / "adapters.safetensors")}


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
    near = _folders_in(runs)
    found = [path for path in near if os.path.lexists(path / "config.yaml") or os.path.lexists(path / JOB / "job.json")]
    found += [path for one in near for path in _folders_in(one) if os.path.lexists(path / "config.yaml")]
    ordered = sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))
    return {_readable_name(path.relative_to(runs)): path for path in ordered}


def _folders_in(folder: Path) -> list[Path]:
    """Folders right below another; links are none, and one that may not be read has none."""
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _readable_name(path: Path) -> str:
    """A path as a page can show it: bytes that are no UTF-8 have a sign in their place."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def choose(runs: Path, name: str | None) -> Path:
    """The run called `name`. Raises `UserError` for anything that `scan` does not find."""
    found = scan(runs)
    if not name or name not in found:
        raise UserError(f"there is no run {name or ''!r} in {runs}; choose one from the list, or reload it")
    return found[name]


def state(path: Path) -> str:
    """starting, training, finished, interrupted, failed or unreadable. Asks the locks, so a killed process is never
    "training"."""
    known = os.path.lexists(path / "config.yaml")
    if known and _settings(path) is None:
        return "unreadable"
    if known and Run(path).held():
        return "training"
    if busy(path / JOB / "lock"):
        return "starting"
    if isfile(path / "adapter" / "adapters.safetensors"):
        return "finished"
    return "interrupted" if known else "failed"


def busy(lock: Path) -> bool:
    """Whether a process holds this lock file."""
    if not isfile(lock):
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def figures(name: str, path: Path) -> dict[str, Any]:
    """A run by the columns of `HEADERS`; of a long `metrics.jsonl` only the end is read.

    Accuracy is the share of held-out pairs ranked right at the newest evaluation, the win-rate the share of pairs of
    answers in which the first judge prefers the tuned one; None where it was not measured (yet).
    """
    settings = raw_settings(path)
    last, held = newest(path / "metrics.jsonl")
    values = (
        name,
        state(path),
        _source_name(settings.get("model")),
        _source_name(settings.get("data")),
        int(last.get("step", 0)),
        number_in(last, "loss"),
        number_in(held, "eval_rewards/accuracies"),
        newest_winrate(path),
    )
    return dict(zip(HEADERS, values, strict=True))


FORMS = {"loss": "{:.4f}", "held-out accuracy": "{:.1%}", "win-rate": "{:.1%}"}


def formatted_row(row: Mapping[str, Any]) -> list[str]:
    """`figures` as text, a dash where there is none."""
    return [_formatted(row[name], FORMS[name]) if name in FORMS else str(row[name]) for name in HEADERS]


def summary(name: str, path: Path) -> list[str]:
    """A run in one line of text, for the columns of `HEADERS`."""
    return formatted_row(figures(name, path))


def raw_settings(path: Path) -> dict[str, Any]:
    """config.yaml as it stands: a run of another version is listed even where today's schema refuses it."""
    return _settings(path) or {}


def _settings(path: Path) -> dict[str, Any] | None:
    """config.yaml as it stands; None where it cannot be read, or the run's name is no text."""
    file = path / "config.yaml"
    try:
        path.name.encode()
        if not isfile(file):
            return None
        status = file.stat()
        return _parsed_settings(file, status.st_mtime_ns, status.st_size, status.st_ino)
    except (OSError, UnicodeEncodeError):
        return None


@functools.lru_cache(maxsize=4096)
def _parsed_settings(file: Path, *stamp: int) -> dict[str, Any] | None:
    """The page looks every two seconds, and YAML is slow to read."""
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError):  # ValueError: no UTF-8, a date with a month 13
        return None
    return found if isinstance(found, dict) else None


def _source_name(section: Any) -> str:
    where = section.get("path") if isinstance(section, Mapping) else section
    return Path(where).name if isinstance(where, str) else "–"


def newest(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step's line and the last evaluation's, each empty when there is none near the end of the file."""
    last: dict[str, Any] = {}
    held: dict[str, Any] = {}
    if not isfile(file):
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


def newest_winrate(path: Path) -> float | None:
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


def refuse_strange_code(path: Path, command: Sequence[str]) -> None:
    """Raise `UserError` for a run whose model brings Python code: the page starts nothing that executes it."""
    model = raw_settings(path).get("model")
    if isinstance(model, dict) and model.get("trust_remote_code"):
        raise UserError(
            f"{path.name} runs Python code that comes with its model; use a terminal: {shlex.join(command)}"
        )
