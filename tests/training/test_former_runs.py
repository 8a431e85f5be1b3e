"""Runs and recipes of version 0.1.0, whose settings had other names, are read, resumed, evaluated and exported.

`tests/support/run_of_0.1.0` was written by that version: a tiny model, its pairs, a run that finished and the same run
stopped at step 3.
"""

import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import adapter_bytes

from mlxdpo import Run, UserError, load_config
from mlxdpo.cli import run as cli
from mlxdpo.config import FORMER_NAMES, Config

STORED = Path(__file__).parents[1] / "support" / "run_of_0.1.0"
VALUES = {"gradient_checkpointing": True, "gradient_accumulation": 2, "keep_checkpoints": 1, "keep_model": "best",
          "max_grad_norm": 0.5, "every_steps": 2, "sync_alpha": 0.5}  # fmt: skip


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A copy of what was stored, as the working folder: its paths are relative."""
    shutil.copytree(STORED, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def value_of(config: Config, former: str):
    """What a configuration holds of a setting, asked for by its former name."""
    section = former.partition(".")[0]
    return getattr(getattr(config, section), FORMER_NAMES[former])


def test_every_former_name_is_read_from_a_stored_run(place):
    config = Run.open(Path("runs/finished")).config()
    assert {FORMER_NAMES[name]: value_of(config, name) for name in FORMER_NAMES} == VALUES


def test_a_stopped_run_goes_on_to_the_bytes_of_the_run_that_finished(place, capsys):
    assert cli(["train", "--resume", "runs/stopped"]) == 0, capsys.readouterr().err
    assert adapter_bytes("runs/stopped") == adapter_bytes("runs/finished")


def test_a_finished_run_is_evaluated_and_exported(place, capsys):
    assert cli(["eval", "runs/finished", "--prompts", "2", "--max-tokens", "4"]) == 0, capsys.readouterr().err
    assert cli(["export", "runs/finished", "--to", "mlx", "--out", "out"]) in (0, 1), capsys.readouterr().err
    assert os.path.getsize("out/mlx/adapters.safetensors") > 0


def test_a_recipe_may_use_former_names_but_not_both():
    config = load_config(None, {"train": {"accumulate": 8}, "optim": {"clip": 0}})
    assert (config.train.gradient_accumulation, config.optim.max_grad_norm) == (8, 0)
    with pytest.raises(
        UserError, match=r"`train\.keep` is the old name of `train\.keep_checkpoints`; give one of them"
    ):
        load_config(None, {"train": {"keep": 1, "keep_checkpoints": 2}})
