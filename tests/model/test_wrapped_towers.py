"""A text tower inside a model for images: its weights under both namings, its modules by transformers' names."""

import json
import types

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tiny_exports import ids_of, logits_of
from tiny_models import CONFIGS, SHAPE
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import ModelConfig
from mlxdpo.exporters.peft import _own_names, torch_name
from mlxdpo.model.policy import load_policy

LFM2 = SHAPE | {
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention", "conv"],
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 64,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}
WRAPPED = {"gemma3": CONFIGS["gemma3_text"], "lfm2_vl": LFM2}


def folder_of(kind, folder, rename):
    """A tiny model, its tensors under the names that `rename` makes of mlx-lm's, and a tower that nobody reads."""
    folder.mkdir()
    config = {"model_type": kind, "text_config": WRAPPED[kind] | {"vocab_size": 300}}
    model_class, arguments = _get_classes(config | {"model_type": kind.replace("_", "-")})
    model = model_class(arguments.from_dict(config))
    draw = np.random.default_rng(0)
    arrays = {
        rename(name): mx.array(draw.normal(0, 0.2, array.shape).astype(np.float32))
        for name, array in tree_flatten(model.parameters())
        if "lm_head" not in name
    }
    arrays[rename("language_model.model.").partition("language")[0] + "vision_tower.proj.weight"] = mx.zeros((2, 2))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    chatml_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", WRAPPED)
def test_both_namings_load(kind, tmp_path, cache):
    found = []
    for name, rename in {
        "outside": lambda name: name,
        "inside": lambda name: name.replace("language_model.model.", "model.language_model."),
    }.items():
        policy = load_policy(ModelConfig(path=str(folder_of(kind, tmp_path / name, rename)), dtype="float32"))
        found.append(logits_of(policy.model, ids_of()))
    assert np.isfinite(found[0]).all() and (found[0] == found[1]).all()


@pytest.mark.parametrize(
    ("kind", "name", "theirs"),
    [
        ("gemma3", "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("qwen3_vl", "language_model.lm_head", "lm_head"),
        ("llama4", "language_model.model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("kimi_vl", "language_model.lm_head", "language_model.lm_head"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_names_there_and_back(kind, name, theirs):
    model = types.SimpleNamespace(model_type=kind, named_modules=lambda: [(name, None)])
    assert torch_name(model, name) == theirs
    assert _own_names(model, {theirs: 1, "other": 2}) == {name: 1, "other": 2}
