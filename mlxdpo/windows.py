"""What an objective must know of all pairs of an optimizer step before their batches are differentiated one by one.

Sorting (AOT), the KL term (KTO) and means over tokens (SFT) couple the pairs of a step. Taken over the whole step, and
not over each batch as other trainers do, they leave the step the same however it is cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.losses import Loss
from mlxdpo.peers import ALONE, Peers
from mlxdpo.scoring import widened
from mlxdpo.types import Batch, Example, Pairs

WIDEST = 2  # numbers that a field of `Pairs` has of each pair, at most


def first(pairs: Pairs, count: int) -> Pairs:
    """The first `count` pairs: what follows only fills a batch."""
    return Pairs(*(None if a is None else a[..., :count] for a in pairs))


def together(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several batches in one."""
    columns = zip(*parts, strict=True)
    return Pairs(*(None if column[0] is None else mx.concatenate(column, axis=-1) for column in columns))


def gathered(peers: Peers, parts: Sequence[Pairs | None], counts: Sequence[int]) -> Pairs:
    """The pairs of several batches in one, of which `parts` holds this process's own."""
    if peers.size == 1:
        return together(parts)  # type: ignore[arg-type]
    columns = taken(peers.sum(mx.array(table(Pairs, parts, counts))))
    return Pairs(*(None if column is None else mx.array(column) for column in columns))


def table(kind: type[NamedTuple], parts: Sequence[Any], counts: Sequence[int]) -> np.ndarray:
    """(fields, 1 + 2, pairs) float32: what is known of the pairs of each batch, to be summed over the processes.

    Zeros for the batches of others (None). The first row says how many numbers of each pair a field has, 0 for None.
    """
    found, at = np.zeros((len(kind._fields), 1 + WIDEST, sum(counts)), np.float32), 0
    for part, count in zip(parts, counts, strict=True):
        for field, values in zip(found, part or (), strict=part is not None):
            if values is not None:
                rows = np.atleast_2d(np.array(values, np.float32))
                field[0, at : at + count] = len(rows)
                field[1 : 1 + len(rows), at : at + count] = rows
        at += count
    return found


def taken(summed: mx.array) -> list[np.ndarray | None]:
    """The fields of a summed `table`, each (pairs,) or (2, pairs); None where no process had one.

    Raises `RuntimeError` when the processes did not deal the batches out among them, each once.
    """
    result: list[np.ndarray | None] = []
    for field in np.array(summed):
        numbers = int(field[0, :1].sum())
        if (field[0] != numbers).any() or numbers > WIDEST:
            raise RuntimeError("a batch was computed by two processes or by none; please report this with the recipe")
        result.append(None if numbers == 0 else field[1] if numbers == 1 else field[1 : 1 + numbers])
    return result


def look_over(
    loss: Loss,
    batches: Sequence[Sequence[Example]],
    laid_out: Callable[[], Iterable[Batch | None]],
    scorer: Callable[[Batch], Pairs],
    peers: Peers = ALONE,
) -> list[mx.array | None]:
    """For each batch of a step what the loss takes from all of the step's pairs, (K, pairs of the batch), or None.

    Where lengths are enough nothing is computed; else `laid_out` is asked for the batches and each is scored; None
    stands for one that another process scores.
    """
    if not loss.looks:
        return [None] * len(batches)
    if loss.looks_at_logps:
        scored = zip(laid_out(), batches, strict=True)
        parts = [None if batch is None else first(scorer(batch), len(examples)) for batch, examples in scored]
        seen = loss.look(gathered(peers, parts, [len(examples) for examples in batches]))
    else:
        seen = loss.look(together([_lengths(examples) for examples in batches]))
    assert seen is not None
    ends = [sum(map(len, batches[: n + 1])) for n in range(len(batches) - 1)]
    return list(mx.split(seen, ends, axis=1)) if ends else [seen]


def filled(seen: mx.array | None, pairs: int) -> mx.array | None:
    """(K, n) widened to a batch of `pairs`: what fills the batch gets what its first pair has."""
    return None if seen is None else widened(seen, pairs)


def _lengths(examples: Sequence[Example]) -> Pairs:
    """Pairs of which nothing but their lengths is known."""
    nothing = mx.zeros(len(examples))
    lengths = (mx.array([float(len(getattr(e, side))) for e in examples]) for side in ("chosen", "rejected"))
    return Pairs(nothing, nothing, nothing, nothing, *lengths)
