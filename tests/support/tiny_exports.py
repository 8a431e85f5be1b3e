"""Tiny trained runs to export: far from their base, with held-out pairs of their own; tokenizers llama.cpp knows."""

import json

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tiny_models import write_model
from tiny_runs import recipe, trained_once, write_pairs
from tiny_tokenizers import CHATML, _merges, byte_level, chatml_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxdpo.config import LoraConfig
from mlxdpo.exporters.gguf_vocabulary import RULES
from mlxdpo.model.adapters import attach_lora, save_adapter
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run

TRAINED = {"lora": {"rank": 4, "scale": 4.0}, "optim": {"lr": 2e-2, "warmup": 0.0}}


def trained_run(folder, kind="llama", out="run", **sections) -> Run:
    """A finished run over `folder`/`kind` (made unless it is there), 10 pairs held out."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "gemma2" and not (folder / kind).exists():  # mlx-lm's knows no window, so it must not matter
        write_model(folder / kind, chatml_tokenizer(), kind, sliding_window=128)
    write_pairs(folder / "heldout.jsonl", 10, seed=7)
    parts = {name: TRAINED.get(name, {}) | sections.get(name, {}) for name in {*TRAINED, *sections}}
    parts["data"] = {"eval": str(folder / "heldout.jsonl")} | sections.get("data", {})
    return trained_once(folder, recipe(folder, out, kind, **parts))


END, TURN = "<|endoftext|>", "<|im_end|>"


def run_with_two_ends(folder) -> Run:
    """An SFT run that learned to answer "ok" and to end its turn with TURN; the base's files know END alone."""
    write_model(folder / "llama", byte_level((END, "<|im_start|>", TURN), template=CHATML, eos=END))
    rows = [{"prompt": f"{word} {n}?", "completion": "ok"} for n in range(6) for word in ("red", "blue")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"red {n}?", "chosen": "ok", "rejected": "no"} for n in range(4)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    steps = {"batch_size": 12, "gradient_accumulation": 1, "epochs": 40.0, "save_every": 99}
    quick = {"lora": {"method": "full"}, "optim": {"lr": 1e-2, "warmup": 0.0}, "train": steps}
    return trained_once(folder, recipe(folder, stage="sft", data={"template": "auto"}, **quick))


def other_adapter(run, size=0.05, **lora) -> Run:
    """The run with another adapter than it trained: random arrays under the settings `lora`."""
    settings = LoraConfig(**{"rank": 4, "scale": 4.0, **lora})
    model = load_policy(run.config().model).model
    attach_lora(model, settings)
    draw = np.random.default_rng(0)
    arrays = {n: a + mx.array(draw.normal(0, size, a.shape)) for n, a in tree_flatten(model.trainable_parameters())}
    model.load_weights([(n, a.astype(mx.float32)) for n, a in arrays.items()], strict=False)
    save_adapter(model, settings, run.adapter)
    return run


def known_tokenizer(rule="smollm"):
    """A byte-level tokenizer whose splitting rule has a name in llama.cpp."""
    splits, gpt2 = RULES[rule]
    steps = [
        pre_tokenizers.Digits(individual_digits=True) if s == "digits" else pre_tokenizers.Split(Regex(s), "isolated")
        for s in splits
    ]
    vocabulary, merges = _merges()
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def split_in_shards(folder, count=3):
    """The single weight file of a model folder as `count` shards with an index."""
    arrays = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names, where = sorted(arrays), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        where |= dict.fromkeys(names[i::count], file)
        mx.save_safetensors(str(folder / file), {n: arrays[n] for n in names[i::count]}, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def ids_of(seed=0, rows=3, length=24):
    """(rows, length) token ids that every tiny model knows."""
    return np.random.default_rng(seed).integers(3, 250, (rows, length))


def logits_of(model, ids):
    """(R, T, V) float32 logits of a model without its adapters' dropout."""
    model.eval()
    return np.array(model(mx.array(ids)).astype(mx.float32))


def greedy_of(model, ids, count=12):
    """(R, count) tokens that a model continues each row with, the likeliest each time; no cache."""
    rows = ids
    for _ in range(count):
        rows = np.concatenate([rows, logits_of(model, rows)[:, -1:].argmax(-1)], axis=1)
    return rows[:, ids.shape[1] :]
