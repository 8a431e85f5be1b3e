"""Pairs laid out as a batch over distinct rows; `planning.py` says which pairs, `batch_shapes.py` in which shape.

On a CPU a batch is also cut into parts that are computed side by side, in as many streams: runs of rows, about equal in
tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.data.batch_shapes import BatchShape, choose_shape, size_of_rows
from mlxdpo.data.distinct_rows import DistinctRow, branch, distinct_rows, shared_with_previous, subtree_ends
from mlxdpo.data.planning import Indices
from mlxdpo.machine import openblas
from mlxdpo.types import Batch, Example, Extras, TokenTree

SMALLEST_PART = 128  # distinct tokens: below, streams wait for each other longer than they gain
# Of a step in one stream half is matmuls, which alone use all n cores: it takes 1/2 + 1/2n of what it takes on one.
# Streams take the largest part's share of that, and a sixth more (docs/evidence/benchmarks.md).
WORTH = 0.43


def cut_rows(
    group: np.ndarray, prompt: np.ndarray, own: np.ndarray, branches: bool, most: int | None = None
) -> list[slice]:
    """At most `most` runs of rows, close to equal in distinct tokens; one run where more would not be faster.

    group     (R,) the prompt of each row; rows of a prompt are adjacent
    prompt    (R,) tokens of that prompt
    own       (R,) tokens of its completion
    branches  whether rows share more than their prompt: then no prompt's rows are parted
    most      the number of streams of this machine, unless given

    A cut between rows of one prompt computes that prompt twice, so it has to gain more than it costs.
    """
    streams = openblas.stream_count() if most is None else most
    first = np.append(True, group[1:] != group[:-1])
    tokens = np.cumsum(own + prompt * first)
    total, again = int(tokens[-1]), np.where(first, 0, prompt)
    places = np.flatnonzero(first[1:]) if branches else np.arange(len(group) - 1)
    best, largest = [slice(0, len(group))], WORTH * (1 + 1 / streams) * total
    for count in range(2, min(streams, total // SMALLEST_PART, len(places) + 1) + 1):
        goals = total * np.arange(1, count) / count
        cost = abs(tokens[places] - goals[:, None]) + again[places + 1]
        ends = sorted({int(place) + 1 for place in places[cost.argmin(axis=1)]})
        cuts = [slice(*ends) for ends in itertools.pairwise([0, *ends, len(group)])]
        most_tokens = max(own[cut].sum() + prompt[cut][first[cut]].sum() + again[cut.start] for cut in cuts)
        if most_tokens < largest:
            best, largest = cuts, most_tokens
    return best


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

    Where a batch is computed in several streams, its `parts` are the same rows in as many smaller batches.
    """
    pairs = [examples[i] for i in indices]
    rows, place = distinct_rows(pairs)
    shape = choose_shape(size_of_rows(rows, len(pairs)), shapes, batch_size)
    whole = _lay_out(rows, place, shape)
    filled = [*indices, *[indices[0]] * (shape.pairs - len(indices))]
    extras = np.array([examples[i].extras for i in filled], np.float32).T
    whole = whole._replace(extras=Extras(*map(mx.array, extras)))
    if ref is not None:
        values = np.zeros(shape.rows, np.float32)
        values[place] = ref[list(indices), :2]
        shared = mx.array(np.ascontiguousarray(ref[filled, 2:].T)) if ref.shape[1] == 4 else None
        whole = whole._replace(ref=mx.array(values), ref_shared=shared)
    if openblas.stream_count() == 1:
        return whole
    group, prompt, own = np.array([(row.group, len(row.prompt), len(row.completion)) for row in rows]).T
    cuts = cut_rows(group, prompt, own, branch(rows))
    return whole._replace(parts=tuple(_stream_part(rows[cut]) for cut in cuts)) if len(cuts) > 1 else whole


def _stream_part(rows: Sequence[DistinctRow]) -> Batch:
    """Rows of a batch that are computed in one stream: log-probs are asked of it, so each row is a pair with itself."""
    own = [row._replace(group=row.group - rows[0].group) for row in rows]
    place, size = np.arange(len(own), dtype=np.int32).repeat(2).reshape(-1, 2), size_of_rows(own, len(own))
    # Targets are joined with those of other parts, so none of them may only fill a shape.
    return _lay_out(own, place, choose_shape(size, (), len(own))._replace(scored=size.scored))


def _lay_out(rows: Sequence[DistinctRow], place: np.ndarray, shape: BatchShape) -> Batch:
    """Rows, and the pairs (B, 2) that they make up, in a shape; as if the reference had given nothing."""
    firsts = [next(row for row in rows if row.group == g) for g in range(rows[-1].group + 1)]
    length = np.ones(shape.rows, np.float32)
    length[: len(rows)] = [len(row.scored) for row in rows]
    filler = shape.pairs - len(place)
    weight = np.array([1.0] * len(place) + [0.0] * filler, np.float32)
    chosen, rejected = np.concatenate([place, np.repeat(place[:1], filler, axis=0)]).T.astype(np.int32)
    lefts = [row.prompt[shape.shared :] for row in firsts]  # what a prompt has behind the shared prefix
    pieces = _rest_spans(rows, lefts)
    prefix = np.zeros((shape.prompts, shape.shared), np.int32)
    prefix[: len(firsts)] = [row.prompt[: shape.shared] for row in firsts]
    ref = np.zeros(shape.rows, np.float32)
    arrays = (prefix, *_token_arrays(rows, lefts, pieces, shape), length, ref, chosen, rejected, weight)
    counts = set(np.bincount([row.group for row in rows]).tolist())
    whole = len(counts) == 1 and (len(firsts), len(rows)) == (shape.prompts, shape.rows)
    columns = (mx.array(np.ascontiguousarray(a)) for a in arrays)
    tree = _token_tree(rows, lefts, pieces, shape) if shape.tree else None
    return Batch(*columns, per_prompt=counts.pop() if whole else 0, tree=tree)


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
