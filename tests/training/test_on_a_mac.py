"""What a Mac would do, as far as the tests' own can tell (support/fake_mac.py)."""

import json
import math

import mlx.core as mx
import pytest
from fake_mac import MAC
from mlx.utils import tree_flatten
from tiny_runs import finish, losses, recipe

from mlxdpo.cli import run as cli
from mlxdpo.data import batch_shapes
from mlxdpo.estimate.forecast import check_fits
from mlxdpo.machine import device
from mlxdpo.machine.device import default_dtype, this_machine
from mlxdpo.model.policy import load_policy
from mlxdpo.training.run import train
from mlxdpo.types import UserError

pytestmark = pytest.mark.usefixtures("cache", "fake_mac")


def yes_or_no(folder):
    """Short questions whose answers are one word: rows of 8 tokens at most."""
    rows = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe(folder, train={"steps": 2})


def test_it_is_metal_in_bfloat16():
    assert this_machine().kind == "metal" and default_dtype() == mx.bfloat16


@pytest.mark.parametrize("quantize", [None, 4])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_files_keep_their_own_16_bit_type(tmp_path, stored, quantize):
    config = recipe(tmp_path)
    folder = tmp_path / "llama"
    arrays = mx.load(str(folder / "model.safetensors"))
    held = {name: a.astype(getattr(mx, stored)) for name, a in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), held, {"format": "mlx"})
    model = load_policy(config.model.model_copy(update={"quantize": quantize})).model
    dtypes = {a.dtype for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    assert dtypes == {mx.float16 if stored == "float16" else mx.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_short_answers_train(tmp_path, fake_mac, checkpointing):
    config = yes_or_no(tmp_path)
    train = config.train.model_copy(update={"gradient_checkpointing": checkpointing})
    found = losses(finish(config.model_copy(update={"train": train})))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and len(found) == 2 and fake_mac["gradient"]


def test_short_answers_in_narrow_rows_would_stop(tmp_path, monkeypatch):
    """The crash that this is about: rows as narrow as they come."""
    monkeypatch.setattr(batch_shapes, "NARROWEST", 8)
    with pytest.raises(RuntimeError, match="do not produce a logsumexp"):
        finish(yes_or_no(tmp_path))


def test_a_run_that_will_not_fit_stops_before_loading_and_goes_on_when_told(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_detect_machine", lambda: MAC._replace(memory=200_000))
    config = recipe(tmp_path, train={"steps": 1})
    with pytest.raises(UserError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxdpo.training.run.load_policy", lambda config: pytest.fail("loaded"))
        list(train(config, fits=check_fits))
    assert str(error.value).startswith("this run needs about 0.0 GB, and this machine has 0.0 GB for it and everything")
    assert "set data.max_length 24" in str(error.value) and "not enough alone" in str(error.value)
    assert str(error.value).endswith("try anyway with --train.allow_over_memory true")
    assert not (tmp_path / "run").exists()
    told = config.train.model_copy(update={"allow_over_memory": True})
    assert list(train(config.model_copy(update={"train": told}), fits=check_fits))[-1].kind == "done"


def test_the_command_asks_whether_a_run_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "_detect_machine", lambda: MAC._replace(memory=200_000))
    recipe(tmp_path)
    assert cli(["train", "--model", str(tmp_path / "llama"), "--data", str(tmp_path / "pairs.jsonl")]) == 2
    assert "error: this run needs about" in capsys.readouterr().err
