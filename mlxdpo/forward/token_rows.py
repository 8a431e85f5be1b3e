"""From distinct tokens to the rows they make up and back, with gradients whose sums have one order.

MLX differentiates a gather by a scatter that adds. On a GPU the addends of one place meet in any order (atomics), so
two runs would differ in their last bits. Here the gradient of a gather is a gather too: where several rows use the same
token or prompt, what comes back from them is added by doubling steps along the rows.

Rows lie as `types.Batch` lays them: rows that share a token are adjacent, it stands in the same column of each, and
`home` is the first of its places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxdpo.forward.layer_plan import with_gradient
from mlxdpo.machine.device import this_machine
from mlxdpo.types import Batch

Spread = Callable[[mx.array], mx.array]
"""(G, ...) -> (R, ...): each prompt's array for each of its rows."""


def _one_order(function: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a `gradient` that is a gather. A CPU adds in one order anyway, and faster: there it is MLX's."""
    return function if this_machine().kind == "cpu" else with_gradient(function, gradient)


def _masked(mask: mx.array, a: mx.array) -> mx.array:
    """`a` where `mask`, of its leading dimensions, holds; 0 elsewhere."""
    return mx.where(mask.reshape(*mask.shape, *[1] * (a.ndim - mask.ndim)), a, mx.zeros((), a.dtype))


def _sum_repeats(a: mx.array, keys: mx.array, most: int) -> mx.array:
    """(R, ...) -> the same, where each entry has become the sum of itself and of those directly below it that have the
    same of `keys` (leading dimensions of `a`); at most `most` in a run. The first of a run has its whole sum."""
    step = 1
    while step < min(most, a.shape[0]):
        below = _masked(keys[step:] == keys[:-step], a[step:])
        a = mx.concatenate([a[:-step] + below, a[-step:]])
        step *= 2
    return a


def _found(keys: mx.array, wanted: mx.array, a: mx.array) -> mx.array:
    """Of `a` (N, ...) the first whose key, of the ascending `keys` (N,), is each of `wanted`; 0 where none is."""
    low, high = mx.zeros(wanted.shape, mx.int32), mx.full(wanted.shape, keys.shape[0], mx.int32)
    for _ in range(keys.shape[0].bit_length()):
        middle = (low + high) // 2
        below = keys[mx.minimum(middle, keys.shape[0] - 1)] < wanted
        low, high = mx.where(below & (low < high), middle + 1, low), mx.where(below, high, middle)
    at = mx.minimum(low, keys.shape[0] - 1)
    return _masked((low < keys.shape[0]) & (keys[at] == wanted), a[at])


class TokenRows:
    """Where M distinct tokens stand in R rows of S: `rows` (R, S) and `home` (M,) as in a `Batch`.

    `most` is how many rows may share a token: the rows of a prompt.
    """

    def __init__(self, rows: mx.array, home: mx.array, most: int):
        self.rows, self.home, self.most = rows, home, most

    def to_rows(self, a: mx.array) -> mx.array:
        """(M, ...) -> (R, S, ...): what only pads a row is some token."""
        return _one_order(lambda a: a[self.rows], lambda primals, ct, _: self._sum_tokens(ct))(a)

    def to_tokens(self, a: mx.array) -> mx.array:
        """(R, S, ...) -> (M, ...): each token as the first row that has it holds it."""

        def gradient(primals: Any, ct: mx.array, _: Any) -> mx.array:
            """Each token's at its home; nothing elsewhere."""
            places = mx.arange(self.rows.size).reshape(self.rows.shape)
            return _masked(self.home[self.rows] == places, ct[self.rows])

        return _one_order(lambda a: a.reshape(-1, *a.shape[2:])[self.home], gradient)(a)

    def scored(self, a: mx.array, batch: Batch) -> mx.array:
        """(M, ...) -> (N, ...): what predicts each target of the batch."""

        def gradient(primals: Any, ct: mx.array, _: Any) -> mx.array:
            """Targets sorted by the token that predicts them, those of one token added up."""
            rows, tokens = self.rows.shape[0], self.home.shape[0]
            order = mx.argsort(mx.where(batch.scored > 0, batch.positions, tokens) * rows + batch.owner)
            keys = mx.where(batch.scored > 0, batch.positions, tokens)[order]
            return _found(keys, mx.arange(tokens), _sum_repeats(ct[order], keys, rows))

        return _one_order(lambda a: a[batch.positions], gradient)(a)

    def scored_in_rows(self, a: mx.array, batch: Batch) -> mx.array:
        """(R, S, ...) -> (N, ...): what predicts each target, each row from its own tokens."""
        own = batch.owner * self.rows.shape[1] + self.home[batch.positions] % self.rows.shape[1]
        # Targets stand one row after the other, those of a row from left to right: places ascend.
        keys = mx.where(batch.scored > 0, own, self.rows.size)
        places = mx.arange(self.rows.size).reshape(self.rows.shape)
        gather = lambda a: a.reshape(-1, *a.shape[2:])[own]  # noqa: E731
        return _one_order(gather, lambda primals, ct, _: _found(keys, places, ct))(a)

    def _sum_tokens(self, ct: mx.array) -> mx.array:
        """(R, S, ...) -> (M, ...): what all rows that share a token hold of it, added up."""
        whole = _sum_repeats(ct, self.rows, self.most).reshape(-1, *ct.shape[2:])
        real = self.rows.reshape(-1)[self.home] == mx.arange(self.home.shape[0])  # others only fill the shape
        return _masked(real, whole[self.home])


def token_rows(batch: Batch) -> TokenRows:
    """The rows of a batch."""
    return TokenRows(batch.rows, batch.home, batch.per_prompt or batch.rows.shape[0])


def spreader(group: mx.array, rows_per_prompt: int | None) -> Spread:
    """(G, ...) -> (R, ...): each prompt's array for each of its rows. `group` is (R,), the prompt of each row.

    With the same number of adjacent rows for every prompt it is a broadcast, whose gradient is a plain sum; otherwise
    a gather.
    """
    if rows_per_prompt is None:
        return lambda a: _one_order(lambda a: a[group], lambda primals, ct, _: _sum_rows(primals, ct, group))(a)

    def repeat(a: mx.array) -> mx.array:
        """A broadcast. A CPU gets copies, whose gradients MLX adds: its sum over a broadcast takes 25 times as long."""
        copied = this_machine().kind == "cpu"
        shape = (a.shape[0], rows_per_prompt, *a.shape[1:])
        wide = mx.stack([a] * rows_per_prompt, axis=1) if copied else mx.broadcast_to(a[:, None], shape)
        return wide.reshape(wide.shape[0] * rows_per_prompt, *a.shape[1:])  # of an empty array too

    return repeat


def _sum_rows(primals: Any, ct: mx.array, group: mx.array) -> mx.array:
    """(R, ...) -> (G, ...): the sum over each prompt's rows."""
    prompts = primals[0].shape[0] if isinstance(primals, (list, tuple)) else primals.shape[0]
    owns = group[None] == mx.arange(prompts)[:, None]
    return _masked(owns.any(axis=1), _sum_repeats(ct, group, ct.shape[0])[owns.argmax(axis=1)])


def row_sums(a: mx.array, batch: Batch) -> mx.array:
    """(N,) numbers of tokens -> (R,) sums over each row's scored tokens."""
    owns = batch.owner[None] == mx.arange(batch.length.shape[0])[:, None]
    return mx.where(owns, a * batch.scored, 0.0).sum(axis=1)


def of_rows(a: mx.array, index: mx.array) -> mx.array:
    """(R,) numbers of rows -> those of the rows `index`, of any shape."""
    return mx.where(index[..., None] == mx.arange(a.shape[0]), a, 0.0).sum(axis=-1)
