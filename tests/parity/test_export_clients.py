"""What was exported, loaded by its real clients on torch: `peft.PeftModel` and `transformers.AutoModelForCausalLM`.

Greedy tokens identical and logits within 1e-3 of the run, for llama, qwen3, gemma2 and gemma3.
"""

import gc
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_exports import greedy_of, ids_of, logits_of, other_adapter, run_with_two_ends, split_in_shards, trained_run
from tiny_models import CONFIGS, write_model
from tiny_tokenizers import chatml_tokenizer
from torch_side import load_torch
from transformers import AutoTokenizer

from mlxdpo.config import ModelConfig
from mlxdpo.exporters import export
from mlxdpo.exporters.peft import import_peft
from mlxdpo.forward.logprobs import next_token_logps
from mlxdpo.model.adapters import load_adapter, load_run
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOLERANCE = 1e-3


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids, np.int64)), use_cache=False).logits.float().numpy()


def torch_greedy(model, ids, count):
    rows = np.asarray(ids)
    for _ in range(count):
        rows = np.concatenate([rows, torch_logits(model, rows)[:, -1:].argmax(-1)], axis=1)
    return rows[:, np.asarray(ids).shape[1] :]


def hold_against(model, want, words, ids, name):
    gap = float(abs(torch_logits(model, ids) - want).max())
    same = (torch_greedy(model, ids, words.shape[1]) == words).all()
    print(f"{name}: logits within {gap:.1e} of the run's (up to {abs(want).max():.0f}), greedy tokens equal: {same}")
    assert gap <= TOLERANCE and same, name


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_torch_clients(kind, method, tmp_path, cache):
    if kind == "gemma3_text":  # mlx-lm rounds the root of its width to bfloat16, transformers does not: 8 is 8 in both
        write_model(tmp_path / kind, chatml_tokenizer(), kind, hidden_size=64, head_dim=16)
    lora = {"method": method} if method == "full" else {"method": method, "rank": 4, "scale": 4.0}
    optim = {"lr": 3e-3 if method == "full" else 2e-2, "warmup": 0.0}
    run = trained_run(tmp_path, kind, lora=lora, optim=optim)
    out = export(run, ["hf"] if method == "full" else ["hf", "peft"], tmp_path / "out").out
    tuned, ids = load_run(run), ids_of()
    want, words = logits_of(tuned.model, ids), greedy_of(tuned.model, ids, 8)
    hold_against(load_torch(out), want, words, ids, f"{kind} {method} hf")
    if method != "full":
        base = load_torch(tmp_path / kind)
        assert abs(torch_logits(base, ids) - want).max() > 100 * TOLERANCE
        hold_against(PeftModel.from_pretrained(base, out / "peft").eval(), want, words, ids, f"{kind} {method} peft")


@pytest.mark.parametrize(
    "lora",
    [{"keys": ["self_attn.q_proj", "mlp.down_proj"], "layers": 2}, {"keys": ["mlp.up_proj", "lm_head"]}],
    ids=str,
)
def test_some_layers_on_shards(lora, tmp_path, cache):
    split_in_shards(write_model(tmp_path / "qwen3", chatml_tokenizer(), "qwen3"))
    run = other_adapter(trained_run(tmp_path, "qwen3"), **lora)
    out = export(run, ["hf", "peft"], tmp_path / "out").out
    tuned, ids = load_run(run), ids_of()
    want, words = logits_of(tuned.model, ids), greedy_of(tuned.model, ids, 8)
    hold_against(load_torch(out), want, words, ids, "hf")
    adapter = PeftModel.from_pretrained(load_torch(tmp_path / "qwen3"), out / "peft").eval()
    hold_against(adapter, want, words, ids, "peft")


def test_an_adapter_that_peft_itself_wrote_is_imported(tmp_path, cache):
    from peft import LoraConfig, get_peft_model

    folder = write_model(tmp_path / "llama", chatml_tokenizer(), tie_word_embeddings=False)
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 6},
        use_rslora=True,
        use_dora=True,
        layers_to_transform=[1, 2],
    )
    theirs = get_peft_model(load_torch(folder), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    found = import_peft(tmp_path / "theirs", ModelConfig(path=str(folder)), tmp_path / "ours")
    ours = load_policy(ModelConfig(path=str(folder)))
    load_adapter(ours.model, tmp_path / "ours")
    ids = ids_of()
    gap = abs(logits_of(ours.model, ids) - torch_logits(theirs, ids)).max()
    print(f"imported {found.modules} modules, logits within {gap:.1e}")
    assert gap <= TOLERANCE


@pytest.mark.real
def test_smollm2_in_every_client(tmp_path):
    """MLXDPO_RUN names a finished run on the real SmolLM2, MLXDPO_EXPORT its export to mlx, peft, hf."""
    if not {"MLXDPO_RUN", "MLXDPO_EXPORT"} <= os.environ.keys():
        pytest.skip("MLXDPO_RUN and MLXDPO_EXPORT name no run and no export of it")
    run, out = Run.open(os.environ["MLXDPO_RUN"]), Path(os.environ["MLXDPO_EXPORT"])
    tuned = load_run(run)
    folder, prompt = tuned.folder, "I came home and the kitchen was"
    ids = np.array([tuned.tokenizer.encode(prompt)])
    want, words = logits_of(tuned.model, ids), greedy_of(tuned.model, ids, 12)
    print(repr(tuned.tokenizer.decode(words[0].tolist())))
    mine = np.array(next_token_logps(tuned.model, mx.array(ids)))
    import_peft(out / "peft", run.config().model, tmp_path / "back")
    again = load_policy(run.config().model)
    load_adapter(again.model, tmp_path / "back")
    gap = abs(np.array(next_token_logps(again.model, mx.array(ids))) - mine).max()
    print(f"run -> peft -> import -> score: log-probs within {gap:.1e}")
    assert gap <= 1e-5
    del again, tuned
    gc.collect()
    hold_against(load_torch(out), want, words, ids, "smollm2 hf")
    gc.collect()
    adapter = PeftModel.from_pretrained(load_torch(folder), out / "peft").eval()
    hold_against(adapter, want, words, ids, "smollm2 peft")


def test_an_export_stops_in_transformers_where_training_taught_it_to(tmp_path, cache):
    """The base's config.json names <|endoftext|>; turns end in <|im_end|>."""
    run = run_with_two_ends(tmp_path)
    out = export(run, ["hf"], tmp_path / "out", pairs=4, data=str(tmp_path / "heldout.jsonl")).out
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "red 3?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = load_torch(out).generate(**asked, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(found[0, asked["input_ids"].shape[1] :]) == "ok<|im_end|>"
