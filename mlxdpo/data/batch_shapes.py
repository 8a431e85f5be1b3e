"""Which shapes the batches of a run have: few where each is compiled, close to what the rows hold where none is.

MLX keeps every trace of a compiled step for good, so a run over real text, in which hardly two batches are alike, must
not have a shape for each. `plan_shapes` chooses a bounded number that waste least on the batches of the first epoch;
one more holds anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo.data.distinct_rows import DistinctRow, branch, distinct_rows, shared_with_previous
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices
from mlxdpo.machine.device import most_traces

PREFIX_STEP = 32  # tokens: how finely the shared prefix follows the shortest prompt
NARROWEST = 16  # tokens: Metal's attention has no gradient for 8 queries or fewer (forward/metal_routing.py)
SAMPLE = 2000  # batches that are looked at
TREE_COST = 2  # times what a query-key pair costs in rows, where MLX's causal attention skips what is masked
CUTS = 128  # places between sorted batches where one shape may end and the next begin


class BatchSize(NamedTuple):
    """What a batch holds.

    prompts, rows, pairs  how many of each
    shortest  tokens of the shortest prompt
    longest   tokens of the longest row without its last
    distinct  tokens of all prompts and of all completions without their last
    scored    scored completion tokens
    largest   distinct tokens of the prompt that has most, with those of its completions
    branches  whether the rows are of trajectories, and share more than their prompts
    """

    prompts: int
    rows: int
    pairs: int
    shortest: int
    longest: int
    distinct: int
    scored: int
    largest: int
    branches: bool = False


class BatchShape(NamedTuple):
    """The shapes of a `Batch`: G, P, R, S, M, N and B, and the W of its `TokenTree` (0: it has none)."""

    prompts: int
    shared: int
    rows: int
    width: int
    rest: int
    scored: int
    pairs: int
    tree: int = 0

    def holds(self, size: BatchSize) -> bool:
        """Whether a batch fits."""
        counts = self.prompts >= size.prompts and self.rows >= size.rows and self.pairs >= size.pairs
        # A row's suffix needs a token of the prompt to predict its first completion token from.
        tokens = self.shared < size.shortest and self.width >= size.longest - self.shared
        rest = size.distinct - size.prompts * self.shared
        tree = not self.tree or self.tree >= size.largest - self.shared
        return counts and tokens and tree and self.rest >= rest and self.scored >= size.scored

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


def size_of_rows(rows: Sequence[DistinctRow], pairs: int) -> BatchSize:
    """What a batch of these distinct rows holds."""
    known, first = shared_with_previous(rows), {row.group: row for row in reversed(rows)}
    own = [len(row.completion) - 1 - shared for row, shared in zip(rows, known, strict=True)]
    tokens = np.bincount([row.group for row in rows], own)
    tokens += [len(first[group].prompt) for group in range(len(tokens))]
    return BatchSize(
        len(first),
        len(rows),
        pairs,
        shortest=min(len(row.prompt) for row in rows),
        longest=max(len(row.prompt) + len(row.completion) for row in rows) - 1,
        distinct=int(tokens.sum()),
        scored=sum(len(row.scored) for row in rows),
        largest=int(tokens.max()),
        branches=branch(rows),
    )


def batch_size_of(examples: Examples, indices: Indices) -> BatchSize:
    """What the batch of these pairs holds; only of trajectories tokens are looked at."""
    index = np.array(indices)
    if (examples.scored[index] != examples.lengths[index, 1:]).any():
        return size_of_rows(distinct_rows([examples[i] for i in indices])[0], len(indices))
    group, prompt, completion = row_columns(examples, indices)
    _, of = np.unique(group, return_index=True)
    longest, distinct = int((prompt + completion).max()) - 1, int(prompt[of].sum() + (completion - 1).sum())
    largest = int((prompt[of] + np.bincount(group, completion - 1)).max())
    counts = (len(of), len(group), len(indices))
    return BatchSize(*counts, int(prompt.min()), longest, distinct, int(completion.sum()), largest)


def row_columns(examples: Examples, indices: Indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the distinct rows of these pairs, in their order: the prompt (R,), counted from 0, its tokens, and those of
    the completion."""
    index = np.array(indices)
    _, first = np.unique(examples.row_numbers[index].ravel(), return_index=True)
    first.sort()
    prompts = np.repeat(examples.prompt_numbers[index], 2)[first]
    _, met, group = np.unique(prompts, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(met))[group]  # prompts in the order in which they are met
    order = np.argsort(group, kind="stable")
    lengths = examples.lengths[index]
    return group[order], np.repeat(lengths[:, 0], 2)[first][order], lengths[:, 1:].ravel()[first][order]


def shape_for(sizes: Sequence[BatchSize], batch_size: int) -> BatchShape:
    """The smallest shape that holds all of `sizes`, lengths rounded up."""
    prompts, rows, pairs, longest, scored = (
        max(getattr(size, name) for size in sizes) for name in ("prompts", "rows", "pairs", "longest", "scored")
    )
    shared = shared_prefix(min(size.shortest for size in sizes))
    rest = max(size.distinct - size.prompts * shared for size in sizes)
    room = batch_size if pairs <= batch_size else bucket(pairs)
    width, tree = row_width(longest - shared), row_width(max(size.largest for size in sizes) - shared)
    tree *= any(size.branches for size in sizes) and tree_is_worth_it((prompts, tree), (rows, width), shared)
    return BatchShape(prompts, shared, rows, width, bucket(rest), bucket(scored), room, tree)


def tree_is_worth_it(tree: tuple[int, int], rows: tuple[int, int], shared: int) -> bool:
    """Whether attention over the distinct tokens of each prompt, `tree` (G, W), costs less than over `rows` (R, S),
    each behind `shared` tokens: it has more keys that a query does not see."""
    pairs = [count * width * (shared + width / 2) for count, width in (tree, rows)]
    return TREE_COST * pairs[0] < pairs[1]


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
    rows, longest = 2 * batch_size, int(examples.row_lengths.max()) - 1
    rest, scored = bucket(rows * longest), bucket(rows * int(examples.scored.max()))
    pairs = bucket(max(rows * (rows - 1), batch_size))  # contradicting pairs are two
    return BatchShape(batch_size, 0, rows, row_width(longest), rest, scored, pairs)
