"""Rotary positions as GGUF holds them: a base, perhaps a linear factor, perhaps Llama 3's table of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.types import UserError


class Rope(NamedTuple):
    """`kind` is none, linear or llama3; `settings` are the configuration's own."""

    base: float
    kind: str
    factor: float
    settings: Mapping[str, Any]


def rope_of(config: Mapping[str, Any]) -> Rope:
    """What a config.json says about rotary positions. Raises `UserError` for a scaling without a place in the file."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(config.get("rope_theta") or settings.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(base, "none", 1.0, settings)
    if kind not in ("linear", "llama3"):
        raise UserError(f"gguf: rope scaling `{kind}` is not known to this converter, only linear and llama3 are")
    return Rope(base, kind, float(settings["factor"]), settings)


def frequency_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """(head_dim / 2,) float32: what Llama 3's scaling divides each frequency by, or None without it.

    Wavelengths beyond context / low_freq_factor are stretched by `factor`, those below context / high_freq_factor not
    at all, in between by a linear blend of frequencies (Llama 3.1's reference code; arXiv 2407.21783 section 3.4.2).
    """
    rope = rope_of(config)
    if rope.kind != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * math.pi * rope.base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = rope.settings["low_freq_factor"], rope.settings["high_freq_factor"]
    context = rope.settings["original_max_position_embeddings"]
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)
