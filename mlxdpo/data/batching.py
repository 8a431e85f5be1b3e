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

from mlxdpo.data.batch_shapes import BatchShape, BatchSize, choose_shape
from mlxdpo.data.planning import Indices
from mlxdpo.machine import openblas
from mlxdpo.types import Batch, Example, Extras

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

    A completion that stands in several pairs of a prompt is one row. `ref` is (N, 2): the reference's summed log-probs
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
    shape = choose_shape(_size_of(rows, firsts, len(pairs)), shapes, batch_size)
    values, length = np.zeros(shape.rows, np.float32), np.ones(shape.rows, np.float32)
    if ref is not None:
        values[place] = ref[list(indices), :2]
    length[: len(rows)] = [len(row.completion) for row in rows]
    filler = shape.pairs - len(indices)
    weight = np.array([1.0] * len(indices) + [0.0] * filler, np.float32)
    chosen, rejected = np.concatenate([place, np.repeat(place[:1], filler, axis=0)]).T.astype(np.int32)
    arrays = (*_token_arrays(rows, firsts, shape), length, values, chosen, rejected, weight)
    counts = set(np.bincount([row.group for row in rows]).tolist())
    whole = len(counts) == 1 and (len(firsts), len(rows)) == (shape.prompts, shape.rows)
    per_prompt = counts.pop() if whole else 0
    filled = [*indices, *[indices[0]] * filler]
    shared = mx.array(np.ascontiguousarray(ref[filled, 2:].T)) if ref is not None and ref.shape[1] == 4 else None
    extras = np.array([pair.extras for pair in [*pairs, *pairs[:1] * filler]], np.float32).T
    columns = (mx.array(np.ascontiguousarray(a)) for a in arrays)
    return Batch(*columns, per_prompt=per_prompt, extras=Extras(*map(mx.array, extras)), ref_shared=shared)


def _size_of(rows: Sequence[DistinctRow], firsts: Sequence[DistinctRow], pairs: int) -> BatchSize:
    distinct = sum(len(row.prompt) for row in firsts) + sum(len(row.completion) - 1 for row in rows)
    return BatchSize(
        len(firsts),
        len(rows),
        pairs,
        shortest=min(len(row.prompt) for row in firsts),
        longest=max(len(row.prompt) + len(row.completion) for row in rows) - 1,
        distinct=distinct,
        scored=sum(len(row.completion) for row in rows),
    )


class DistinctRow(NamedTuple):
    """One completion of one prompt: ids of both, and which of the batch's prompts it is."""

    prompt: np.ndarray
    completion: np.ndarray
    group: int


def distinct_rows(pairs: Sequence[Example]) -> tuple[list[DistinctRow], np.ndarray]:
    """Each distinct (prompt, completion) once, those of a prompt adjacent, and the rows of each pair, (B, 2)."""
    prompts: dict[bytes, dict[bytes, DistinctRow]] = {}
    for pair in pairs:
        group = prompts.setdefault(pair.prompt.tobytes(), {})
        number = next(iter(group.values())).group if group else len(prompts) - 1
        for completion in (pair.chosen, pair.rejected):
            group.setdefault(completion.tobytes(), DistinctRow(pair.prompt, completion, number))
    rows = [row for group in prompts.values() for row in group.values()]
    index = {(row.group, row.completion.tobytes()): i for i, row in enumerate(rows)}
    number = {prompt: next(iter(group.values())).group for prompt, group in prompts.items()}
    place = [[index[number[p.prompt.tobytes()], c.tobytes()] for c in (p.chosen, p.rejected)] for p in pairs]
    return rows, np.array(place, np.int32)


def _token_arrays(
    rows: Sequence[DistinctRow], firsts: Sequence[DistinctRow], shape: BatchShape
) -> tuple[np.ndarray, ...]:
    """The arrays of a `Batch` from `prefix` to `scored`; `firsts` are the first rows of the prompts."""
    prefix = np.zeros((shape.prompts, shape.shared), np.int32)
    prefix[: len(firsts)] = [row.prompt[: shape.shared] for row in firsts]
    lefts = [row.prompt[shape.shared :] for row in firsts]  # what a prompt has behind the shared prefix
    pieces = _rest_spans(rows, lefts)
    rest, place, home = (np.zeros(shape.rest, np.int32) for _ in range(3))
    for piece in pieces:
        here = slice(piece.start, piece.start + len(piece.ids))
        rest[here], place[here] = piece.ids, shape.shared + piece.column + np.arange(len(piece.ids))
        home[here] = piece.row * shape.width + piece.column + np.arange(len(piece.ids))
    index, group = np.zeros((shape.rows, shape.width), np.int32), np.zeros(shape.rows, np.int32)
    targets, positions, owner, scored = (np.zeros(shape.scored, np.int32) for _ in range(4))
    at = 0
    for i, row in enumerate(rows):
        prompt, own = pieces[row.group], pieces[len(lefts) + i]
        suffix = np.concatenate([prompt.start + np.arange(len(prompt.ids)), own.start + np.arange(len(own.ids))])
        index[i, : len(suffix)], group[i] = suffix, row.group
        here = slice(at, at + len(row.completion))
        targets[here], owner[here], scored[here] = row.completion, i, 1
        positions[here] = suffix[len(prompt.ids) - 1 :]  # position t predicts token t+1
        at = here.stop
    return prefix, rest, place, index, home, group, targets, positions, owner, scored.astype(np.float32)


class RestSpan(NamedTuple):
    """Tokens that stand side by side in `rest` from `start` on, and in row `row` from column `column` on."""

    ids: np.ndarray
    start: int
    row: int
    column: int


def _rest_spans(rows: Sequence[DistinctRow], lefts: Sequence[np.ndarray]) -> list[RestSpan]:
    """What `rest` consists of: first the rest of each prompt, then each row's completion without its last token."""
    first = [next(i for i, row in enumerate(rows) if row.group == g) for g in range(len(lefts))]
    prompts = [(ids, first[g], 0) for g, ids in enumerate(lefts)]
    completions = [(row.completion[:-1], i, len(lefts[row.group])) for i, row in enumerate(rows)]
    result, at = [], 0
    for ids, row, column in prompts + completions:
        result.append(RestSpan(ids, at, row, column))
        at += len(ids)
    return result
