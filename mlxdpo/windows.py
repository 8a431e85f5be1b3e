"""What an objective must know of all pairs of an optimizer step before their batches are differentiated one by one.

Sorting (AOT), the KL term (KTO) and means over tokens (SFT) couple the pairs of a step. Taken over the whole step, and
not over each batch as other trainers do, they leave the step the same however it is cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from mlxdpo.losses import Loss
from mlxdpo.types import Batch, Example, Pairs


def first(pairs: Pairs, count: int) -> Pairs:
    """The first `count` pairs: what follows only fills a batch."""
    return Pairs(*(None if a is None else a[..., :count] for a in pairs))


def together(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several batches in one."""
    columns = zip(*parts, strict=True)
    return Pairs(*(None if column[0] is None else mx.concatenate(column, axis=-1) for column in columns))


def look_over(
    loss: Loss,
    batches: Sequence[Sequence[Example]],
    laid_out: Callable[[], Iterable[Batch]],
    scorer: Callable[[Batch], Pairs],
) -> list[mx.array | None]:
    """For each batch of a step what the loss takes from all of the step's pairs, (K, pairs of the batch), or None.

    Where lengths are enough nothing is computed; else `laid_out` is asked for the batches and each is scored.
    """
    if not loss.looks:
        return [None] * len(batches)
    if loss.looks_at_logps:
        scored = zip(laid_out(), batches, strict=True)
        parts = [first(scorer(batch), len(examples)) for batch, examples in scored]
    else:
        parts = [_lengths(examples) for examples in batches]
    seen = loss.look(together(parts))
    assert seen is not None
    ends = [sum(map(len, batches[: n + 1])) for n in range(len(batches) - 1)]
    return list(mx.split(seen, ends, axis=1)) if ends else [seen]


def filled(seen: mx.array | None, pairs: int) -> mx.array | None:
    """(K, n) widened to a batch of `pairs`: what fills the batch gets what its first pair has."""
    if seen is None or seen.shape[1] == pairs:
        return seen
    return mx.concatenate([seen, mx.repeat(seen[:, :1], pairs - seen.shape[1], axis=1)], axis=1)


def _lengths(examples: Sequence[Example]) -> Pairs:
    """Pairs of which nothing but their lengths is known."""
    nothing = mx.zeros(len(examples))
    lengths = (mx.array([float(len(getattr(e, side))) for e in examples]) for side in ("chosen", "rejected"))
    return Pairs(nothing, nothing, nothing, nothing, *lengths)
