"""Checkpoints: a folder that appears whole or not at all, from which a run goes on to the bit.

Every file in it has a checksum (`io.checksum`): one that was damaged since is refused, never trained on.

step-000200/ adapters.safetensors  adapter_config.json  optimizer.safetensors  state.json
             reference.safetensors, where the reference moves
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo.config import LoraConfig
from mlxdpo.io.atomic import new_folder, sync_folder
from mlxdpo.io.checksum import load_checksummed, read_checksummed_json, save_checksummed, write_checksummed_json
from mlxdpo.io.json_file import as_written
from mlxdpo.model.adapters import load_arrays, save_adapter
from mlxdpo.types import UserError


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two optimizer steps. Data order and dropout follow from seed and step alone."""

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    sound_step: int | None = None  # the last look at answers that showed no collapse
    collapsed: bool = False  # and whether the one after it did


def save(
    folder: Path,
    model: nn.Module,
    lora: LoraConfig,
    optimizer: optim.Optimizer,
    progress: Progress,
    more: Callable[[Path], None] = lambda draft: None,
) -> Path:
    """Write step-N below `folder`; readers see it complete or not at all. Returns its path.

    `more` writes what else belongs to the run's state at this step (a moving reference) into the draft.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder_of(folder, progress.step)
    if target.exists():  # reached again after a resume: the same numbers, to the bit
        return target
    draft = new_folder(folder, ".draft-")
    try:
        save_adapter(model, lora, draft)
        save_checksummed(draft / "optimizer.safetensors", dict(tree_flatten(optimizer.state)))
        more(draft)
        write_checksummed_json(draft / "state.json", asdict(progress))
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(folder)
    return target


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of `folder_of`'s name."""
    return int(checkpoint.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what else is kept beside them under a longer name is none of ours."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def prune(folder: Path, keep: int, others: Collection[int | None], every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `others`.

    What was saved by the clock (its step is no multiple of `every`) is only kept while it is the newest.
    """
    older = steps(folder)[:-1]
    kept = [path for path in older if step_of(path) % every == 0][::-1][: keep - 1]
    for old in (path for path in older if path not in kept and step_of(path) not in others):
        shutil.rmtree(old.rename(folder / f".draft-{old.name}"))  # a step-N is whole until it is gone


class SaveClock:
    """Says when `minutes` have passed since the last checkpoint, or since it was made; never with 0."""

    def __init__(self, minutes: float):
        self.seconds, self.saved = minutes * 60, time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.seconds > 0 and time.perf_counter() - self.saved >= self.seconds

    def restart(self) -> None:
        """A checkpoint was written."""
        self.saved = time.perf_counter()


def remove_unfinished(run: Path) -> None:
    """Remove what a killed run left half done below its directory. Only at the start: nobody else writes there then."""
    for draft in (run / "checkpoints").glob(".draft-*"):
        shutil.rmtree(draft)
    for folder in (run, run / "adapter"):
        for name in ("config", "paths", "continued", "manifest", "adapters", "adapter_config"):
            for unfinished in folder.glob(f".{name}-*"):
                unfinished.unlink()


def restore(checkpoint: Path, model: nn.Module, optimizer: optim.Optimizer) -> Progress:
    """Bring model and optimizer back to a checkpoint's state, to the bit.

    Raises `UserError` for a file that is missing or damaged, with what to go on from instead.
    """
    try:
        progress = read_progress(checkpoint)
        load_arrays(model, checkpoint)
        restore_optimizer(checkpoint, optimizer)
    except UserError as error:
        before = [path.name for path in steps(checkpoint.parent) if path < checkpoint]
        instead = f"from {before[-1]}" if before else "from the start"
        raise UserError(f"{error}; or remove the folder {checkpoint.name}, and the run resumes {instead}") from None
    return progress


def restore_optimizer(checkpoint: Path, optimizer: optim.Optimizer) -> None:
    """The optimizer alone: its moments, and how many updates they have seen."""
    saved = load_checksummed(checkpoint / "optimizer.safetensors")
    optimizer.state = tree_unflatten(list(saved.items()))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood when the checkpoint was written. Raises `UserError` for a damaged `state.json`."""
    found = read_checksummed_json(checkpoint / "state.json")
    with as_written(checkpoint / "state.json"):
        return Progress(
            **{field.name: found.pop(field.name, *_former(field.name)) for field in fields(Progress)}, **found
        )


def _former(name: str) -> tuple[()] | tuple[object]:
    """What a field is where a version wrote the file that did not have it."""
    return {"sound_step": (None,), "collapsed": (False,)}.get(name, ())
