"""The shared prefix of a prompt once, its rows behind it: through mlx-lm's own caches, whatever a layer keeps in them.

`model(prefix, cache=...)` leaves keys, values and states in the caches, they are spread from G prompts to R rows, and
`model(suffix, cache=...)` goes on from there. All rows have the same prefix length, so the mask is mostly just "causal"
and the RoPE offset one number. What right padding leaves in a state is read by nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_lm

from mlxdpo.forward.find_head import NoFastWay, hidden_states
from mlxdpo.forward.fused_head import Head
from mlxdpo.forward.patch_mlx_lm import causal_mask, patched
from mlxdpo.forward.token_rows import Spread


class WholeCache(mlx_lm.ConcatenateKVCache):
    """Keys and values of all tokens by concatenation: differentiable, of exact shapes, nothing dropped.

    A sliding window is left to the mask, for which a model names it: `windows`, in tokens, None for none.
    """

    # What models read off mlx-lm's rotating and chunked caches: nothing has been dropped from the front.
    start_position = _idx = 0

    def __init__(self, max_size: int | None = None):
        super().__init__()
        self.max_size, self.last = max_size, False
        self.windows: set[int | None] = set()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What mlx-lm's attention calls. What nobody reads again is not kept: a checkpoint would give it out."""
        if self.keys is not None:
            keys, values = (mx.concatenate(both, axis=2) for both in ((self.keys, keys), (self.values, values)))
        if not self.last:
            self.keys, self.values = keys, values
        self.offset = keys.shape[2]
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What mlx-lm calls where it makes a mask, for `N` queries."""
        self.windows.add(window_size)
        if N == 1 and not self.offset:
            return None
        return causal_mask(N, self.offset, window_size, return_array)

    def maybe_trim_front(self) -> None:
        """Nothing is dropped."""

    def size(self) -> int:
        """Tokens that are kept."""
        return self.offset


def fresh_caches(model: nn.Module) -> list[Any]:
    """Empty caches through which `model` can be differentiated, one for each layer, as generation makes its own.

    Raises `NoFastWay` for a cache of another kind.
    """
    return [_differentiable(cache) for cache in mlx_lm.make_prompt_cache(model)]


def _differentiable(cache: Any) -> Any:
    if isinstance(cache, (mlx_lm.KVCache, mlx_lm.RotatingKVCache, mlx_lm.ChunkedKVCache)):
        return WholeCache(getattr(cache, "max_size", None))
    if isinstance(cache, mlx_lm.CacheList):
        return mlx_lm.CacheList(*map(_differentiable, cache.caches))
    if isinstance(cache, mlx_lm.ArraysCache):  # states that are assigned
        return cache
    raise NoFastWay(f"a layer keeps a {type(cache).__name__}, which may not support gradients")


def sliding_windows(model: Any) -> set[int | None]:
    """The windows, in tokens, that layers ask for, None for those that see everything. Nothing is computed."""
    try:
        caches = fresh_caches(model)
    except NoFastWay:
        return set()
    model(mx.zeros((1, 2), mx.int32), cache=caches)
    return {window for cache in caches for window in getattr(cache, "windows", ())}


def whole_logits(model: Any, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T, V) logits of the model as generation runs it. Through caches: without them some are
    another function (mlx-lm's gemma3n)."""
    with patched([]):  # recurrences go through rows in chunks
        try:
            return model(tokens, cache=fresh_caches(model))
        except NoFastWay:
            return model(tokens)


def whole_states(model: nn.Module, head: Head, tokens: mx.array) -> mx.array:
    """(R, T) token ids of full rows -> (R, T, D), what enters the head."""
    return hidden_states(model, head, tokens, fresh_caches(model))


def prefixed_states(model: nn.Module, head: Head, prefix: mx.array, suffix: mx.array, spread: Spread) -> mx.array:
    """(G, P) and (R, S) token ids -> (R, S, D), what enters the head at the suffixes. P may be 0."""
    cache = fresh_caches(model)
    if prefix.shape[1]:
        hidden_states(model, head, prefix, cache)
        cache = [_spread(one, spread) for one in cache]
    for one in cache:
        if isinstance(one, WholeCache):
            one.last = not shares_caches(model, cache)
    return hidden_states(model, head, suffix, cache)


def shares_caches(model: Any, caches: Sequence[Any]) -> bool:
    """Whether a layer's cache may be read again in the same pass: where not each layer has its own."""
    return len(caches) != len(model.layers)


def _spread(one: Any, spread: Spread) -> Any:
    """A copy of a cache, of each array `spread`; all arrays have the batch in front, numbers stay."""
    if isinstance(one, mlx_lm._BaseCache):
        new = copy.copy(one)
        new.__dict__ = tree_map(lambda held: _spread(held, spread), vars(one))
        return new
    return spread(one) if isinstance(one, mx.array) else one
