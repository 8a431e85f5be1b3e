"""config.json by transformers 4 and 5 is one model; what mlx-lm would compute otherwise is refused or limited."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs
from tiny_models import change, write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import ModelConfig
from mlxdpo.inference.generate import generate
from mlxdpo.model.config_rules import period
from mlxdpo.model.corrections import router_note
from mlxdpo.model.limits import check_takes
from mlxdpo.model.model_config import names_read, read_model_config
from mlxdpo.model.policy import load_policy
from mlxdpo.model.skeleton import read_skeleton
from mlxdpo.types import UserError

TOKENS = mx.array(np.random.default_rng(0).integers(3, 250, (1, 90)))
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rewritten(folder, left_out=(), **values):
    """The folder with values laid over its config.json, and keys left out."""
    raw = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in left_out}))
    return folder


def logits(folder):
    return np.array(load_policy(ModelConfig(path=str(folder), dtype="float32")).model(TOKENS))


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_transformers_4_and_5_write_one_model(own, cache, scaling):
    """mlx-lm reads `rope_theta` alone: with `rope_parameters` it took 10,000 for the base, and no scaling."""
    old = {"rope_theta": 500000.0, "rope_scaling": scaling and scaling | {"rope_type": "llama3"}}
    want = logits(rewritten(own, **old))
    kind = {"rope_type": "llama3" if scaling else "default"}
    new = {"rope_parameters": {"rope_theta": 500000.0} | kind | (scaling or {})}
    found = logits(rewritten(own, ["rope_theta", "rope_scaling"], **new))
    assert np.array_equal(found, want)
    other = logits(rewritten(own, **{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}))
    assert abs(other - want).max() > 0.1  # the base matters here


def test_a_plan_sees_the_same_model(own, cache):
    rewritten(own, ["rope_theta"], rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    assert read_skeleton(ModelConfig(path=str(own))).model.args.rope_theta == 500000.0


def test_what_is_left_out_is_transformers_default(own):
    """A hand-written config: no norm epsilon, no base, no head size."""
    raw = json.loads((own / "config.json").read_text())
    short = {k: v for k, v in raw.items() if k not in ("rms_norm_eps", "rope_theta", "head_dim")}
    read = ModelArgs.from_dict(read_model_config(short, "M").loaded)
    assert (read.rms_norm_eps, read.rope_theta, read.head_dim) == (1e-6, 10000.0, 8)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_act": "gelu"}, 'sets hidden_act "gelu", which mlx-lm\'s llama does not read'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}}, "attention_factor 2.0"),
    ],
)
def test_a_number_that_mlx_lm_does_not_read_refuses(own, cache, values, says):
    rewritten(own, ["rope_theta"], **values)
    for open_it in (load_policy, read_skeleton):
        with pytest.raises(UserError, match=says):
            open_it(ModelConfig(path=str(own)))


def test_a_key_of_no_meaning_is_named_once(own, cache):
    rewritten(own, house_number=7, unsloth_fixed=True, initializer_range=0.5)
    assert load_policy(ModelConfig(path=str(own))).reading.notes == (
        "config.json sets what mlx-lm does not read: house_number, unsloth_fixed",
    )


def test_rows_beyond_a_window_that_mlx_lm_ignores(tmp_path, cache):
    folder = write_model(tmp_path / "model", chatml_tokenizer(), tie_word_embeddings=True)
    change(folder / "config.json", model_type="mistral", sliding_window=16)
    policy = load_policy(ModelConfig(path=str(folder)))
    check_takes(policy, 16, 0)
    with pytest.raises(
        UserError, match=r"17 tokens, but beyond 16 .*without its sliding window; set data.max_length 16"
    ):
        check_takes(policy, 17, 0)


def test_a_token_beyond_the_embedding(own, cache):
    """MLX reads foreign memory there."""
    policy = load_policy(ModelConfig(path=str(own)))
    check_takes(policy, 1, 299)
    with pytest.raises(UserError, match=r"token 300 .*embedding has 300 rows.*resize_token_embeddings\(301\)"):
        check_takes(policy, 1, 300)
    with pytest.raises(UserError, match="token 5000000 is in the data"):
        generate(policy.model, [[5, 5_000_000]], max_tokens=1, eos_ids=[])


def test_the_pattern_of_layers():
    assert period(["sliding_attention", "sliding_attention", "full_attention"] * 2) == 3
    assert period(["full_attention"] * 4) == 1
    with pytest.raises(UserError, match="not a repeated pattern"):
        period(["full_attention", "sliding_attention"])


def test_what_a_model_file_reads():
    assert {"rope_scaling", "sliding_window"} <= names_read("mlx_lm.models.llama")
    assert "sliding_window" not in names_read("mlx_lm.models.mixtral")
    assert "rms_norm_eps" in names_read("mlx_lm.models.qwen3_vl")  # by way of the file that it imports


def test_plan_and_train_read_a_config_that_leaves_out_shapes_alike(tmp_path, cache):
    """Written for mlx-lm: its gemma3_text has 4 heads and 1 for keys by default, transformers' 8 and 4."""
    folder = write_model(
        tmp_path / "m", chatml_tokenizer(), "gemma3_text", num_attention_heads=4, num_key_value_heads=1
    )
    rewritten(folder, ("num_attention_heads", "num_key_value_heads"))
    model = ModelConfig(path=str(folder), dtype="float32")
    loaded, planned = load_policy(model), read_skeleton(model)
    shapes = [{n: a.shape for n, a in tree_flatten(m.parameters())} for m in (loaded.model, planned.model)]
    assert shapes[0] == shapes[1]
    assert "mlx-lm's are used" in planned.reading.notes[-1] and planned.reading.notes == loaded.reading.notes


def test_routers_that_correct_to_below_zero_are_named():
    class Gate(nn.Module):
        def __init__(self, corrections, groups):
            super().__init__()
            self.n_group, self.e_score_correction_bias = groups, mx.array(corrections)

    said = router_note(nn.Sequential(Gate([0.1, -0.2], 2), Gate([0.1, 0.2], 2)))
    assert said.startswith("1 of 2 routers correct experts to below 0")
    assert router_note(nn.Sequential(Gate([0.1, -0.2], 1), Gate([0.1, 0.2], 2))) == ""


def test_a_model_that_cannot_run_is_refused_before_its_first_row(tmp_path, cache):
    """The arrays fit an odd head dimension, and rotary positions do not: a sentence from `plan` and `train` alike."""
    folder = write_model(tmp_path / "m", chatml_tokenizer(), "qwen3")
    odd = write_model(tmp_path / "odd", chatml_tokenizer(), "qwen3", head_dim=7)
    for read in (load_policy, read_skeleton):
        read(ModelConfig(path=str(folder), dtype="float32"))
        with pytest.raises(UserError, match=r"cannot be loaded .*dims must be even"):
            read(ModelConfig(path=str(odd), dtype="float32"))
