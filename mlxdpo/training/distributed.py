"""Where a run of several processes differs from one: the same pairs a step, one run directory, one start.

The processes may be on machines that share nothing but a network: model and data lie at the same place on each, and
what only process 0 has (recipe, run directory, checkpoint) reaches the others through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdpo.config import Config, load_config
from mlxdpo.distributed.group import Group, recut
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.manifest import check_same
from mlxdpo.training.window import TrainState
from mlxdpo.types import UserError

PARTS = ("settings", "model", "reference", "template", "data")


def asked_for(peers: Group, ask: Callable[[], tuple[Config, Run | None]]) -> tuple[Config, Run | None]:
    """What process 0 was asked to do: its recipe, and the run to go on with. The others need not have the files."""
    if not peers.first:
        said = json.loads(peers.share(b""))
        return load_config(None, said["config"]), Run(Path(said["resume"])) if said["resume"] else None
    config, resume = ask()
    # Only what was given: what a recipe leaves open may follow from the adapter it starts from.
    said = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "resume": str(resume.path) if resume else None,
    }
    peers.share(json.dumps(said).encode())
    return config, resume


def config_for_group(config: Config, peers: Group) -> tuple[Config, str]:
    """The recipe with a step's pairs in batches enough for all processes, and what to say about that, if anything."""
    train = config.train
    if peers.size == 1 or train.gradient_accumulation >= peers.size:
        return config, ""
    size, count = recut(train.batch_size, train.gradient_accumulation, peers.size)
    smaller = train.model_copy(update={"batch_size": size, "gradient_accumulation": count})
    note = f"the {size * count} pairs of a step are computed as {count} batches of {size}, for {peers.size} processes"
    return config.model_copy(update={"train": smaller}), note


def check_alike(peers: Group, config: Config, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` in every process when one of them has other settings, weights, versions or data."""
    if peers.size == 1:
        return
    settings = config.model_dump(mode="json", exclude={"out"})
    parts = [settings, *(manifest[name] for name in PARTS[1:])]
    own = [hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).digest() for part in parts]
    said = peers.each(b"".join(own))
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            at = next(n for n in range(len(PARTS)) if theirs[32 * n : 32 * n + 32] != said[0][32 * n : 32 * n + 32])
            raise UserError(
                f"process {rank} of {peers.size} has another {PARTS[at]} than process 0 "
                f"({theirs[32 * at :].hex()[:12]}, {said[0][32 * at :].hex()[:12]}); "
                f"put the same files and the same versions of mlx and mlxdpo on every machine"
            )


def open_run(peers: Group, config: Config, resume: Run | None) -> Run:
    """The run directory, which process 0 makes; the others learn its name."""
    if peers.size == 1:
        return resume or Run.create(config)
    run = resume or (Run.create(config) if peers.first else Run(Path()))
    return Run(Path(peers.share(str(run.path).encode()).decode()))


@contextlib.contextmanager
def holding(peers: Group, run: Run, manifest: Mapping[str, Any]) -> Iterator[None]:
    """The run directory, held for writing by process 0, with the manifest written into it.

    Raises `UserError` when another process holds it, or when it began with another model, template or data.
    """
    if not peers.first:
        yield
        return
    with run.exclusive():
        if (run.path / "manifest.json").exists():
            check_same(run.manifest(), manifest, run.path)
        run.write_manifest(manifest)
        yield


def restored(job: TrainState) -> tuple[TrainState, Progress]:
    """The job brought to its last checkpoint, which process 0 reads out to the others, and where that is.

    Another process's job then looks for checkpoints in a copy of its own.
    """
    peers = job.peers
    saved = checkpoint.steps(job.checkpoints)[-1:] if peers.first else []
    if peers.size > 1:
        files = {file.name: file.read_bytes() for folder in saved for file in sorted(folder.iterdir())}
        names = json.loads(peers.share(json.dumps([[path.name for path in saved], sorted(files)]).encode()))
        copies = [peers.share(files.get(name, b"")) for name in names[1]]
        if not peers.first and names[0]:
            place = Path(tempfile.mkdtemp(prefix="mlxdpo-"))
            saved = [place / names[0][0]]
            saved[0].mkdir()
            for name, data in zip(names[1], copies, strict=True):
                (saved[0] / name).write_bytes(data)
            job = replace(job, checkpoints=place)
    if not saved:
        return job, Progress()
    return job, checkpoint.restore(saved[0], job.model, job.optimizer)
