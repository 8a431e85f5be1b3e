"""Each distinct token once: the shared prompt prefix runs once per prompt, each completion once per row.

One layer runs both passes at once, (prefix, suffix) -> (prefix, suffix): the keys and values it makes for the prefix
are used by its suffix inside the same function. So they never cross a checkpoint (captured there as constants they
would silently lose their gradient), and each layer's weights are read once for both passes. All rows have the same
prefix length, so the mask is just "causal" and the RoPE offset one number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.architectures import ModelParts
from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.streams import LayerPlan, pin_to_stream, run_layers


class Capture:
    """The cache object of the prefix pass: keeps the keys and values that the layer makes, (G, H, P, Dh)."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What mlx-lm's attention calls."""
        self.keys, self.values = keys, values
        return keys, values


class Prefixed:
    """The cache object of the suffix pass: each row's prefix keys and values come before its own."""

    def __init__(self, captured: Capture, spread: Callable[[mx.array], mx.array]):
        self.captured, self.spread, self.offset = captured, spread, captured.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What mlx-lm's attention calls."""
        before = self.spread(self.captured.keys), self.spread(self.captured.values)
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)


def spreader(group: mx.array, rows_per_prompt: int | None) -> Callable[[mx.array], mx.array]:
    """(G, ...) -> (R, ...): each prompt's array for each of its rows. `group` is (R,), the prompt of each row.

    With the same number of adjacent rows for every prompt it is a broadcast, whose gradient is a plain sum; otherwise
    a gather.
    """
    if rows_per_prompt is None:
        return lambda a: a[group]

    def repeat(a: mx.array) -> mx.array:
        """A broadcast, whose gradient is a plain sum."""
        wide = mx.broadcast_to(a[:, None], (a.shape[0], rows_per_prompt, *a.shape[1:]))
        return wide.reshape(-1, *a.shape[1:])

    return repeat


def hidden_states(
    trunk: ModelParts,
    prefix: mx.array,
    suffix: mx.array,
    spread: Callable[[mx.array], mx.array],
    checkpoint: Callable[..., Any] | None = None,
) -> mx.array:
    """(G, P) and (R, S) token ids -> (R, S, D) states of the suffix rows before the last norm. P may be 0.

    `checkpoint` is `checkpointed`, to compute each layer again in the backward pass instead of keeping its insides.
    """
    return run_layers([lambda: padded_layers(trunk, prefix, suffix, spread, checkpoint)])[0]


def padded_layers(
    trunk: ModelParts,
    prefix: mx.array,
    suffix: mx.array,
    spread: Callable[[mx.array], mx.array],
    checkpoint: Callable[..., Any] | None = None,
) -> LayerPlan:
    """The way of `hidden_states`."""
    run, layers = checkpoint or (lambda layer, function: function), zip(trunk.layers, trunk.windows, strict=True)
    if not prefix.shape[1]:
        masks = {window: trunk.mask(suffix.shape[1], 0, window) for window in trunk.windows}
        alone = [run(layer, _single(layer, masks[window])) for layer, window in layers]
        return LayerPlan((trunk.embed(suffix),), alone, lambda hs: hs)
    both = [run(layer, _joint(trunk, layer, window, spread)) for layer, window in layers]
    return LayerPlan((trunk.embed(prefix), trunk.embed(suffix)), both, lambda hp, hs: hs)


def _single(layer: Any, mask: Any) -> Callable[..., tuple[mx.array]]:
    def alone(hs: mx.array) -> tuple[mx.array]:
        """The layer on full rows, nothing shared."""
        with patched(attention_files(layer)):
            return (layer(hs, mask, None),)

    return alone


def _joint(
    trunk: ModelParts, layer: Any, window: int | None, spread: Callable[[mx.array], mx.array]
) -> Callable[..., Any]:
    def both(hp: mx.array, hs: mx.array) -> tuple[mx.array, mx.array]:
        """The layer on prefixes, then on the suffixes that look back at them."""
        captured, before = Capture(), hp.shape[1]
        with patched(attention_files(layer)):  # in here: a checkpoint calls this again in the backward pass
            hp = layer(hp, trunk.mask(before, 0, window), captured)
            return hp, layer(hs, trunk.mask(hs.shape[1], before, window), Prefixed(captured, spread))

    return both


def checkpointed(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of `layer`, computed again in the backward pass; the trained arrays enter as inputs."""
    return nn.utils.checkpoint(layer, pin_to_stream(function))
