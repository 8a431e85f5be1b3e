"""Pairs laid out as a batch over distinct rows; `planning.py` says which pairs, `batch_shapes.py` in which shape.

On a CPU a batch is also cut into parts that are computed side by side, in as many streams: between prompts, into about
equal numbers of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.data.batch_shapes import BatchShape, choose_shape, size_of_rows
from mlxdpo.data.distinct_rows import DistinctRow, distinct_rows, shared_with_previous, subtree_ends
from mlxdpo.data.planning import Indices
from mlxdpo.machine import openblas
from mlxdpo.types import Batch, Example, Extras, TokenTree

SMALLEST_PART = 128  # distinct tokens: below, streams wait for each other longer than they gain


def cut_by_prompts(prompts: np.ndarray, rows: np.ndarray, lengths: np.ndarray, most: int | None = None) -> list[slice]:
    """At most `most` runs of pairs, none of which shares a prompt with another; one run where there is nothing to cut.

    `most` is the number of streams here, unless given.

    `prompts` (B,) and `rows` (B, 2) number each pair's prompt and completions, `lengths` (B, 3) are their tokens. The
    runs come as close to equal numbers of distinct tokens as prompts allow.
    """
    pairs, most = len(prompts), openblas.stream_count() if most is None else most
    _, first, which = np.unique(prompts, return_index=True, return_inverse=True)
    if most < 2 or len(first) < 2:
        return [slice(0, pairs)]
    added = np.bincount(first, lengths[first, 0], pairs)  # tokens that each pair adds to those before it
    _, fresh = np.unique(rows.ravel(), return_index=True)
    added += np.bincount(fresh // 2, lengths[:, 1:].ravel()[fresh], pairs)
    tokens = np.cumsum(added)
    last = np.empty(len(first), int)
    last[which] = np.arange(pairs)  # of one prompt's pairs the last stays
    reach = np.maximum.accumulate(last[which])  # how far the prompts met so far go
    free = np.flatnonzero(reach == np.arange(pairs))[:-1]  # a cut behind one of these parts no prompt
    count = min(most, int(tokens[-1]) // SMALLEST_PART)
    if count < 2 or not len(free):
        return [slice(0, pairs)]
    wanted = tokens[-1] * np.arange(1, count) / count
    ends = {int(free[np.abs(tokens[free] - goal).argmin()]) + 1 for goal in wanted}
    return [slice(start, end) for start, end in itertools.pairwise([0, *sorted(ends), pairs])]


def collate(
    examples: Sequence[Example],
    indices: Indices,
    batch_size: int,
    ref: np.ndarray | None = None,
    shapes: Sequence[BatchShape] = (),
) -> Batch:
    """Lay the pairs `indices` out as a batch over distinct rows, in the cheapest of `shapes`, or as it comes.

    A completion that stands in several pairs of a prompt is one row, and what rows of a trajectory share is computed
    once. `ref` is (N, 2): the reference's summed log-probs
    of each example's chosen and rejected completion, nats; without it the batch carries zeros. With (N, 4), the last
    two columns are those of the first min(|chosen|, |rejected|) tokens (`Batch.ref_shared`). Pairs
    that only fill the shape have weight 0 and repeat the first one; no pair looks at the rows and tokens that do.

    Where a batch is computed in several streams, its `parts` are the same pairs in as many smaller batches.
    """
    whole = _collate_whole(examples, indices, batch_size, ref, shapes)
    if openblas.stream_count() == 1:
        return whole
    pairs = [examples[i] for i in indices]
    rows, place = distinct_rows(pairs)
    prompts = np.array([row.group for row in rows])[place[:, 0]]
    lengths = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])
    cuts = cut_by_prompts(prompts, place, lengths)
    if len(cuts) == 1:
        return whole
    parts = [tuple(indices)[cut] for cut in cuts]
    return whole._replace(parts=tuple(_collate_whole(examples, part, len(part), ref) for part in parts))


def _collate_whole(
    examples: Sequence[Example],
    indices: Indices,
    batch_size: int,
    ref: np.ndarray | None = None,
    shapes: Sequence[BatchShape] = (),
) -> Batch:
    """`collate` without parts."""
    pairs = [examples[i] for i in indices]
    rows, place = distinct_rows(pairs)
    firsts = [next(row for row in rows if row.group == g) for g in range(rows[-1].group + 1)]
    shape = choose_shape(size_of_rows(rows, len(pairs)), shapes, batch_size)
    values, length = np.zeros(shape.rows, np.float32), np.ones(shape.rows, np.float32)
    if ref is not None:
        values[place] = ref[list(indices), :2]
    length[: len(rows)] = [len(row.scored) for row in rows]
    filler = shape.pairs - len(indices)
    weight = np.array([1.0] * len(indices) + [0.0] * filler, np.float32)
    chosen, rejected = np.concatenate([place, np.repeat(place[:1], filler, axis=0)]).T.astype(np.int32)
    lefts = [row.prompt[shape.shared :] for row in firsts]  # what a prompt has behind the shared prefix
    pieces = _rest_spans(rows, lefts)
    prefix = np.zeros((shape.prompts, shape.shared), np.int32)
    prefix[: len(firsts)] = [row.prompt[: shape.shared] for row in firsts]
    arrays = (prefix, *_token_arrays(rows, lefts, pieces, shape), length, values, chosen, rejected, weight)
    counts = set(np.bincount([row.group for row in rows]).tolist())
    whole = len(counts) == 1 and (len(firsts), len(rows)) == (shape.prompts, shape.rows)
    per_prompt = counts.pop() if whole else 0
    filled = [*indices, *[indices[0]] * filler]
    shared = mx.array(np.ascontiguousarray(ref[filled, 2:].T)) if ref is not None and ref.shape[1] == 4 else None
    extras = np.array([pair.extras for pair in [*pairs, *pairs[:1] * filler]], np.float32).T
    columns = (mx.array(np.ascontiguousarray(a)) for a in arrays)
    tree = _token_tree(rows, lefts, pieces, shape) if shape.tree else None
    return Batch(*columns, per_prompt=per_prompt, extras=Extras(*map(mx.array, extras)), ref_shared=shared, tree=tree)


def _token_arrays(
    rows: Sequence[DistinctRow], lefts: Sequence[np.ndarray], pieces: Sequence[RestSpan], shape: BatchShape
) -> tuple[np.ndarray, ...]:
    """The arrays of a `Batch` from `rest` to `scored`; `lefts` are what prompts have behind the shared prefix."""
    rest, place, home = (np.zeros(shape.rest, np.int32) for _ in range(3))
    for piece in pieces:
        here = slice(piece.start, piece.start + len(piece.ids))
        rest[here], place[here] = piece.ids, shape.shared + piece.column + np.arange(len(piece.ids))
        home[here] = piece.row * shape.width + piece.column + np.arange(len(piece.ids))
    index, group = np.zeros((shape.rows, shape.width), np.int32), np.zeros(shape.rows, np.int32)
    targets, positions, owner, scored = (np.zeros(shape.scored, np.int32) for _ in range(4))
    at, suffix = 0, np.zeros(0, np.int64)
    for i, row in enumerate(rows):
        own, prompt = pieces[len(lefts) + i], pieces[row.group]
        before = suffix if i and rows[i - 1].group == row.group else prompt.start + np.arange(len(prompt.ids))
        suffix = np.concatenate([before[: own.column], own.start + np.arange(len(own.ids))])
        index[i, : len(suffix)], group[i] = suffix, row.group
        here = slice(at, at + len(row.scored))
        targets[here], owner[here], scored[here] = row.completion[row.scored], i, 1
        positions[here] = suffix[len(prompt.ids) - 1 + row.scored]  # position t predicts token t+1
        at = here.stop
    return rest, place, index, home, group, targets, positions, owner, scored.astype(np.float32)


class RestSpan(NamedTuple):
    """Tokens that stand side by side in `rest` from `start` on, and in row `row` from column `column` on."""

    ids: np.ndarray
    start: int
    row: int
    column: int


def _rest_spans(rows: Sequence[DistinctRow], lefts: Sequence[np.ndarray]) -> list[RestSpan]:
    """What `rest` consists of: first the rest of each prompt, then what each row's completion, without its last token,
    has beyond the row before it."""
    first = [next(i for i, row in enumerate(rows) if row.group == g) for g in range(len(lefts))]
    prompts = [(ids, first[g], 0) for g, ids in enumerate(lefts)]
    shared = zip(rows, shared_with_previous(rows), strict=True)
    own = [(row.completion[known:-1], i, len(lefts[row.group]) + known) for i, (row, known) in enumerate(shared)]
    result, at = [], 0
    for ids, row, column in prompts + own:
        result.append(RestSpan(ids, at, row, column))
        at += len(ids)
    return result


def _token_tree(
    rows: Sequence[DistinctRow], lefts: Sequence[np.ndarray], pieces: Sequence[RestSpan], shape: BatchShape
) -> TokenTree:
    order, home = np.zeros((shape.prompts, shape.tree), np.int32), np.zeros(shape.rest, np.int32)
    until = np.tile(np.arange(1, shape.tree + 1, dtype=np.int32), (shape.prompts, 1))  # what only fills sees itself
    for group in range(len(lefts)):
        own = [pieces[group], *(p for p, row in zip(pieces[len(lefts) :], rows, strict=True) if row.group == group)]
        ends = np.concatenate(subtree_ends([p.column for p in own], [len(p.ids) for p in own]))
        order[group, : len(ends)] = np.concatenate([p.start + np.arange(len(p.ids)) for p in own])
        home[order[group, : len(ends)]] = group * shape.tree + np.arange(len(ends))
        until[group, : len(ends)] = ends
    return TokenTree(mx.array(order), mx.array(home), mx.array(until))
