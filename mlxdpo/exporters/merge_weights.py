"""What training did to a weight, as a function in float32: W -> W + delta, or what DoRA and full training made of it.

The delta is added in float32 and the sum rounded once. mlx-lm's own fuse rounds the delta first: at .3 % of the
weights' size that alone costs a tenth of its direction in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Change = Callable[[mx.array], mx.array]
"""A base weight -> the tuned one, both float32 and of one shape."""


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry an adapter, by path."""
    return {name: module for name, module in model.named_modules() if "lora_a" in module}


def base_of(module: Any) -> nn.Module:
    """The frozen layer under an adapter."""
    return module.linear if "linear" in module else module.embedding


def plain_weight(layer: Any) -> mx.array:
    """The weight of a frozen layer in float32, dequantised where it is packed."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    biases = layer.biases.astype(mx.float32) if layer.get("biases") is not None else None
    scales = layer.scales.astype(mx.float32) if layer.mode == "affine" else layer.scales
    return mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits, layer.mode).astype(mx.float32)


def delta(module: Any) -> mx.array:
    """What an adapter adds before DoRA's normalisation, float32, in its weight's shape.

    LoRA (arXiv 2106.09685 eq. 3): scale * (A B)^T for a linear layer with A (in, r), B (r, out); scale * A B for an
    embedding with A (words, r), B (r, D); scale * B A for each of a stack of experts.
    """
    a, b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if "embedding" in module:
        return module.scale * (a @ b)
    if b.ndim == 3:  # experts: A is kept as (E * r, in), B as (E, out, r)
        return module.scale * (b @ a.reshape(b.shape[0], -1, a.shape[-1]))
    return module.scale * (b.T @ a.T)


def tuned(module: Any, weight: mx.array) -> mx.array:
    """The weight that computes alone what `module` computes on top of `weight`; float32.

    DoRA (arXiv 2402.09353 eq. 5): m (W + delta) / ||W + delta||, norms over each output's row.
    """
    moved = weight + delta(module)
    if "m" not in module:
        return moved
    return module.m.astype(mx.float32)[:, None] * moved / mx.linalg.norm(moved, axis=1, keepdims=True)


def changes(model: nn.Module, method: str) -> dict[str, Change]:
    """Every changed parameter of a tuned model, named as in the plain model without adapters."""
    if method == "full":
        arrays: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        return {name: partial(_replaced, array) for name, array in arrays.items()}
    return {f"{name}.weight": partial(tuned, module) for name, module in adapted(model).items()}


def expert_change(change: Change, e: int) -> Change:
    """The change of expert `e` alone, where the model stacks experts and the checkpoint does not."""
    assert isinstance(change, partial)  # `changes` makes no others
    if change.func is _replaced:
        return partial(_replaced, change.args[0][e])
    return partial(_moved_expert, change.args[0], e)


def _moved_expert(module: Any, e: int, weight: mx.array) -> mx.array:
    a = module.lora_a.astype(mx.float32)
    a = a.reshape(module.lora_b.shape[0], -1, a.shape[-1])
    return weight + module.scale * (module.lora_b[e].astype(mx.float32) @ a[e])


def dequantised(model: nn.Module) -> dict[str, Change]:
    """For each packed layer of a model, adapted or not: its weight as it computes, whatever was stored."""
    found: dict[str, Change] = {}
    inside = {id(base_of(module)) for module in adapted(model).values()}
    for name, module in model.named_modules():
        if "lora_a" in module and "scales" in base_of(module):
            found[f"{name}.weight"] = partial(_tuned_plain, module)
        elif "scales" in module and id(module) not in inside:
            found[f"{name}.weight"] = partial(_plain_layer, module)
    return found


def _tuned_plain(module: Any, weight: mx.array) -> mx.array:
    return tuned(module, plain_weight(base_of(module)))


def _plain_layer(layer: Any, weight: mx.array) -> mx.array:
    return plain_weight(layer)


def _replaced(by: mx.array, weight: mx.array) -> mx.array:
    return by.astype(mx.float32)
