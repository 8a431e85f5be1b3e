"""The demo's data and recipe: bundled pairs, as they are or with the labels of a control.

Two controls show that what the demo measures comes from the preferences: shuffled labels must change nothing, flipped
labels must turn the change round.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mlxdpo.config import Config, load_config
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.io.json_file import read_lines
from mlxdpo.types import UserError
from mlxdpo_eval.results import write_lines

Row = dict[str, Any]
Labels = Callable[[list[Row], int], list[Row]]

SHUFFLE = 1_000_003  # any number that no run has for its seed
HERE = resources.files("mlxdpo.demo")


def bundled_labels(rows: list[Row], seed: int) -> list[Row]:
    """The bundled pairs."""
    return rows


def flipped(rows: list[Row], seed: int) -> list[Row]:
    """Control: chosen and rejected exchanged in every pair."""
    return [_swap(row) for row in rows]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Control: chosen and rejected exchanged in a random half of the pairs."""
    # A stream of its own: `default_rng(seed)` gives the very permutation that orders the first epoch (NumPy takes the
    # seeds 0 and [0, 0] for the same), so half the epoch would be flipped first.
    half = set(np.random.default_rng([SHUFFLE, seed]).permutation(len(rows))[: len(rows) // 2].tolist())
    return [_swap(row) if i in half else row for i, row in enumerate(rows)]


def _swap(row: Row) -> Row:
    other = {"chosen": "rejected", "rejected": "chosen"}
    names = {f"{stem}_{side}": f"{stem}_{other[side]}" for stem in ("score", "finish") for side in other}
    return {name: row[(other | names).get(name, name)] for name in row}


def prepare_demo(out: Path, seed: int, labels: Labels) -> Config:
    """Write the demo's pairs, held-out pairs and prompts into `out` and return the run's configuration.

    Raises `UserError` when `out` holds a run already, or a judge is not installed.
    """
    if (out / "config.yaml").exists():
        raise UserError(f"{out} already holds a run; choose another --out")
    for judge in REWARDS.values():
        judge("fine")
    pairs = labels(bundled("pairs"), seed)
    for name, rows in (("pairs", pairs), ("heldout", bundled("heldout")), ("prompts", bundled("prompts"))):
        write_lines(out / "data" / f"{name}.jsonl", rows)
    data = {"path": str(out / "data" / "pairs.jsonl"), "eval": str(out / "data" / "heldout.jsonl")}
    with resources.as_file(HERE / "recipe.yaml") as recipe:
        return load_config(recipe, {"data": data, "train": {"seed": seed}, "out": str(out)})


def bundled(name: str) -> list[Row]:
    """A data file that ships with the demo: "pairs", "heldout" or "prompts"."""
    with resources.as_file(HERE / f"{name}.jsonl") as file:
        return list(read_lines(file))
