"""Random models of real width and few layers, besides SmolLM2: saved by transformers, as all sides load them.

    python -m benchmarks.peers.models hybrid FOLDER TOKENIZER_FOLDER       in an environment with torch

Loaded by name from the command of `benchmarks.peers`, which runs this in TRL's environment. Their time and memory are
those of real ones, layer by layer; their words are noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.adapter import KEYS as ATTENTION
from benchmarks.peers.environments import ROOT

SPREAD = 0.06  # of the weights: three times the usual, so that adapters move the loss within a few steps


class Kind(NamedTuple):
    """`config` and `model` are classes of transformers, `sizes` their arguments; `keys` the layers with adapters.

    `inside` is the type of the published model that has this one as its language model, or None.
    """

    what: str
    config: str
    model: str
    sizes: dict[str, Any]
    keys: tuple[str, ...]
    inside: str | None = None


KINDS = {
    "hybrid": Kind(
        "4 layers of Qwen3.5-0.8B: three with the gated delta rule, one with attention",
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "tie_word_embeddings": True,
        },
        (*ATTENTION, "linear_attn.in_proj_qkv", "linear_attn.out_proj"),
        "qwen3_5",
    ),
    "experts": Kind(
        "2 layers of OLMoE with the widths of Granite 3 1B A400M: 32 experts, 8 a token",
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
        },
        ATTENTION,
    ),
    "vocabulary": Kind(
        "4 layers of a llama with the widths of Qwen2.5-0.5B and its 151,936 words",
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 4,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
        ATTENTION,
    ),
}


def random_model(name: str, python: str, folder: Path, tokenizer: Path) -> Path:
    """The model of that name, made in `folder` by an interpreter that has torch and transformers.

    Raises `subprocess.CalledProcessError` when it cannot be made.
    """
    command = [python, "-m", "benchmarks.peers.models", name, str(folder), str(tokenizer)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def save_random(name: str, folder: str, tokenizer: str) -> None:
    """Write the model and its tokenizer, float32."""
    import torch
    import transformers

    kind, words = KINDS[name], transformers.AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"vocab_size": len(words), "max_position_embeddings": 4096, "initializer_range": SPREAD} | kind.sizes
    torch.manual_seed(0)
    config = getattr(transformers, kind.config)(**sizes, bos_token_id=None, eos_token_id=words.eos_token_id)
    getattr(transformers, kind.model)(config).float().save_pretrained(folder)
    words.save_pretrained(folder)
    if kind.inside:  # mlx-lm knows it in no other form
        own = config.to_dict()
        shared = {name: own[name] for name in ("tie_word_embeddings", "eos_token_id")}
        whole = {"model_type": kind.inside, "architectures": [kind.model], "text_config": own} | shared
        Path(folder, "config.json").write_text(json.dumps(whole, indent=1), "utf-8")


if __name__ == "__main__":
    save_random(*sys.argv[1:])
