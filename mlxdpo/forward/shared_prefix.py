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

from mlxdpo.forward.architectures import ModelParts
from mlxdpo.forward.layer_plan import LayerPlan
from mlxdpo.forward.patch_mlx_lm import attention_files, patched


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


def hidden_states(
    parts: ModelParts,
    prefix: mx.array,
    suffix: mx.array,
    spread: Callable[[mx.array], mx.array],
    checkpoint: Callable[..., Any] | None = None,
) -> mx.array:
    """(G, P) and (R, S) token ids -> (R, S, D) states of the suffix rows before the last norm. P may be 0.

    `checkpoint` is `checkpointed`, to compute each layer again in the backward pass.
    """
    return padded_layers(parts, prefix, suffix, spread, checkpoint).run()


def padded_layers(
    parts: ModelParts,
    prefix: mx.array,
    suffix: mx.array,
    spread: Callable[[mx.array], mx.array],
    checkpoint: Callable[..., Any] | None = None,
) -> LayerPlan:
    """The layers of `hidden_states`."""
    run, layers = checkpoint or (lambda layer, function: function), zip(parts.layers, parts.windows, strict=True)
    if not prefix.shape[1]:
        masks = {window: parts.mask(suffix.shape[1], 0, window) for window in parts.windows}
        alone = [run(layer, _rows_layer(layer, masks[window])) for layer, window in layers]
        return LayerPlan((parts.embed(suffix),), alone, lambda hs: hs)
    both = [run(layer, _prefix_layer(parts, layer, window, spread)) for layer, window in layers]
    return LayerPlan((parts.embed(prefix), parts.embed(suffix)), both, lambda hp, hs: hs)


def _rows_layer(layer: Any, mask: Any) -> Callable[..., tuple[mx.array]]:
    def alone(hs: mx.array) -> tuple[mx.array]:
        """The layer on full rows, nothing shared."""
        with patched(attention_files(layer)):
            return (layer(hs, mask, None),)

    return alone


def _prefix_layer(
    parts: ModelParts, layer: Any, window: int | None, spread: Callable[[mx.array], mx.array]
) -> Callable[..., Any]:
    def both(hp: mx.array, hs: mx.array) -> tuple[mx.array, mx.array]:
        """The layer on prefixes, then on the suffixes that look back at them."""
        captured, before = Capture(), hp.shape[1]
        with patched(attention_files(layer)):  # in here: a checkpoint calls this again in the backward pass
            hp = layer(hp, parts.mask(before, 0, window), captured)
            return hp, layer(hs, parts.mask(hs.shape[1], before, window), Prefixed(captured, spread))

    return both
