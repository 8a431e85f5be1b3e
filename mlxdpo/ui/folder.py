"""The folder of runs that the page shows: everything the page opens is found by scanning it, nothing by its path.

What a browser sends is a name from this list; anything else, `../` included, is not found.
"""

from __future__ import annotations

from pathlib import Path

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
