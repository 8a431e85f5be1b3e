"""Mixtures of experts: adapters on experts learn, on quantised experts too, and the routers can be kept balanced."""

import math

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import write_experts
from tiny_runs import finish, numbers, recipe
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.types import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path / "cache"))


def tuned(folder, **sections):
    """Two steps on a mixture of experts that is wide enough to be quantised."""
    write_experts(folder / "experts", chatml_tokenizer(), hidden_size=64, moe_intermediate_size=64, num_hidden_layers=2)
    sections["train"] = {"steps": 2, "batch_size": 2, "gradient_accumulation": 2} | sections.get("train", {})
    config = recipe(folder, kind="experts", **sections)
    events = finish(config)
    return next(e for e in events if e.kind == "done").values["run"], events


@pytest.mark.parametrize("bits", [None, 8])
def test_adapters_on_experts_learn(tmp_path, bits):
    run, _ = tuned(tmp_path, model={"quantize": bits})
    arrays = mx.load(str(run.adapter / "adapters.safetensors"))
    second = {name: np.array(a) for name, a in arrays.items() if "switch_mlp" in name and name.endswith("lora_b")}
    assert len(second) == 2 * 3 and all(a.ndim == 3 and a.any() for a in second.values())
    assert numbers(run.path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_balancing_loss_is_part_of_the_loss(tmp_path):
    run, events = tuned(tmp_path, train={"router_aux_loss_coef": 0.1})
    aux = (numbers(run.path)[0]["loss"] - math.log(2)) / 0.1
    assert 2 - 1e-3 < aux <= 4  # of 4 experts 2 are chosen: 2 where all are used alike, 4 where always the same
    assert any("reads the routers of full rows" in e.values["text"] for e in events if e.kind == "note")


def test_it_is_refused_where_it_cannot_be_had(tmp_path):
    with pytest.raises(
        UserError, match=r"train.gradient_checkpointing and train.router_aux_loss_coef exclude each other"
    ):
        tuned(tmp_path, train={"router_aux_loss_coef": 0.1, "gradient_checkpointing": True})
    with pytest.raises(UserError, match="llama has no experts to balance; set it to 0"):
        finish(recipe(tmp_path, "dense", train={"router_aux_loss_coef": 0.1}))
