"""What the page offers to choose from: models, data files, recipes, adapters: found by looking, never by a typed path.

A value that comes back from the browser must be one of these, or the id of something on the Hugging Face Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.resources import files
from os.path import isfile
from pathlib import Path

from mlxdpo.io.names import HUB_ID
from mlxdpo.types import UserError
from mlxdpo.ui.runs.run_list import JOB, raw_settings, scan

DEPTH = 3  # folders below the working folder
MOST = 2_000  # folders that are looked into
DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".ndjson.gz", ".csv.gz", ".tsv.gz")
FINDINGS = ".audit.jsonl"
NOT_DATA = {"metrics.jsonl", "votes.jsonl", "talks.jsonl"}
SKIPPED = {"node_modules", "site-packages", "__pycache__", "checkpoints", "adapter", "eval", "samples", JOB}
HUB_DATA = re.compile(rf"{HUB_ID.pattern}(:[\w-][\w.-]*)?", re.ASCII)
NOTHING = re.compile(r"(?!)")  # matches no text: only what was offered will do
DEMO = "the demo's recipe"


def folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders up to `DEPTH` below `top`, each with its files' names; not hidden ones, links, or the insides of runs."""
    for count, (where, below, names) in enumerate(os.walk(top)):
        place = Path(where)
        if count >= MOST:
            return
        deep = len(place.relative_to(top).parts) >= DEPTH
        below[:] = [] if deep else sorted(n for n in below if n[0] != "." and n not in SKIPPED and _is_text(n))
        yield place, sorted(name for name in names if _is_text(name))  # what is no text cannot be on a page


def _is_text(name: str) -> bool:
    return name == name.encode("utf-8", "ignore").decode()


def data_files(runs: Path, top: Path) -> list[str]:
    """Data files below `top`, and those that the runs' recipes name (a Hub id among them)."""
    found = [
        _spelled(folder / name, top)
        for folder, names in folders(top)
        for name in names
        if name.lower().endswith(DATA)
        and not name.endswith(FINDINGS)
        and name not in NOT_DATA
        and isfile(folder / name)
    ]
    for path in scan(runs).values():
        section = raw_settings(path).get("data")
        section = section if isinstance(section, dict) else {"path": section}
        for value in (section.get("path"), section.get("eval")):
            if isinstance(value, str) and (isfile(value) or HUB_DATA.fullmatch(value)):
                found.append(value)
        found += [_spelled(file, top) for file in sorted((path / "data").glob("*.jsonl")) if isfile(file)]
    return list(dict.fromkeys(found))


def models(runs: Path, top: Path) -> list[str]:
    """The built-in model, model folders below `top`, and what the runs started from."""
    found = ["smollm2"]
    for folder, names in folders(top):
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            found.append(_spelled(folder, top))
    for path in scan(runs).values():
        section = raw_settings(path).get("model")
        value = section.get("path") if isinstance(section, dict) else section
        if isinstance(value, str) and (os.path.isdir(value) or HUB_ID.fullmatch(value)):
            found.append(value)
    return list(dict.fromkeys(found))


def adapters(runs: Path) -> list[str]:
    """The final adapters of the runs."""
    return [str(p / "adapter") for p in scan(runs).values() if isfile(p / "adapter" / "adapters.safetensors")]


def recipes(runs: Path, top: Path) -> dict[str, Path]:
    """Recipes by what they are called: the demo's, YAML files near `top` that look like one, the runs' settings."""
    found = {DEMO: Path(str(files("mlxdpo.demo").joinpath("recipe.yaml")))}
    for folder, names in folders(top):
        if len(folder.relative_to(top).parts) < DEPTH and "manifest.json" not in names:
            yamls = [folder / name for name in names if name.endswith((".yaml", ".yml"))]
            found |= {_spelled(file, top): file for file in yamls if _is_recipe(file)}
    for name, path in scan(runs).items():
        if raw_settings(path):
            found[f"as in run {name}"] = path / "config.yaml"
    return found


def _is_recipe(file: Path) -> bool:
    if not isfile(file):  # a pipe would be waited for
        return False
    with file.open("rb") as stream:
        head = stream.read(4096).decode("utf-8", errors="replace")
    return bool(re.search(r"^(model|data|loss|lora|optim|train)\s*:", head, re.MULTILINE))


def _spelled(path: Path, top: Path) -> str:
    """As a user in `top` would write it."""
    return path.relative_to(top).as_posix() if path.is_relative_to(top) else str(path)


def checked_choice(value: str | None, offered: list[str], what: str, pattern: re.Pattern[str]) -> str | None:
    """`value` when it was offered or is a Hub id; None for nothing. Raises `UserError` for everything else.

    An id that is also a path here is a path, and was not offered.
    """
    value = (value or "").strip()
    if not value:
        return None
    if value in offered:
        return value
    if pattern.fullmatch(value) and ".." not in value and not os.path.lexists(value):
        return value
    raise UserError(f"{what} {value[:80]!r} is neither in the list nor a Hub id (owner/name); choose one from the list")
