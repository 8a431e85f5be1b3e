"""The adapter every side starts from: written once, in mlx-lm's names and layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

KEYS = ("self_attn.q_proj", "self_attn.v_proj")
RANK, SCALE = 8, 2.0  # PEFT's alpha is 16


def write_adapter(model: Path, file: Path) -> None:
    """`lora_a` (in, rank) uniform within 1/sqrt(in), `lora_b` (rank, out) zero, for every block of a llama folder."""
    from safetensors.numpy import save_file

    config = json.loads((model / "config.json").read_text("utf-8"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    outs = {KEYS[0]: heads * size, KEYS[1]: config["num_key_value_heads"] * size}
    draw, arrays = np.random.default_rng(0), {}
    for block in range(config["num_hidden_layers"]):
        for key, out in outs.items():
            a = draw.uniform(-1, 1, (width, RANK)) / np.sqrt(width)
            arrays[f"model.layers.{block}.{key}.lora_a"] = a.astype(np.float32)
            arrays[f"model.layers.{block}.{key}.lora_b"] = np.zeros((RANK, out), np.float32)
    save_file(arrays, file)
