"""Pairs laid out as a batch of fixed shape over distinct rows; `planning` says which pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.data.planning import Indices
from mlxdpo.types import Batch, Example

PREFIX_STEP = 32  # tokens: how finely the shared prefix follows the shortest prompt


def bucket(length: int) -> int:
    """Round a number of tokens up so that few shapes occur: to 8s up to 64, then to eighths of a power of two.

    MLX keeps every trace of a compiled step, so each distinct shape costs memory for the whole run.
    """
    step = max(8, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def shared_prefix(shortest: int) -> int:
    """P for a batch whose shortest prompt has `shortest` tokens: the multiple of 32 below it, less one.

    Less one, because a row's suffix needs a token of the prompt to predict its first completion token from.
    """
    return max(shortest // PREFIX_STEP * PREFIX_STEP - 1, 0)


def collate(examples: Sequence[Example], indices: Indices, batch_size: int, ref: np.ndarray | None = None) -> Batch:
    """Lay the pairs `indices` out as a batch over distinct rows.

    A completion that stands in several pairs of a prompt is one row. `ref` is (N, 2): the reference's summed log-probs
    of each example's chosen and rejected completion, nats; without it the batch carries zeros. A short batch is filled
    up to `batch_size` pairs, one of more pairs to a bucket, with pairs of weight 0 that repeat the first one, which
    costs no row.
    """
    pairs = [examples[i] for i in indices]
    rows, place = distinct_rows(pairs)
    values = np.zeros(len(rows), np.float32)
    if ref is not None:
        values[place] = ref[list(indices)]
    filler = max(batch_size, bucket(len(indices)) if len(indices) > batch_size else 0) - len(indices)
    weight = np.array([1.0] * len(indices) + [0.0] * filler, np.float32)
    chosen, rejected = np.concatenate([place, np.repeat(place[:1], filler, axis=0)]).T.astype(np.int32)
    tail = (values, chosen, rejected, weight)
    arrays = [mx.array(np.ascontiguousarray(a)) for a in (*_layout(rows), *tail)]
    counts = {sum(row.group == g for row in rows) for g in range(rows[-1].group + 1)}
    return Batch(*arrays, per_prompt=counts.pop() if len(counts) == 1 else 0)


class Row(NamedTuple):
    """One completion of one prompt: ids of both, and which of the batch's prompts it is."""

    prompt: np.ndarray
    completion: np.ndarray
    group: int


def distinct_rows(pairs: Sequence[Example]) -> tuple[list[Row], np.ndarray]:
    """Each distinct (prompt, completion) once, those of a prompt adjacent, and the rows of each pair, (B, 2)."""
    prompts: dict[bytes, dict[bytes, Row]] = {}
    for pair in pairs:
        group = prompts.setdefault(pair.prompt.tobytes(), {})
        number = next(iter(group.values())).group if group else len(prompts) - 1
        for completion in (pair.chosen, pair.rejected):
            group.setdefault(completion.tobytes(), Row(pair.prompt, completion, number))
    rows = [row for group in prompts.values() for row in group.values()]
    index = {(row.group, row.completion.tobytes()): i for i, row in enumerate(rows)}
    number = {prompt: next(iter(group.values())).group for prompt, group in prompts.items()}
    place = [[index[number[p.prompt.tobytes()], c.tobytes()] for c in (p.chosen, p.rejected)] for p in pairs]
    return rows, np.array(place, np.int32)


def _layout(rows: Sequence[Row]) -> tuple[np.ndarray, ...]:
    """The arrays of a `Batch` from `prefix` to `length`."""
    shared = shared_prefix(min(len(row.prompt) for row in rows))
    firsts = [next(row for row in rows if row.group == g) for g in range(rows[-1].group + 1)]
    prefix = np.stack([row.prompt[:shared] for row in firsts])
    lefts = [row.prompt[shared:] for row in firsts]  # what a prompt has behind the shared prefix
    pieces = _pieces(rows, lefts)
    width = bucket(max(len(lefts[row.group]) + len(row.completion) - 1 for row in rows))
    total, count = sum(len(piece.ids) for piece in pieces), sum(len(row.completion) for row in rows)
    rest, place, home = (np.zeros(bucket(total), np.int32) for _ in range(3))
    for piece in pieces:
        here = slice(piece.start, piece.start + len(piece.ids))
        rest[here], place[here] = piece.ids, shared + piece.column + np.arange(len(piece.ids))
        home[here] = piece.row * width + piece.column + np.arange(len(piece.ids))
    index = np.zeros((len(rows), width), np.int32)
    targets, positions, owner, scored = (np.zeros(bucket(count), np.int32) for _ in range(4))
    at = 0
    for i, row in enumerate(rows):
        prompt, own = pieces[row.group], pieces[len(lefts) + i]
        suffix = np.concatenate([prompt.start + np.arange(len(prompt.ids)), own.start + np.arange(len(own.ids))])
        index[i, : len(suffix)] = suffix
        here = slice(at, at + len(row.completion))
        targets[here], owner[here], scored[here] = row.completion, i, 1
        positions[here] = suffix[len(prompt.ids) - 1 :]  # position t predicts token t+1
        at = here.stop
    group = np.array([row.group for row in rows], np.int32)
    length = np.array([len(row.completion) for row in rows], np.float32)
    return prefix, rest, place, index, home, group, targets, positions, owner, scored.astype(np.float32), length


class Piece(NamedTuple):
    """Tokens that stand side by side in `rest` from `start` on, and in row `row` from column `column` on."""

    ids: np.ndarray
    start: int
    row: int
    column: int


def _pieces(rows: Sequence[Row], lefts: Sequence[np.ndarray]) -> list[Piece]:
    """What `rest` consists of: first the rest of each prompt, then each row's completion without its last token."""
    first = [next(i for i, row in enumerate(rows) if row.group == g) for g in range(len(lefts))]
    prompts = [(ids, first[g], 0) for g, ids in enumerate(lefts)]
    completions = [(row.completion[:-1], i, len(lefts[row.group])) for i, row in enumerate(rows)]
    result, at = [], 0
    for ids, row, column in prompts + completions:
        result.append(Piece(ids, at, row, column))
        at += len(ids)
    return result
