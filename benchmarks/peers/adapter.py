"""The adapter every side starts from: written once, in mlx-lm's names and layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

KEYS = ("self_attn.q_proj", "self_attn.v_proj")
RANK, SCALE = 8, 2.0  # PEFT's alpha is 16


def write_adapter(model: Path, file: Path, keys: Sequence[str] = KEYS) -> None:
    """`lora_a` (in, rank) uniform within 1/sqrt(in), `lora_b` (rank, out) zero, for each of `keys` that a block of the
    folder's weights has."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    shapes: dict[str, tuple[int, int]] = {}
    for part in sorted(model.glob("*.safetensors")):
        with safe_open(part, framework="numpy") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    draw, arrays, block = np.random.default_rng(0), {}, 0
    while found := {key: shapes.get(f"model.layers.{block}.{key}.weight") for key in keys}:
        if not any(found.values()):
            break
        for key, shape in found.items():
            if shape:
                out, width = shape
                a = draw.uniform(-1, 1, (width, RANK)) / np.sqrt(width)
                arrays[f"model.layers.{block}.{key}.lora_a"] = a.astype(np.float32)
                arrays[f"model.layers.{block}.{key}.lora_b"] = np.zeros((RANK, out), np.float32)
        block += 1
    save_file(arrays, file)
