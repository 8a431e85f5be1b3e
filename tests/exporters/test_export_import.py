"""Run -> PEFT -> import: the same log-probs; PEFT's other habits (ranks, scales, single layers) keep their function."""

import json

import mlx.core as mx
import numpy as np
import pytest
from slow_cases import rest_slow
from tiny_exports import ids_of, logits_of, trained_run
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run as command
from mlxdpo.config import ModelConfig
from mlxdpo.exporters import export
from mlxdpo.exporters.peft import import_peft, peft_scales, targets
from mlxdpo.forward.logprobs import next_token_logps
from mlxdpo.model.adapters import load_adapter, load_run
from mlxdpo.model.policy import load_policy
from mlxdpo.types import UserError

ADAPTERS = [{}, {"method": "dora"}, {"keys": ["self_attn.q_proj"], "layers": 1}]


@pytest.mark.parametrize("lora", rest_slow(ADAPTERS, ADAPTERS[2:]), ids=str)
def test_round_trip_and_training_goes_on_from_it(lora, tmp_path, cache, monkeypatch, capsys):
    run = trained_run(tmp_path, lora={"rank": 4, "scale": 4.0, **lora})
    export(run, ["peft"], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert command(["import", "--peft", "out", "--model", "llama", "--out", "start"]) == 0
    assert "start from it: mlxdpo train" in capsys.readouterr().out
    policy = load_policy(ModelConfig(path="llama"))
    load_adapter(policy.model, tmp_path / "start")
    ids = mx.array(ids_of())
    want, got = (next_token_logps(m, ids) for m in (load_run(run).model, policy.model))
    assert mx.abs(want - got).max() <= 1e-5
    line = "train --model llama --adapter start --data pairs.jsonl --train.steps 1 --data.template plain --out on"
    assert command(line.split()) == 0
    assert "loss 0.6931" in capsys.readouterr().out  # its reference includes it


def peft_folder(folder, modules, **settings):
    """A hand-written PEFT adapter over the tiny llama: {module: (rank, seed)}; returns its arrays as numpy."""
    folder.mkdir()
    shapes = {"q_proj": (32, 32), "v_proj": (32, 16), "up_proj": (32, 64)}
    arrays = {}
    for name, (rank, seed) in modules.items():
        inner, outer = shapes[name.split(".")[-1]]
        draw = np.random.default_rng(seed).normal(0, 0.1, (rank, inner + outer)).astype(np.float32)
        arrays[f"{name}.A"], arrays[f"{name}.B"] = draw[:, :inner], draw[:, inner:].T.copy()
    stored = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": mx.array(a) for n, a in arrays.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return arrays


def test_ranks_scales_and_single_layers_keep_the_function(tmp_path, cache):
    write_model(tmp_path / "llama", chatml_tokenizer())
    modules = {
        "model.layers.1.self_attn.q_proj": (4, 0),
        "model.layers.1.mlp.up_proj": (2, 1),
        "model.layers.2.self_attn.q_proj": (4, 2),
    }
    arrays = peft_folder(tmp_path / "p", modules, alpha_pattern={"mlp.up_proj": 12}, rank_pattern={"mlp.up_proj": 2})
    found = import_peft(tmp_path / "p", ModelConfig(path=str(tmp_path / "llama")), tmp_path / "start")
    assert found.lora.rank == 4 and found.lora.layers == 2 and found.modules == 3 and len(found.changes) == 3
    policy = load_policy(ModelConfig(path=str(tmp_path / "llama")))
    want = load_policy(ModelConfig(path=str(tmp_path / "llama")))
    load_adapter(policy.model, tmp_path / "start")
    layers = dict(want.model.named_modules())
    for name in modules:
        scale = 12 / 2 if "up_proj" in name else 8 / 4
        delta = scale * arrays[f"{name}.B"] @ arrays[f"{name}.A"]
        layers[name].weight = layers[name].weight + mx.array(delta)
    gap = abs(logits_of(policy.model, ids_of()) - logits_of(want.model, ids_of())).max()
    assert gap < 1e-4


def test_scales_are_peft_s():
    plain = {"lora_alpha": 16, "alpha_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2}}
    names = [
        "model.layers.0.mlp.up_proj",
        "a.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "b.layers.11.mlp.up_proj",
    ]
    assert list(peft_scales(plain, dict.fromkeys(names, 8)).values()) == [2, 0.5, 0.25, 2]
    assert peft_scales({"lora_alpha": 16, "use_rslora": True}, {"x": 16}) == {"x": 4}


def test_targets_name_exactly_what_was_adapted():
    blocks = [f"model.layers.{i}.{m}" for i in range(3) for m in ("self_attn.q_proj", "mlp.q_proj", "mlp.up_proj")]
    all_up = [name for name in blocks if name.endswith("up_proj")]
    assert targets(all_up, blocks)["target_modules"] == ["up_proj"] and not targets(all_up, blocks)["layers_pattern"]
    assert targets(all_up[1:], blocks) == {
        "target_modules": ["up_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    }
    one_of_two = [name for name in blocks if name.endswith("self_attn.q_proj")]
    assert targets(one_of_two, blocks)["target_modules"] == one_of_two


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ({"bias": "all"}, "trained biases"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_what_an_mlx_adapter_cannot_hold_is_refused(settings, sentence, tmp_path, cache):
    peft_folder(tmp_path / "p", {"model.layers.1.self_attn.q_proj": (4, 0)}, **settings)
    with pytest.raises(UserError, match=sentence):
        import_peft(tmp_path / "p", ModelConfig(path="llama"), tmp_path / "start")


def test_another_model_is_refused(tmp_path, cache):
    write_model(tmp_path / "llama", chatml_tokenizer())
    for layer, sentence in (("9", "has no layer `model.layers.9"), ("1", "another model")):
        folder = tmp_path / f"p{layer}"
        peft_folder(folder, {f"model.layers.{layer}.self_attn.q_proj": (4, 0)})
        if layer == "1":
            arrays = dict(mx.load(str(folder / "adapter_model.safetensors")))
            name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
            mx.eval(arrays)
            mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays | {name: mx.zeros((4, 48))})
        with pytest.raises(UserError, match=sentence):
            import_peft(folder, ModelConfig(path=str(tmp_path / "llama")), tmp_path / "start")
        assert not (tmp_path / "start").exists()


def hostile_peft(folder, a=(4, 32), b=(32, 4), **settings):
    """A PEFT adapter of one module whose arrays have these shapes."""
    peft_folder(folder, {"model.layers.1.self_attn.q_proj": (4, 0)}, **settings)
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    arrays = {f"{stem}A.weight": mx.zeros(a), f"{stem}B.weight": mx.zeros(b)}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})


HOSTILE = {
    "a rank of a billion in no bytes": ({"a": (10**9, 0), "b": (32, 0)}, "expected lora_a (r, in)"),
    "sides of no bytes": ({"a": (0, 32), "b": (32, 0)}, "expected lora_a (r, in)"),
    "one wide module": ({"a": (10**5, 1), "b": (1, 10**5)}, "has rank 100000 between 1 and 1"),
    "three sides": ({"a": (4, 32, 1)}, "expected lora_a (r, in)"),
    "two ranks": ({"a": (3, 32)}, "expected lora_a (r, in)"),
    "alpha no number": ({"lora_alpha": {}}, "invalid PEFT settings"),
    "alpha infinite": ({"lora_alpha": 10**400}, "invalid PEFT settings"),
    "patterns no object": ({"alpha_pattern": [1]}, "invalid PEFT settings"),
    "a pattern without end": ({"alpha_pattern": {"((.+)+)+!": 1}}, "took more than 2 s to match"),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, "is not a pattern of module names"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_adapter_is_one_sentence(name, tmp_path, tiny_model_folder, capsys):
    parts, sentence = HOSTILE[name]
    hostile_peft(tmp_path / "p", **parts)
    out = tmp_path / "start"
    assert command(["import", "--peft", str(tmp_path / "p"), "--model", str(tiny_model_folder), "--out", str(out)]) == 2
    assert sentence in capsys.readouterr().err and not out.exists()
