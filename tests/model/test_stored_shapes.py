"""Numbers of a stranger's config and adapter, held against the stored arrays before anything is made of them."""

import json

import mlx.core as mx
import pytest
from tiny_models import change
from tiny_runs import write_pairs

from mlxdpo.cli import run as cli
from mlxdpo.model.stored_shapes import check_counts
from mlxdpo.types import UserError

STORED = {"model.layers.11.w": (64, 8), "model.experts.3.w": (2, 2)}


@pytest.mark.parametrize("number", [1001, 10**9, 10**30, 1e300])
@pytest.mark.parametrize("path", ["num_hidden_layers", "text_config num_layers", "n_routed_experts", "a b num_blocks"])
def test_counts_beyond_the_arrays_are_refused(path, number):
    config = number
    for key in reversed(path.split()):
        config = {key: config}
    with pytest.raises(UserError, match=f"config.json says `{path.split()[-1]}` .*, its weights have 1000 at most"):
        check_counts(config, STORED, "m")


def test_what_the_arrays_have_passes():
    check_counts(
        {"num_hidden_layers": 12, "num_experts": 1000, "rope_theta": 1e9, "max_position_embeddings": 10**7}, STORED, "m"
    )
    check_counts({"num_hidden_layers": 3001, "layer_types": ["x"] * 9}, {"model.layers.3000.w": (2,)}, "m")


def test_a_rotary_base_for_each_layer_is_taken_where_the_definition_takes_it():
    check_counts({"rope_theta": [5e6, 1e4], "model_type": "step3p5"}, STORED, "m")
    for config in ({"rope_theta": [1e4, "x"], "model_type": "step3p5"}, {"rope_theta": [1e4], "model_type": "llama"}):
        with pytest.raises(UserError, match=r"config.json says `rope_theta` .*, expected a number"):
            check_counts(config, STORED, "m")


@pytest.mark.parametrize("command", ["plan", "score"])
def test_a_billion_layers_are_a_sentence(own, capsys, command):
    change(own / "config.json", num_hidden_layers=10**9)
    words = [command, "--model", str(own), "--data", str(write_pairs(own / "p.jsonl"))]
    assert cli(words + (["--out", str(own / "o.jsonl")] if command == "score" else [])) == 2
    assert "config.json says `num_hidden_layers` 1e+09, its weights have 1000 at most" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [65_536, 10**12, -1, "x", [8]])
def test_a_rank_is_not_believed(own, tmp_path, capsys, rank):
    """65,536 would be arrays of gigabytes for a model of any size; here the file holds arrays of rank 2."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0},
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"model.layers.0.x.lora_a": mx.zeros((32, 2))})
    mx.reset_peak_memory()
    words = ["score", "--model", str(own), "--adapter", str(adapter), "--data", str(write_pairs(own / "p.jsonl"))]
    assert cli([*words, "--out", str(own / "o.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "another model?" in said or "not what mlxdpo wrote" in said
    assert mx.get_peak_memory() < 20e6


LATE = [("rope_theta", []), ("rope_theta", "x"), ("eos_token_id", -1), ("eos_token_id", 2**62)]


@pytest.mark.parametrize("key, value", LATE)
def test_numbers_that_are_used_late_are_looked_at_early(own, capsys, key, value):
    change(own / "config.json", **{key: value})
    words = ["score", "--model", str(own), "--data", str(write_pairs(own / "p.jsonl")), "--out", str(own / "o.jsonl")]
    assert cli(words) == 2 and f"config.json says `{key}`" in capsys.readouterr().err
