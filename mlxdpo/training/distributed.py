"""Where a run of several processes differs from one: the same pairs a step, one run directory, one start.

The processes may be on machines that share nothing but a network: model and data lie at the same place on each, and
what only process 0 has (recipe, run directory, checkpoint) reaches the others through it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlxdpo.config import Config, load_config
from mlxdpo.distributed.group import Group, recut
from mlxdpo.io.digest import json_digest
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.manifest import check_same
from mlxdpo.training.metrics import Scored
from mlxdpo.types import Pairs, UserError

PARTS = ("settings", "model", "reference", "template", "data")


def asked_for(group: Group, ask: Callable[[], tuple[Config, Run | None]]) -> tuple[Config, Run | None]:
    """What process 0 was asked to do: its recipe, and the run to go on with. The others need not have the files."""
    if not group.first:
        said = json.loads(group.share(b""))
        return load_config(None, said["config"]), Run(Path(said["resume"])) if said["resume"] else None
    config, resume = ask()
    # Only what was given: what a recipe leaves open may follow from the adapter it starts from.
    said = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "resume": str(resume.path) if resume else None,
    }
    group.share(json.dumps(said).encode())
    return config, resume


def config_for_group(config: Config, group: Group) -> tuple[Config, str]:
    """The recipe with a step's pairs in batches enough for all processes, and what to say about that, if anything."""
    train = config.train
    if group.size == 1 or train.gradient_accumulation >= group.size:
        return config, ""
    size, count = recut(train.batch_size, train.gradient_accumulation, group.size)
    smaller = train.model_copy(update={"batch_size": size, "gradient_accumulation": count})
    note = f"the {size * count} pairs of a step are computed as {count} batches of {size}, for {group.size} processes"
    return config.model_copy(update={"train": smaller}), note


def check_alike(group: Group, config: Config, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` in every process when one of them has other settings, weights, versions or data."""
    if group.size == 1:
        return
    settings = config.model_dump(mode="json", exclude={"out"})
    parts = [settings, *(manifest[name] for name in PARTS[1:])]
    own = [bytes.fromhex(json_digest(part, default=str)) for part in parts]
    said = group.each(b"".join(own))
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            at = next(n for n in range(len(PARTS)) if theirs[32 * n : 32 * n + 32] != said[0][32 * n : 32 * n + 32])
            raise UserError(
                f"process {rank} of {group.size} has a different {PARTS[at]} from process 0 "
                f"({theirs[32 * at :].hex()[:12]}, {said[0][32 * at :].hex()[:12]}); "
                f"use the same files and the same versions of mlx and mlxdpo on every machine"
            )


def open_run(group: Group, config: Config, resume: Run | None) -> Run:
    """The run directory, which process 0 makes; the others learn its name."""
    if group.size == 1:
        return resume or Run.create(config)
    run = resume or (Run.create(config) if group.first else Run(Path()))
    return Run(Path(group.share(str(run.path).encode()).decode()))


@contextlib.contextmanager
def holding(group: Group, run: Run, manifest: Mapping[str, Any]) -> Iterator[None]:
    """The run directory, held for writing by process 0, with the manifest written into it.

    Raises `UserError` when another process holds it, or when it began with another model, template or data.
    """
    if not group.first:
        yield
        return
    with run.exclusive():
        if (run.path / "manifest.json").exists():
            check_same(run.manifest(), manifest, run.path)
        run.write_manifest(manifest)
        yield


def restore_for_group(
    group: Group, checkpoints: Path, model: nn.Module, optimizer: optim.Optimizer
) -> tuple[Path, Progress]:
    """Bring model and optimizer to the last checkpoint, which process 0 reads out to the others.

    Returns the folder of checkpoints, for another process one with a copy in it, and how far the checkpoint was.
    """
    saved = checkpoint.steps(checkpoints)[-1:] if group.first else []
    if group.size > 1:
        files = {file.name: file.read_bytes() for folder in saved for file in sorted(folder.iterdir())}
        names = json.loads(group.share(json.dumps([[path.name for path in saved], sorted(files)]).encode()))
        copies = [group.share(files.get(name, b"")) for name in names[1]]
        if not group.first and names[0]:
            checkpoints = Path(tempfile.mkdtemp(prefix="mlxdpo-"))
            saved = [checkpoints / names[0][0]]
            saved[0].mkdir()
            for name, data in zip(names[1], copies, strict=True):
                (saved[0] / name).write_bytes(data)
    return checkpoints, checkpoint.restore(saved[0], model, optimizer) if saved else Progress()


WIDEST = 2  # numbers that a field of `Pairs` has of each pair, at most


def first_pairs(pairs: Pairs, count: int) -> Pairs:
    """The first `count` pairs: what follows only fills a batch."""
    return Pairs(*(None if a is None else a[..., :count] for a in pairs))


def concatenate_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several batches in one."""
    columns = zip(*parts, strict=True)
    return Pairs(*(None if column[0] is None else mx.concatenate(column, axis=-1) for column in columns))


def gather_pairs(group: Group, parts: Sequence[Pairs | None], counts: Sequence[int]) -> Pairs:
    """The pairs of several batches in one, of which `parts` holds this process's own."""
    if group.size == 1:
        return concatenate_pairs(parts)  # type: ignore[arg-type]
    columns = split_table(group.sum(mx.array(gather_table(Pairs, parts, counts))))
    return Pairs(*(None if column is None else mx.array(column) for column in columns))


def gather_table(kind: type[NamedTuple], parts: Sequence[Any], counts: Sequence[int]) -> np.ndarray:
    """(fields, 1 + 2, pairs) float32: what is known of the pairs of each batch, to be summed over the processes.

    Zeros for the batches of others (None). The first row says how many numbers of each pair a field has, 0 for None.
    """
    found, at = np.zeros((len(kind._fields), 1 + WIDEST, sum(counts)), np.float32), 0
    for part, count in zip(parts, counts, strict=True):
        for field, values in zip(found, part or (), strict=part is not None):
            if values is not None:
                rows = np.atleast_2d(np.array(values, np.float32))
                field[0, at : at + count] = len(rows)
                field[1 : 1 + len(rows), at : at + count] = rows
        at += count
    return found


def split_table(summed: mx.array) -> list[np.ndarray | None]:
    """The fields of a summed `gather_table`, each (pairs,) or (2, pairs); None where no process had one.

    Raises `RuntimeError` when the processes did not deal the batches out among them, each once.
    """
    result: list[np.ndarray | None] = []
    for field in np.array(summed):
        numbers = int(field[0, :1].sum())
        if (field[0] != numbers).any() or numbers > WIDEST:
            raise RuntimeError("a batch was computed twice or not at all; please report this with the recipe")
        result.append(None if numbers == 0 else field[1] if numbers == 1 else field[1 : 1 + numbers])
    return result


def sum_step(
    group: Group,
    model: nn.Module,
    counts: Sequence[int],
    scored: Sequence[Scored | None],
    gradients: Any,
    stopped: bool,
) -> tuple[list[Scored | None], Any, bool]:
    """What all processes found out about an optimizer step, and whether one of them was asked to stop in it.

    `counts` are the pairs of its batches, `scored` and `gradients` this process's own. Gradients are shares of the
    step's mean already, so their sum is its gradient, and every pair's numbers reach every process, so metrics are
    those of one process: of all pairs, in the order of the plan.
    """
    if stopped or gradients is None:
        gradients = tree_map(mx.zeros_like, model.trainable_parameters())
    parts = [None] * len(counts) if stopped else scored
    found = group.sum(
        {
            "stopped": mx.array([float(stopped)]),
            "pairs": mx.array(gather_table(Scored, parts, counts)),
            "gradients": gradients,
        }
    )
    if found["stopped"].item():
        return [], None, True
    columns = split_table(found["pairs"])
    pairs = Scored(*(None if column is None else column.astype(np.float64) for column in columns))  # type: ignore[arg-type]
    mx.eval(found["gradients"])
    return [pairs], found["gradients"], False


def align_weights(group: Group, model: nn.Module) -> None:
    """Give every process the weights of process 0: on unlike machines the same update may round differently."""
    if group.size > 1:
        trained = model.trainable_parameters()
        model.update(group.sum(trained if group.first else tree_map(mx.zeros_like, trained)))
        mx.eval(model.parameters())
