"""`mlxdpo runs [FOLDER] [--by COLUMN]` and `mlxdpo runs diff RUN_A RUN_B`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlxdpo.runs import Run
from mlxdpo.types import UserError

By = Literal["newest", "name", "steps", "loss", "accuracy", "win-rate"]


def list_runs(folder: Path = Path("runs"), /, *, by: By = "newest", json: bool = False) -> None:
    """List the runs of a folder, one or two levels down: state, model, data, steps, newest held-out figures.

    Args:
        folder: Folder with run directories.
        by: Order: newest first; name and loss upwards; steps, held-out accuracy and win-rate downwards.
        json: Print them as JSON.
    """
    from rich.table import Column, Table

    from mlxdpo.commands.terminal import console
    from mlxdpo.ui.runs.run_list import HEADERS, figures, formatted_row, scan

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; mlxdpo train writes runs/")
    rows = _ordered([figures(name, path) for name, path in scan(folder).items()], by)
    if json:
        print(jsonlib.dumps(rows, ensure_ascii=False))
        return
    if not rows:
        console.print(f"no runs in {folder}")
        return
    table = Table(*(Column(name, overflow="fold") for name in HEADERS))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in formatted_row(row)))
    console.print(table)


def _ordered(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Sorted by a column; runs without a figure there come last."""
    if by == "newest":
        return rows
    column = {"name": "run", "accuracy": "held-out accuracy"}.get(by, by)
    known, unknown = [r for r in rows if r[column] is not None], [r for r in rows if r[column] is None]
    return [*sorted(known, key=lambda row: row[column], reverse=by not in ("name", "loss")), *unknown]


def diff(first: Path, second: Path, /, *, json: bool = False) -> None:
    """Show the settings, model, data and versions in which two runs differ.

    Args:
        first: Run directory.
        second: Run directory.
        json: Print name, first and second as JSON.
    """
    from rich.table import Table

    from mlxdpo.commands.terminal import console

    found = run_differences(Run.open(first), Run.open(second))
    if json:
        print(jsonlib.dumps(found, ensure_ascii=False))
        return
    if not found:
        console.print("no difference in settings, model, data or versions")
        return
    table = Table("", str(first), str(second))
    for name, (a, b) in found.items():
        table.add_row(name, *(jsonlib.dumps(value, ensure_ascii=False).replace("[", r"\[") for value in (a, b)))
    console.print(table)


SAME_AS_SETTINGS = ("template", "data.reports")  # long texts, which follow from what is shown


def run_differences(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> the two values, of settings and of the manifests; not the location of the runs."""
    sides = []
    for run in (first, second):
        settings = run.config().model_dump(mode="json", exclude={"out"})
        manifest = run.manifest() if (run.path / "manifest.json").exists() else {}
        made = {f"manifest.{name}": value for name, value in _dotted(manifest).items()}
        sides.append(_dotted(settings) | made)
    names = dict.fromkeys([*sides[0], *sides[1]])
    hidden = tuple(f"manifest.{name}" for name in SAME_AS_SETTINGS)
    pairs = {n: (sides[0].get(n), sides[1].get(n)) for n in names if not n.startswith(hidden)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _dotted(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _dotted(value, f"{before}{name}.") if isinstance(value, Mapping) and value else {before + name: value}
    return found
