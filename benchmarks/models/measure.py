"""One architecture: a tiny model that transformers saved, loaded by mlx-lm alone and by us, against torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.models.tiny import pairs, tiny_model, torch_logps
from mlxdpo.inference.trained_run import model_logps
from mlxdpo.model.policy import load_folder
from mlxdpo.types import Example, UserError

EQUAL = 1e-3  # nats a completion

Verdict = Literal["equal", "normalised", "refused", "different", "not tried"]


class Comparison(NamedTuple):
    """How an architecture compares. `gap` is the largest difference of a completion's log-prob, nats.

    `alone` is what mlx-lm by itself makes of the same folder: the difference, or its error. Up to `longest` tokens the
    rows were compared; beyond, they are refused.
    """

    kind: str
    verdict: Verdict
    gap: float | None = None
    alone: str = ""
    longest: int | None = None
    note: str = ""


def compare(kind: str, changes: Mapping[str, Any] = {}) -> Comparison:
    """Build, save, load twice, and compare."""
    try:
        theirs = tiny_model(kind, changes)
        wanted = np.array([[torch_logps(theirs, p, c), torch_logps(theirs, p, r)] for p, c, r in pairs()])
    except Exception as error:  # what transformers makes of a tiny config is anything
        return Comparison(kind, "not tried", note=f"transformers cannot run a tiny one here: {_first(error)}")
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(name)
        del theirs
        alone = _gap_or_error(lambda: _by_mlx_lm(Path(name)), wanted)
        try:
            model, _, reading = load_folder(Path(name), kind)
            model.train()
            fits = [i for i, (p, c, r) in enumerate(pairs()) if _fits(reading.longest, p, c, r)]
            gap = _gap(model, wanted, fits)
        except UserError as error:
            note = str(error).removeprefix(f"{kind}: ").partition("; docs/models.md")[0]
            return Comparison(kind, "refused", alone=alone, note=note)
        except Exception as error:  # a traceback is what this is to find
            return Comparison(kind, "different", alone=alone, note=f"{type(error).__name__}: {_first(error)}")
    verdict: Verdict = "different"
    if gap <= EQUAL:
        verdict = "equal" if _is_small(alone) and reading.longest is None else "normalised"
    why = "" if reading.longest is None else f"rows up to {reading.longest} tokens: beyond, {reading.why}"
    return Comparison(kind, verdict, gap, alone, reading.longest, why)


def _fits(longest: int | None, prompt: list[int], *completions: list[int]) -> bool:
    return longest is None or len(prompt) + max(map(len, completions)) <= longest


def _by_mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(folder, lazy=True)[0]


def _gap(model: Any, wanted: np.ndarray, which: list[int]) -> float:
    rows = [Example(*(np.array(part, np.int32) for part in pairs()[i]), where=str(i)) for i in which]
    found = model_logps(model, rows, "prompt", 4)
    return float(np.abs(found.T - wanted[which]).max())


def _gap_or_error(load: Callable[[], Any], wanted: np.ndarray) -> str:
    try:
        model = load()
        model.train()
        return f"{_gap(model, wanted, list(range(len(wanted)))):.1e}"
    except (Exception, SystemExit) as error:  # mlx-lm's olmo ends the process
        return f"{type(error).__name__}: {_first(error)}"


def _is_small(alone: str) -> bool:
    try:
        return float(alone) <= EQUAL
    except ValueError:
        return False


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:140]
