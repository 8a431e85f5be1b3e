"""Distinct tokens without padding: every matmul sees each token once, only attention sees rows.

Everything in a transformer layer but attention works token by token. So a layer is run on all distinct tokens of a
batch as if each were a row of its own, (N, 1, D), with its position as its RoPE offset; where the layer calls
attention, its queries, keys and values are laid out as prompts and rows, and what comes back is laid down again. One
call per layer serves prefix and suffix, nothing crosses a checkpoint, and rows of unequal length cost what they hold.

This needs a layer that calls `scaled_dot_product_attention` by the name in its file, with the cache object it was
given: the name is replaced while the layer runs (`patched`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.architectures import ModelParts
from mlxdpo.forward.attention import Branches
from mlxdpo.forward.layer_plan import LayerPlan
from mlxdpo.forward.patch_mlx_lm import attention_files, own_attention, patched, tree_attention
from mlxdpo.forward.token_rows import TokenRows, spreader, token_rows
from mlxdpo.types import Batch

LEAST_SAVING = 0.03  # share of tokens that packing must save to be worth laying rows out in every layer


class PackedLayout:
    """Where the tokens of a batch stand: G prompts of P tokens, then M others that make up the rows of attention.

    These are the batch's rows; or, where it has a `TokenTree`, one for each prompt, of all its tokens depth first, and
    `branches` say which of them a token sees. `offset` (G * P + M,) is the position of each token, `spread` gives
    each row its prompt's array.
    """

    def __init__(self, batch: Batch):
        count, shared = self.prompts = batch.prefix.shape
        self.tokens, self.spread = token_rows(batch), spreader(batch.group, batch.per_prompt or None)
        self.branches = None
        # Prefix tokens count from 0 in every prompt.
        prefix = mx.tile(mx.arange(shared, dtype=mx.int32), count)
        self.offset = mx.concatenate([prefix, batch.place]) if shared else batch.place
        if batch.tree is not None:
            order, home, until = batch.tree
            self.tokens, self.spread = TokenRows(order, home, most=1), lambda a: a
            # Every token behind the prefix sees all of it.
            all_see = mx.full((count, shared), shared + order.shape[1], mx.int32)
            place = mx.concatenate([prefix.reshape(count, shared), batch.place[order]], axis=1)
            self.branches = Branches(mx.concatenate([all_see, until + shared], axis=1), place)

    def attend_rows(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, parts: ModelParts, window: int | None
    ) -> mx.array:
        """Queries (R, H, S, Dh) of rows, keys and values (R, K, P + S, Dh), the prefix's before -> (R, H, S, Dh)."""
        if self.branches is not None:
            return tree_attention(queries, keys, values, scale, self.branches, window)
        mask = parts.mask(queries.shape[2], self.prompts[1], window)
        return own_attention(queries, keys, values, None, scale, mask)


class Packed:
    """The cache object of one layer's call: brings each token's position and knows the rows when attention comes."""

    def __init__(self, layout: PackedLayout, parts: ModelParts, window: int | None):
        self.layout, self.parts, self.window, self.offset = layout, parts, window, layout.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What mlx-lm's attention calls."""
        return keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """(N, H, 1, Dh) queries, keys and values of single tokens -> (N, H, 1, Dh), each within its own row."""
        layout, mask = self.layout, self.parts.mask
        count, shared = layout.prompts
        q, k, v = (a[:, :, 0] for a in (queries, keys, values))
        (rq, rk, rv), done = (_heads_first(layout.tokens.to_rows(a[count * shared :])) for a in (q, k, v)), []
        if shared:
            pq, pk, pv = (_heads_first(a[: count * shared].reshape(count, shared, *a.shape[1:])) for a in (q, k, v))
            done.append(own_attention(pq, pk, pv, None, scale, mask(shared, 0, self.window)))
            rk, rv = (mx.concatenate([layout.spread(a), b], axis=2) for a, b in ((pk, rk), (pv, rv)))
        done.append(layout.attend_rows(rq, rk, rv, scale, self.parts, self.window))
        *before, rows = (_heads_first(a) for a in done)
        flat = [a.reshape(-1, *a.shape[2:]) for a in before]
        return mx.concatenate([*flat, layout.tokens.to_tokens(rows)])[:, :, None]


def _heads_first(a: mx.array) -> mx.array:
    """(R, T, H, Dh) -> (R, H, T, Dh), and back."""
    return a.swapaxes(1, 2)


def can_pack(parts: ModelParts) -> bool:
    """Whether the layers call attention by name, so that packing is possible."""
    return bool(attention_files(parts.layers[0]))


def packing_is_worth_it(prompts: tuple[int, int], rows: tuple[int, int], rest: int) -> bool:
    """Whether packing saves enough: `prompts` (G, P), `rows` (R, S) and M distinct tokens behind the prefixes."""
    shared = prompts[0] * prompts[1]
    return shared + rest < (1 - LEAST_SAVING) * (shared + rows[0] * rows[1])


def packed_states(
    parts: ModelParts,
    tokens: mx.array,
    layout: PackedLayout,
    checkpoint: Callable[..., Any] | None = None,
) -> mx.array:
    """(G * P + M,) token ids -> (M, D) states behind the prefixes, before the last norm.

    `checkpoint` is `checkpointed`, to compute each layer again in the backward pass.
    """
    return packed_layers(parts, tokens, layout, checkpoint).run()


def packed_layers(
    parts: ModelParts, tokens: mx.array, layout: PackedLayout, checkpoint: Callable[..., Any] | None = None
) -> LayerPlan:
    """The layers of `packed_states`."""
    run, layers = checkpoint or (lambda layer, function: function), zip(parts.layers, parts.windows, strict=True)
    packed = [run(layer, _packed_layer(parts, layer, window, layout)) for layer, window in layers]
    return LayerPlan((parts.embed(tokens[:, None]),), packed, lambda h: h[layout.prompts[0] * layout.prompts[1] :, 0])


def _packed_layer(
    parts: ModelParts, layer: nn.Module, window: int | None, layout: PackedLayout
) -> Callable[..., tuple[mx.array]]:
    def one(h: mx.array) -> tuple[mx.array]:
        """The layer on all tokens at once."""
        with patched(attention_files(layer)):  # in here, because a checkpoint calls it again in the backward pass
            return (layer(h, None, Packed(layout, parts, window)),)

    return one
