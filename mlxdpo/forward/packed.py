"""Distinct tokens without padding: every matmul sees each token once, only attention sees rows.

Everything in a transformer but attention works token by token. So the model is run on all distinct tokens of a batch as
if each were a row of its own, (N, 1), with its position as its RoPE offset; where a layer calls attention, its queries,
keys and values are laid out as prompts and rows, and what comes back is laid down again. One call serves prefix and
suffix, and rows of unequal length cost what they hold.

This needs layers that keep nothing but keys and values, and that call `scaled_dot_product_attention` by the name in
their file, with the mask they asked for: that mask brings the layout and the window. The name is replaced while the
model runs (`patch_mlx_lm.patched`).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from mlxdpo.forward.attention import Branches
from mlxdpo.forward.find_head import NoFastWay, hidden_states
from mlxdpo.forward.fused_head import Head
from mlxdpo.forward.patch_mlx_lm import attention_files, causal_mask, own_attention, tree_attention
from mlxdpo.forward.shared_prefix import shares_caches
from mlxdpo.forward.token_rows import TokenRows, spreader, token_rows
from mlxdpo.forward.watch import watched_all
from mlxdpo.types import Batch


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
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        """Queries (R, H, S, Dh) of rows, keys and values (R, K, P + S, Dh), the prefix's before -> (R, H, S, Dh)."""
        if self.branches is not None:
            return tree_attention(q, k, v, scale, self.branches, window, sinks)
        return own_attention(q, k, v, None, scale, causal_mask(q.shape[2], self.prompts[1], window), sinks)


class PackedMask(str):
    """The mask of single tokens, "causal" to all others: it brings layout and window to attention. The mask and not the
    cache, because some layers have none and attend to an earlier layer's keys (gemma4). `scores` are queries
    (N, H, 1, D) and keys (N, K, 1, D) whose products are added to attention's."""

    layout: PackedLayout
    window: int | None
    scores: tuple[mx.array, mx.array] | None

    def __new__(cls, layout: PackedLayout, window: int | None = None, scores: Any = None) -> PackedMask:
        own = super().__new__(cls, "causal")
        own.layout, own.window, own.scores = layout, window, scores
        return own

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """(N, H, 1, Dh) queries, keys and values of single tokens -> (N, H, 1, Dh), each within its own row."""
        layout, window = self.layout, self.window
        if self.scores:  # a sum over dimensions more: they stand beside the others
            queries = mx.concatenate([queries, self.scores[0] / scale], axis=-1)
            keys = mx.concatenate([keys, self.scores[1]], axis=-1)
        count, shared = layout.prompts
        q, k, v = (a[:, :, 0] for a in (queries, keys, values))
        (rq, rk, rv), done = (_heads_first(layout.tokens.to_rows(a[count * shared :])) for a in (q, k, v)), []
        if shared:
            pq, pk, pv = (_heads_first(a[: count * shared].reshape(count, shared, *a.shape[1:])) for a in (q, k, v))
            done.append(own_attention(pq, pk, pv, None, scale, causal_mask(shared, 0, window), sinks))
            rk, rv = (mx.concatenate([layout.spread(a), b], axis=2) for a, b in ((pk, rk), (pv, rv)))
        done.append(layout.attend_rows(rq, rk, rv, scale, window, sinks))
        *before, rows = (_heads_first(a) for a in done)
        flat = [a.reshape(-1, *a.shape[2:]) for a in before]
        return mx.concatenate([*flat, layout.tokens.to_tokens(rows)])[:, :, None]


class PackedKeys(mx.array):
    """Keys (N, K, 1, D) that a layer multiplies itself, to add the scores to attention's (the rotary part of multi-head
    latent attention, arXiv 2405.04434 section 2.1.3): `queries @ keys.swapaxes(-1, -2)` is what attends with them."""

    layout: PackedLayout

    def swapaxes(self, *_: int) -> PackedKeys:
        """Themselves: only a product is made of it."""
        return self

    def __rmatmul__(self, queries: mx.array) -> PackedMask:
        return PackedMask(self.layout, scores=(queries, mx.array(self)))


class Packed(mlx_lm.ConcatenateKVCache):
    """The cache of one layer: `offset` (N,) is each token's position. With `shared` it keeps keys and values for
    another layer, which a checkpoint would have to give out. With `latent` what it gives as values is `PackedKeys`."""

    def __init__(self, layout: PackedLayout, shared: bool, latent: bool):
        self.layout, self.offset, self.shared, self.latent = layout, layout.offset, shared, latent

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What mlx-lm's attention calls."""
        if self.shared:
            self.keys, self.values = keys, values
        if self.latent:
            values = PackedKeys(values)
            values.layout = self.layout
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> PackedMask | None:
        """What mlx-lm calls where it makes a mask; none for layers that mask the scores of `PackedKeys` themselves."""
        return None if self.latent else PackedMask(self.layout, window_size)


def _heads_first(a: mx.array) -> mx.array:
    """(R, T, H, Dh) -> (R, H, T, Dh), and back."""
    return a.swapaxes(1, 2)


def _across_tokens(own: Any, states: mx.array) -> mx.array:
    """A map of each head meets all single tokens (N, H, 1, D) at once: for each alone it would be read again."""
    return own(states.swapaxes(0, 2)).swapaxes(0, 2)


def packed_states(model: nn.Module, head: Head, batch: Batch) -> mx.array:
    """(M, D): what enters the head at each of `batch.rest`. Raises `NoFastWay` for a model that cannot be packed."""
    caches = mlx_lm.make_prompt_cache(model)
    if not all(isinstance(cache, (mlx_lm.KVCache, mlx_lm.RotatingKVCache)) for cache in caches):
        raise NoFastWay("a layer keeps more than keys and values")
    if not attention_files(model):
        raise NoFastWay("its attention is written out in its own file")
    layout, prefix = PackedLayout(batch), batch.prefix
    maps = [module for module in model.modules() if isinstance(module, (MultiLinear, QuantizedMultiLinear))]
    tokens = mx.concatenate([prefix.reshape(-1), batch.rest])[:, None]
    caches = [Packed(layout, shares_caches(model, caches), bool(maps)) for _ in caches]
    with watched_all(maps, lambda _: _across_tokens):
        return hidden_states(model, head, tokens, caches)[prefix.size :, 0]
