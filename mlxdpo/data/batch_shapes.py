"""Which shapes the batches of a run have: few where each is compiled, close to what the rows hold where none is.

MLX keeps every trace of a compiled step for good, so a run over real text, in which hardly two batches are alike, must
not have a shape for each. `plan_shapes` chooses a bounded number that waste least on the batches of the first epoch;
one more holds anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices
from mlxdpo.machine.device import most_traces

PREFIX_STEP = 32  # tokens: how finely the shared prefix follows the shortest prompt
NARROWEST = 16  # tokens: Metal's attention has no gradient for 8 queries or fewer (forward/metal_routing.py)
SAMPLE = 2000  # batches that are looked at
CUTS = 128  # places between sorted batches where one shape may end and the next begin


class BatchSize(NamedTuple):
    """What a batch holds.

    prompts, rows, pairs  how many of each
    shortest  tokens of the shortest prompt
    longest   tokens of the longest row without its last
    distinct  tokens of all prompts and of all completions without their last
    scored    completion tokens
    """

    prompts: int
    rows: int
    pairs: int
    shortest: int
    longest: int
    distinct: int
    scored: int


class BatchShape(NamedTuple):
    """The shapes of a `Batch`: G, P, R, S, M, N and B."""

    prompts: int
    shared: int
    rows: int
    width: int
    rest: int
    scored: int
    pairs: int

    def holds(self, size: BatchSize) -> bool:
        """Whether a batch fits."""
        counts = self.prompts >= size.prompts and self.rows >= size.rows and self.pairs >= size.pairs
        # A row's suffix needs a token of the prompt to predict its first completion token from.
        tokens = self.shared < size.shortest and self.width >= size.longest - self.shared
        rest = size.distinct - size.prompts * self.shared
        return counts and tokens and self.rest >= rest and self.scored >= size.scored

    @property
    def tokens(self) -> int:
        """Tokens that are computed when rows run packed."""
        return self.prompts * self.shared + self.rest


def bucket(length: int) -> int:
    """Round a number of tokens up so that few shapes occur: to 8s up to 64, then to eighths of a power of two."""
    step = max(8, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def row_width(length: int) -> int:
    """S for rows of at most `length` tokens behind the shared prefix, at least `NARROWEST`."""
    return max(bucket(length), NARROWEST)


def shared_prefix(shortest: int) -> int:
    """P for a batch whose shortest prompt has `shortest` tokens: the multiple of 32 below it, less one."""
    return max(shortest // PREFIX_STEP * PREFIX_STEP - 1, 0)


def batch_size_of(examples: Examples, indices: Indices) -> BatchSize:
    """What the batch of these pairs holds, without touching a token."""
    index = np.array(indices)
    _, first = np.unique(examples.row_numbers[index].ravel(), return_index=True)
    completion = examples.lengths[index, 1:].ravel()[first]
    prompt = np.repeat(examples.lengths[index, 0], 2)[first]
    prompts, of = np.unique(np.repeat(examples.prompt_numbers[index], 2)[first], return_index=True)
    longest, distinct = int((prompt + completion).max()) - 1, int(prompt[of].sum() + (completion - 1).sum())
    counts = (len(prompts), len(first), len(indices))
    return BatchSize(*counts, int(prompt.min()), longest, distinct, int(completion.sum()))


def shape_for(sizes: Sequence[BatchSize], batch_size: int) -> BatchShape:
    """The smallest shape that holds all of `sizes`, lengths rounded up."""
    prompts, rows, pairs, longest, scored = (
        max(getattr(size, name) for size in sizes) for name in ("prompts", "rows", "pairs", "longest", "scored")
    )
    shared = shared_prefix(min(size.shortest for size in sizes))
    rest = max(size.distinct - size.prompts * shared for size in sizes)
    room = batch_size if pairs <= batch_size else bucket(pairs)
    return BatchShape(prompts, shared, rows, row_width(longest - shared), bucket(rest), bucket(scored), room)


def choose_shape(size: BatchSize, shapes: Iterable[BatchShape], batch_size: int) -> BatchShape:
    """The cheapest of `shapes` that holds a batch, or one of its own where there are none to choose from.

    Raises `ValueError` when there are shapes and none holds it.
    """
    if not shapes:
        return shape_for([size], batch_size)
    fitting = [shape for shape in shapes if shape.holds(size)]
    if not fitting:
        raise ValueError(f"no shape holds a batch of {size}")
    return min(fitting, key=lambda shape: (shape.tokens, shape.rows * shape.width))


def batch_shapes_for(examples: Examples, batches: Sequence[Indices], batch_size: int) -> tuple[BatchShape, ...]:
    """The shapes of a run on this machine, from its first batches; none where nothing is compiled."""
    limit = most_traces()
    return plan_shapes(examples, batches[:SAMPLE], batch_size, limit) if limit and batches else ()


def plan_shapes(examples: Examples, batches: Sequence[Indices], batch_size: int, limit: int) -> tuple[BatchShape, ...]:
    """At most `limit` shapes for batches like these; the last holds every batch that can be made of the examples."""
    sizes = sorted((batch_size_of(examples, indices) for indices in batches), key=lambda size: (size.distinct, size))
    distinct = np.array([size.distinct for size in sizes])
    ends = cut_points(distinct, limit - 1)
    shapes = [shape_for(sizes[a:b], batch_size) for a, b in zip([0, *ends], ends, strict=False)]
    return tuple(dict.fromkeys([*shapes, _largest_shape(examples, batch_size)]))


def cut_points(sizes: np.ndarray, count: int) -> list[int]:
    """Where to end each of at most `count` runs of sorted `sizes`, so that rounding each up to the largest of its run
    adds least (exact up to `CUTS` sizes, then among evenly spread places)."""
    places = np.unique(np.linspace(0, len(sizes), min(len(sizes), CUTS) + 1).astype(int))
    if len(places) < 2:
        return []
    tops = sizes[places[1:] - 1]
    # cost[i, j]: sizes between places i and j + 1 rounded up to the last of them.
    cost = np.where(places[:-1, None] < places[None, 1:], (places[None, 1:] - places[:-1, None]) * tops[None], np.inf)
    best, back = cost[0], []
    for _ in range(min(count, len(places) - 1) - 1):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        back.append(through.argmin(axis=0))
        best = np.minimum(through.min(axis=0), cost[0])
        back[-1] = np.where(best == cost[0], 0, back[-1])
    ends, at = [], len(places) - 1
    for steps in reversed([np.zeros(len(best), int), *back]):
        ends.append(int(places[at]))
        at = int(steps[at - 1])
        if at == 0:
            break
    return ends[::-1]


def _largest_shape(examples: Examples, batch_size: int) -> BatchShape:
    rows, lengths = 2 * batch_size, examples.lengths
    longest, completion = int(examples.row_lengths.max()) - 1, int(lengths[:, 1:].max())
    pairs = bucket(max(rows * (rows - 1), batch_size))  # contradicting pairs are two
    return BatchShape(batch_size, 0, rows, row_width(longest), bucket(rows * longest), bucket(rows * completion), pairs)
