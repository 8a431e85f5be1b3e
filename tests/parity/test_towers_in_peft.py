"""Text towers inside models for images and sound: adapters on the language model alone, which PEFT loads.

Tiny models that transformers saved, under the names that it writes and under those that it has in memory.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_exports import ids_of, logits_of, other_adapter, trained_run
from tiny_tokenizers import chatml_tokenizer
from transformers import AutoModelForImageTextToText

from benchmarks.models.tiny import tiny_model
from mlxdpo.config import ModelConfig
from mlxdpo.exporters import export
from mlxdpo.exporters.peft import import_peft
from mlxdpo.model.adapters import load_adapter, load_run
from mlxdpo.model.policy import load_policy

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NO_WINDOW = {"mistral3": {"sliding_window": None}}  # mlx-lm's llama has none
ADAPTED = {
    "llama4": {"keys": ["self_attn.q_proj", "self_attn.v_proj", "language_model.lm_head"]}
}  # its experts are stacked
KINDS = ("gemma3", "gemma4", "lfm2_vl", "llama4", "mistral3", "qwen2_vl", "qwen3_vl")


def saved(kind, folder):
    model = tiny_model(kind, NO_WINDOW.get(kind, {}))
    model.save_pretrained(folder / kind)
    chatml_tokenizer().save_pretrained(folder / kind)
    return model


def text_logits(model, ids):
    inner = getattr(model, "base_model", model)
    inner = getattr(inner, "model", inner) if isinstance(model, PeftModel) else model
    if type(inner).__name__ == "Llama4ForConditionalGeneration":  # it fails where there is no image
        inner = inner.language_model
    with torch.no_grad():
        return inner(input_ids=torch.tensor(np.asarray(ids, np.int64)), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_over_transformers_computes_what_the_run_does(kind, tmp_path, cache):
    base = saved(kind, tmp_path)
    run = other_adapter(trained_run(tmp_path, kind, train={"steps": 1}), **ADAPTED.get(kind, {}))
    out = export(run, ["hf", "peft", "fused"], tmp_path / "out", pairs=4).out
    tuned, ids = load_run(run), ids_of()
    want = logits_of(tuned.model, ids)
    assert abs(text_logits(base, ids) - want).max() > 0.1
    with_peft = PeftModel.from_pretrained(base, out / "peft").eval()
    reached = {name.partition(".lora_")[0] for name, _ in with_peft.named_parameters() if ".lora_" in name}
    assert reached and all("language_model" in name and "vision" not in name for name in reached)
    for name, model in (("peft", with_peft), ("hf", AutoModelForImageTextToText.from_pretrained(out, dtype="float32"))):
        gap = abs(text_logits(model.eval(), ids) - want).max()
        print(f"{kind} {name}: logits within {gap:.1e} of the run's")
        assert gap < 2e-3, name
    back = import_peft(out / "peft", run.config().model, tmp_path / "back")
    again = load_policy(run.config().model)
    load_adapter(again.model, tmp_path / "back")
    assert back.modules == len(reached) and abs(logits_of(again.model, ids) - want).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_both_namings_of_a_checkpoint_are_one_model(kind, tmp_path, cache):
    model = saved(kind, tmp_path)
    want = text_logits(model, ids_of())
    folder = tmp_path / kind
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name in ("as written", "as in memory"):
        if name == "as in memory":
            arrays = {key: mx.array(value.numpy()) for key, value in model.state_dict().items()}
            if config.get("tie_word_embeddings", True):
                arrays.pop("lm_head.weight", None)
            mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
        policy = load_policy(ModelConfig(path=str(folder), dtype="float32"))
        assert abs(logits_of(policy.model, ids_of()) - want).max() < 2e-3, name
