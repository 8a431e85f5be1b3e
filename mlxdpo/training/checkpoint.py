"""Checkpoints: a folder that appears whole or not at all, from which a run goes on to the bit.

Every file in it has a checksum (`io.checksum`): one that was damaged since is refused, never trained on.

step-000200/ adapters.safetensors  adapter_config.json  optimizer.safetensors  state.json
             reference.safetensors, where the reference moves
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
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


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = None if best_step is None else f"step-{best_step:06d}"
    for old in [path for path in steps(folder)[:-keep] if path.name != best]:
        shutil.rmtree(old.rename(folder / f".draft-{old.name}"))  # a step-N is whole until it is gone


def remove_unfinished(run: Path) -> None:
    """Remove what a killed run left half done below its directory. Only at the start: nobody else writes there then."""
    for draft in (run / "checkpoints").glob(".draft-*"):
        shutil.rmtree(draft)
    for folder in (run, run / "adapter"):
        for name in ("config", "manifest", "adapters", "adapter_config"):
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
        raise UserError(f"{error}; or remove the folder {checkpoint.name}, and the run goes on {instead}") from None
    return progress


def restore_optimizer(checkpoint: Path, optimizer: optim.Optimizer) -> None:
    """The optimizer alone: its moments, and how many updates they have seen."""
    saved = load_checksummed(checkpoint / "optimizer.safetensors")
    optimizer.state = tree_unflatten(list(saved.items()))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood when the checkpoint was written. Raises `UserError` for a damaged `state.json`."""
    found = read_checksummed_json(checkpoint / "state.json")
    with as_written(checkpoint / "state.json"):
        return Progress(**{field.name: found.pop(field.name) for field in fields(Progress)}, **found)
