"""A model taken apart into embedding, layers, norm and head, where that is known to be exact.

White-listed by mlx-lm's module name; everything else takes the plain path `model(x)`. At the start of a run
`preflight.choose_forward` still compares both paths on real rows: a list is knowledge about one version of mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.fused_head import Head, head_of

Mask = str | mx.array


class ModelParts(NamedTuple):
    """Parts of a model. `windows` holds each layer's sliding window in tokens, or None where it sees everything."""

    embed: Callable[[mx.array], mx.array]
    layers: Sequence[nn.Module]
    windows: Sequence[int | None]
    mask: Callable[[int, int, int | None], Mask]
    norm: nn.Module
    head: Head


class Family(NamedTuple):
    """How a group of architectures departs from embed -> layers -> norm -> linear head.

    `scale` multiplies embeddings, `after` follows the linear head, `windows` names each layer's window, `array` asks
    for array masks, because the attention has no other.
    """

    scale: Callable[[Any, mx.array], mx.array] = lambda args, h: h
    softcap: Callable[[Any], float | None] = lambda args: None
    factor: Callable[[Any], float] = lambda args: 1.0
    windows: Callable[[Any], list[int | None]] = lambda model: [None] * len(model.layers)
    array: bool = False


def _root_scaled(args: Any, h: mx.array) -> mx.array:
    return h * args.hidden_size**0.5


def _rounded_root_scaled(args: Any, h: mx.array) -> mx.array:
    # Gemma 3 was trained with the factor rounded to bfloat16.
    return h * mx.array(args.hidden_size**0.5, mx.bfloat16).astype(h.dtype)


def _llama_windows(model: Any) -> list[int | None]:
    return [model.sliding_window if layer.use_sliding else None for layer in model.layers]


def _gemma3_windows(model: Any) -> list[int | None]:
    every = model.sliding_window_pattern
    return [None if i % every == every - 1 else model.window_size for i in range(len(model.layers))]


STANDARD = Family()
FAMILIES: dict[str, Family] = {
    "llama": Family(windows=_llama_windows),
    "smollm3": Family(windows=_llama_windows),
    "qwen2": STANDARD,
    "qwen3": STANDARD,
    "qwen3_moe": STANDARD,
    "mixtral": STANDARD,
    "phi3": STANDARD,
    "olmo2": STANDARD,
    "starcoder2": STANDARD,
    "gemma": Family(scale=_root_scaled),
    "gemma2": Family(scale=_root_scaled, softcap=lambda args: args.final_logit_softcapping, array=True),
    "gemma3_text": Family(scale=_rounded_root_scaled, windows=_gemma3_windows),
    "cohere": Family(factor=lambda args: args.logit_scale),
    "granite": Family(scale=lambda args, h: h * args.embedding_multiplier, factor=lambda args: 1 / args.logits_scaling),
}


def model_parts(model: Any) -> ModelParts | None:
    """The parts of `model`, or None when its architecture is not on the white list."""
    family = FAMILIES.get(type(model).__module__.rsplit(".", 1)[-1])
    inner = getattr(model, "model", None)
    if family is None or inner is None:
        return None
    args = model.args
    return ModelParts(
        embed=lambda tokens: family.scale(args, inner.embed_tokens(tokens)),
        layers=inner.layers,
        windows=family.windows(inner),
        mask=_array_mask if family.array else causal_mask,
        norm=inner.norm,
        head=head_of(model, family.softcap(args), family.factor(args)),
    )


def known_parts(model: Any) -> ModelParts:
    """The parts of a model that is on the white list."""
    parts = model_parts(model)
    assert parts is not None  # callers choose the fast path only where there are parts
    return parts


def causal_mask(queries: int, offset: int, window: int | None) -> Mask:
    """The mask of `queries` tokens after `offset` others: "causal" wherever it says all, so that MLX keeps the
    attention that takes less memory; an array only where a sliding window really cuts something off."""
    if window is None or offset + queries <= window:
        return "causal"
    return _array_mask(queries, offset, window)


def _array_mask(queries: int, offset: int, window: int | None) -> mx.array:
    """(queries, offset + queries) bool, True where a query may look."""
    query, key = mx.arange(offset, offset + queries)[:, None], mx.arange(offset + queries)[None]
    causal = query >= key
    return causal if window is None else causal & (query < key + window)
