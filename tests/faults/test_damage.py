"""Files cut short or with one bit flipped: refused in one sentence, or the same to the bit. Never something else."""

import importlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from stages import numbers
from tiny_runs import adapter_bytes, finish, recipe

from mlxdpo.cli import run as cli
from mlxdpo.data.dataset import _open_dataset
from mlxdpo.data.planning import outline, plan_epoch
from mlxdpo.forward.reward_head import load_head
from mlxdpo.io.checksum import checksum_of
from mlxdpo.model.adapters import load_adapter, load_run, read_settings
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.reference import read_table, row_digest, write_table
from mlxdpo.training.step import NonFiniteError, make_optimizer
from mlxdpo.types import UserError

story = importlib.import_module("mlxdpo.training.run")
FEW, MANY = 12, 400  # flipped bits in each file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with everything in it, and a reward model."""
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        train = {"epochs": 2, "steps": 6, "save_every": 3}
        finish(recipe(folder, data={"eval_fraction": 0.4}, train=train, reference={"sync_every": 2, "sync_alpha": 0.5}))
        finish(recipe(folder, "reward", stage="reward", train={"steps": 2}))
        yield folder


def model_of(place: Path):
    """The model as training has it."""
    policy = load_policy(Run.open(place / "run").config().model)
    return load_adapter(policy.model, place / "run" / "adapter", read_settings(place / "run" / "adapter"))


def restored(place: Path) -> object:
    """All that a resume takes from the last checkpoint."""
    run = Run.open(place / "run")
    model, optimizer, last = model_of(place), make_optimizer(run.config().optim), checkpoint.steps(run.checkpoints)[-1]
    progress = checkpoint.restore(last, model, optimizer)
    states = dict(tree_flatten(model.trainable_parameters())), dict(tree_flatten(optimizer.state))
    return progress, *map(checksum_of, states)


def moved(place: Path) -> object:
    """A moving reference."""
    from mlxdpo.training.reference_sync import ReferenceSync

    config = Run.open(place / "run").config()
    moving = ReferenceSync(model_of(place), config, lambda model, batch: mx.array(0))
    moving.restore(checkpoint.steps(place / "run" / "checkpoints")[-1])
    return moving.moved, checksum_of(moving.arrays)


def adapter(place: Path) -> object:
    """A run's tuned model."""
    run = Run.open(place / "run")
    return checksum_of(dict(tree_flatten(load_run(run).model.parameters()))), str(read_settings(run.adapter))


def reward(place: Path) -> object:
    """The head of a reward model."""
    model = load_policy(Run.open(place / "run").config().model).model
    return checksum_of(dict(load_head(model, place / "reward")["reward_head"].parameters()))


def table(place: Path) -> object:
    """The reference's log-probs; none is no harm: they are scored again."""
    return [read_table(file) for file in sorted((place / "cache" / "reference").glob("*.safetensors"))]


def pairs(place: Path) -> object:
    """The kept token ids."""
    found = []
    for told in sorted((place / "cache" / "pairs").glob("[!.]*/*/told.json")):
        data = _open_dataset(told.parent, "")
        names = ("tokens", "spans", "where", "rows", "prompts", "extras")
        found += [np.asarray(getattr(p, n)).tobytes() for p in (data.train, data.heldout) for n in names]
        found += [data.digest, str(data.reports)]
    return found


LAST = "run/checkpoints/step-000006"
FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint adapter": (f"{LAST}/adapters.safetensors", restored),
    "checkpoint optimizer": (f"{LAST}/optimizer.safetensors", restored),
    "checkpoint state": (f"{LAST}/state.json", restored),
    "checkpoint reference": (f"{LAST}/reference.safetensors", moved),
    "adapter": ("run/adapter/adapters.safetensors", adapter),
    "adapter settings": ("run/adapter/adapter_config.json", adapter),
    "reward head": ("reward/head.safetensors", reward),
    "reference table": ("cache/reference/*.safetensors", table),
    "kept tokens": ("cache/pairs/*/*/train/tokens", pairs),
    "kept lengths": ("cache/pairs/*/*/train/spans", pairs),
    "kept digests": ("cache/pairs/*/*/train/rows", pairs),
    "kept names": ("cache/pairs/*/*/heldout/where", pairs),
    "kept report": ("cache/pairs/*/*/told.json", pairs),
}


def check(place: Path, name: str, flips: int) -> tuple[int, int]:
    """Cut and flip a file; how often it was refused, and how often the damage was harmless."""
    pattern, read = FILES[name]
    file = next(f for f in sorted(place.glob(pattern)) if f.stat().st_size)
    whole, expected, draw, refused, harmless = file.read_bytes(), read(place), random.Random(name), 0, 0
    cuts = [whole[:n] for n in {0, 1, 8, len(whole) // 2, len(whole) - 1}]
    for bit in draw.sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        cuts.append(bytes(changed))
    try:
        for content in cuts:
            file.write_bytes(content)
            try:
                found = read(place)
            except UserError as error:
                refused += 1
                assert str(error) and all(str(error).split("\n"))
            else:
                harmless += 1
                assert found == expected or (name == "reference table" and _subset(found, expected)), content
    finally:
        file.write_bytes(whole)
    return refused, harmless


def _subset(found, expected) -> bool:
    """Tables of which some are not read."""
    return all(one in ({}, whole) for one, whole in zip(found, expected, strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(place, name):
    refused, _ = check(place, name, FEW)
    assert refused >= 5


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_much_damage_is_refused_or_harmless(place, name):
    print(name, "refused, harmless:", *check(place, name, MANY))


@pytest.mark.processes
@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_names_the_one_before_and_goes_on_from_it(place, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("MLXDPO_CACHE", str(place / "cache"))
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    shutil.rmtree(run / "adapter")
    last = run / "checkpoints" / "step-000006"
    content = bytearray((last / name).read_bytes())
    content[-40 if name == "state.json" else -3] ^= 4
    (last / name).write_bytes(content)
    assert cli(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert said.endswith("or remove the folder step-000006, and the run resumes from step-000005\n")
    shutil.rmtree(last)
    assert cli(["train", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == adapter_bytes(place / "run") and numbers(run) == numbers(place / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_planted_log_prob_stops_the_run_at_its_pair(tmp_path, cache, value):
    """Sealed and whole, but no number: what a scoring on broken hardware would leave."""
    finish(recipe(tmp_path, "first"))
    (file,) = (cache / "reference").glob("*.safetensors")
    config = recipe(tmp_path, train={"save_every": 1})
    data = next(story.train(config.model_copy(update={"out": str(tmp_path / "look")}))).values["data"].train
    window = plan_epoch(outline(data, "prompt"), 2, 2, config.train.seed, 0).windows[2]
    pair = window[0][0]
    key = row_digest(data[pair].prompt, data[pair].chosen)
    write_table(file, read_table(file) | {key: value}, {})
    with pytest.raises(NonFiniteError, match=rf"^the log-prob or loss is not a finite number at {data[pair].where};"):
        finish(config)
    assert [p.name for p in checkpoint.steps(Run.open(config.out).checkpoints)] == ["step-000001", "step-000002"]
