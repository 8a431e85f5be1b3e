"""Every target of every kind of run behaves like the run, and says so; what cannot be right is refused.

Tolerances: float32 weights are equal to rounding, so logits agree within 1e-4 and token KL within 1e-6 nats.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load, load_model
from slow_cases import rest_slow
from tiny_exports import greedy_of, ids_of, logits_of, other_adapter, split_in_shards, trained_run
from tiny_models import CONFIGS, change, write_experts, write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.exporters import export
from mlxdpo.exporters.hf import safetensors_header
from mlxdpo.exporters.source import Choices
from mlxdpo.model.adapters import load_run
from mlxdpo.model.corrections import correct
from mlxdpo.types import UserError

EXACT = ["mlx", "peft", "hf", "fused"]
WIDE = {"hidden_size": 64, "head_dim": 16}  # packing takes groups of 64


def check(exported, kl=1e-6, slope=1e-3):
    """All kept, and as close as number types allow."""
    for name, target in exported.targets.items():
        assert target.kept and target.fidelity.passed, (name, target.fidelity)
        assert target.fidelity.token_kl < kl and target.fidelity.policy_reference_kl > 1e-3, (name, target.fidelity)
        assert target.fidelity.slope == pytest.approx(1, abs=slope), name
        assert target.fidelity.accuracy_artefact == target.fidelity.accuracy_run
        folder = exported.out / target.folder
        assert target.files == {file: (folder / file).stat().st_size for file in target.files}


@pytest.mark.parametrize("kind", rest_slow(sorted(CONFIGS), ["gemma2", "llama"]))
def test_every_exact_target_is_the_run(kind, tmp_path, cache):
    run = trained_run(tmp_path, kind)
    exported = export(run, EXACT, tmp_path / "out")
    check(exported)
    policy = load_run(run)
    ids = ids_of()
    want, words = logits_of(policy.model, ids), greedy_of(policy.model, ids)
    base = str(policy.folder)
    clients = {
        "mlx": load(base, adapter_path=str(exported.out / "mlx"))[0],
        "hf": load_model(exported.out)[0],
        "fused": load(str(exported.out / "fused"))[0],
    }
    assert abs(logits_of(load(base)[0], ids) - want).max() > 0.1
    for name, model in clients.items():
        # The files are compared, not mlx-lm's rounding of Gemma 3's scale (5e-3 of a logit).
        correct(model, policy.config)
        assert abs(logits_of(model, ids) - want).max() < 1e-4, name
        assert (greedy_of(model, ids) == words).all(), name
    assert [t.folder for t in exported.targets.values()] == ["mlx", "peft", ".", "fused"]
    record = json.loads((exported.out / "export.json").read_text())
    assert record["targets"]["hf"]["fidelity"]["passed"] and str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(
    "lora",
    [
        {"method": "dora"},
        {"keys": ["self_attn.q_proj", "mlp.down_proj"], "layers": 2},
        {"keys": ["self_attn.v_proj", "lm_head"]},
    ],
    ids=["dora", "two layers", "head"],
)
def test_other_adapters(lora, tmp_path, cache):
    run = other_adapter(trained_run(tmp_path, "qwen3"), **lora)
    exported = export(run, EXACT, tmp_path / "out")
    check(exported)
    settings = json.loads((tmp_path / "out/peft/adapter_config.json").read_text())
    if lora.get("layers"):
        assert settings["layers_to_transform"] == [1, 2] and settings["target_modules"] == ["down_proj", "q_proj"]
    if "lm_head" in lora.get("keys", ()):
        assert "lm_head" in settings["target_modules"] and settings["layers_to_transform"] is None


def test_full_training_has_no_peft_form(tmp_path, cache):
    run = trained_run(tmp_path, "llama", lora={"method": "full"}, optim={"lr": 3e-3, "warmup": 0.0})
    check(export(run, ["mlx", "hf", "fused"], tmp_path / "out"))
    with pytest.raises(UserError, match="trained every weight, so there is no adapter; export --to hf"):
        export(run, ["peft"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tied_embedding_is_fused_in_both_places_and_refused_by_peft(tmp_path, cache):
    folder = write_model(tmp_path / "llama", chatml_tokenizer())
    arrays = mx.load(str(folder / "model.safetensors"))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]  # stored twice, as some checkpoints do
    mx.save_safetensors(str(folder / "model.safetensors"), dict(arrays), {"format": "pt"})
    run = other_adapter(trained_run(tmp_path), keys=["model.embed_tokens", "mlp.up_proj"])
    check(export(run, ["mlx", "hf", "fused"], tmp_path / "out"))
    after = mx.load(str(tmp_path / "out/model.safetensors"))
    assert not mx.array_equal(after["lm_head.weight"], arrays["lm_head.weight"])
    assert mx.array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    with pytest.raises(UserError, match=r"`model.embed_tokens` is adapted and is also the head"):
        export(run, ["peft"], tmp_path / "other")


def test_only_trained_tensors_change_and_shards_stay(tmp_path, cache):
    folder = split_in_shards(write_model(tmp_path / "llama", chatml_tokenizer()))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "LICENSE").write_text("free")
    run = trained_run(tmp_path, lora={"rank": 4, "scale": 4.0, "keys": ["self_attn.q_proj"], "layers": 1})
    check(export(run, ["hf"], tmp_path / "out"))
    for file in sorted(folder.glob("*.safetensors")):
        (before, begin), (after, _) = safetensors_header(file), safetensors_header(tmp_path / "out" / file.name)
        assert before == after
        raw = [path.read_bytes()[begin:] for path in (file, tmp_path / "out" / file.name)]
        for name, entry in before.items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                same = raw[0][low:high] == raw[1][low:high]
                assert same != (name == "model.layers.2.self_attn.q_proj.weight"), name
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_bfloat16_weights_are_rounded_once(tmp_path, cache):
    folder = write_model(tmp_path / "llama", chatml_tokenizer())
    arrays = {n: a.astype(mx.bfloat16) for n, a in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    run = trained_run(tmp_path)
    check(export(run, ["mlx", "hf", "fused"], tmp_path / "out"), kl=1e-3, slope=2e-2)
    name = "model.layers.0.mlp.up_proj"
    adapter = mx.load(str(run.adapter / "adapters.safetensors"))
    delta = 4.0 * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
    want = (arrays[f"{name}.weight"].astype(mx.float32) + delta).astype(mx.bfloat16)
    assert mx.array_equal(mx.load(str(tmp_path / "out/model.safetensors"))[f"{name}.weight"], want)


@pytest.fixture
def packed(tmp_path, cache):
    """A wide model, the same packed to 8 bits by mlx-lm, and a run on the packed one."""
    full = write_model(tmp_path / "full", chatml_tokenizer(), **WIDE)
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = load_model(full)
    model, config = quantize_model(model, config, 64, 8)
    save_model(tmp_path / "llama", model)
    save_config(config, tmp_path / "llama" / "config.json")
    for file in full.glob("token*"):
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    return full, trained_run(tmp_path)


def test_a_packed_base_is_unpacked_or_left_alone(packed, tmp_path):
    _, run = packed
    exported = export(run, ["mlx", "hf", "fused"], tmp_path / "out")
    check(exported, kl=1e-5)
    assert "quantization" not in json.loads((tmp_path / "out/config.json").read_text())
    arrays = mx.load(str(tmp_path / "out/model.safetensors"))
    assert {a.dtype for a in arrays.values()} == {mx.float32} and not any(n.endswith("scales") for n in arrays)
    fused, base = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("out/fused", "llama"))
    assert "model.layers.0.mlp.up_proj.scales" not in fused
    for part in ("weight", "scales", "biases"):  # never trained, never touched
        assert mx.array_equal(fused[f"model.embed_tokens.{part}"], base[f"model.embed_tokens.{part}"])
    assert exported.targets["fused"].relation == "quantized" and exported.targets["hf"].relation == "finetune"


def test_a_packed_run_goes_onto_the_full_model_that_is_named(packed, tmp_path):
    full, run = packed
    with pytest.raises(UserError, match="packed for MLX and torch cannot load it; name the full-precision model"):
        export(run, ["peft"], tmp_path / "out")
    exported = export(run, ["peft", "hf"], tmp_path / "out", choices=Choices(base=str(full)))
    assert exported.passed and exported.base_model == "full"
    name = "model.layers.1.self_attn.q_proj"
    adapter = mx.load(str(run.adapter / "adapters.safetensors"))
    delta = 4.0 * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
    stored, made = (mx.load(str(f / "model.safetensors"))[f"{name}.weight"] for f in (full, tmp_path / "out"))
    assert mx.allclose(made, stored + delta, atol=1e-6)
    other = write_model(tmp_path / "other", chatml_tokenizer(), seed=5, **WIDE)
    with pytest.raises(UserError, match=r"differs from the run's by .* of its size; name the full-precision model"):
        export(run, ["hf"], tmp_path / "wrong", choices=Choices(base=str(other)))
    assert not (tmp_path / "wrong").exists()


def test_weights_packed_when_loading_leave_as_they_computed(tmp_path, cache):
    write_model(tmp_path / "llama", chatml_tokenizer(), **WIDE)
    run = trained_run(tmp_path, model={"quantize": 8})
    exported = export(run, ["hf", "fused", "quantized"], tmp_path / "out", choices=Choices(bits=8))
    check(export(run, ["hf", "fused"], tmp_path / "out"))
    assert exported.targets["quantized"].kept and exported.targets["quantized"].fidelity.token_kl > 0


def test_experts_are_fused_one_by_one(tmp_path, cache):
    write_experts(tmp_path / "qwen3_moe", chatml_tokenizer())
    run = trained_run(tmp_path, "qwen3_moe")
    check(export(run, ["mlx", "hf", "fused"], tmp_path / "out"))
    before, after = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("qwen3_moe", "out"))
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(np.array(before[n]), np.array(after[n]))}
    assert sum(".experts." in name for name in changed) > 10
    with pytest.raises(UserError, match="adapts a stack of experts, which PEFT does not support"):
        export(run, ["peft"], tmp_path / "other")


def test_a_base_that_mlx_lm_alone_cannot_load_is_refused_for_its_adapter(tmp_path, cache):
    """transformers 5 writes `rope_parameters`, and mlx-lm's mixtures know no default for what they call rope_theta."""
    folder = write_experts(tmp_path / "qwen3_moe", chatml_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
    (folder / "config.json").write_text(json.dumps(config | rope))
    run = trained_run(tmp_path, "qwen3_moe")
    with pytest.raises(
        UserError, match=r"cannot load qwen3_moe \(.*rope_theta.*\), whose .*export --to fused or server"
    ):
        export(run, ["mlx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check(export(run, ["fused", "server"], tmp_path / "out"))


def test_an_export_ends_where_training_taught_it_to(tmp_path, cache):
    """config.json ends at one token, the template's turns at another: transformers and mlx_lm stop at both."""
    from mlx_lm.utils import load_config

    tokenizer = chatml_tokenizer()
    folder = write_model(tmp_path / "llama", tokenizer)
    change(folder / "config.json", eos_token_id=7)
    run = trained_run(tmp_path)
    check(export(run, ["hf", "fused"], tmp_path / "out"))
    want = [7, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for out in (tmp_path / "out", tmp_path / "out" / "fused"):
        assert load_config(out)["eos_token_id"] == want
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 7
