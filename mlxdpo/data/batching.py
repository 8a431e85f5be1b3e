"""Which pairs are computed together: pure plans of fixed-shape batches. Nothing is dropped, nothing is seen twice.

An optimizer step takes one *window* of batch_size * accumulate pairs. Windows depend only on that product, the seed
and the epoch, so batch 8 x 1 and 1 x 8 walk the same trajectory; inside a window pairs of similar length are batched
together. A short batch is filled with pairs of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.data.store import Examples
from mlxdpo.types import Batch, Example

Indices = tuple[int, ...]
Lengths = Sequence[int] | np.ndarray


class Epoch(NamedTuple):
    """The windows of one pass, each a tuple of batches, each a tuple of example indices."""

    windows: tuple[tuple[Indices, ...], ...]


def bucket(length: int) -> int:
    """Round a row length up so that few shapes occur: to 32s up to 256 tokens, then to eighths of a power of two.

    MLX keeps every trace of a compiled step, so each distinct shape costs memory for the whole run.
    """
    step = max(32, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step


def row_length(example: Example) -> int:
    """Tokens of the longer of an example's two rows."""
    return len(example.prompt) + max(len(example.chosen), len(example.rejected))


def row_lengths(examples: Sequence[Example]) -> np.ndarray:
    """`row_length` of each, (N,) int32; of stored `Examples` without touching a token."""
    return Examples.of(examples).row_lengths


def plan_epoch(lengths: Lengths, batch_size: int, accumulate: int, seed: int, epoch: int) -> Epoch:
    """All pairs once, shuffled by (seed, epoch) alone, cut into windows and those into batches.

    `lengths` are row lengths in tokens, one per pair.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths))
    window = np.arange(len(order)) // (batch_size * accumulate)
    batches = _cut(order[np.lexsort((order, np.asarray(lengths)[order], window))], batch_size)
    return Epoch(tuple(tuple(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)))


def plan_straight(lengths: Lengths, batch_size: int) -> list[Indices]:
    """All pairs once, longest first, so that a run that will not fit in memory fails at its first batch."""
    return _cut(np.lexsort((np.arange(len(lengths)), np.asarray(lengths))), batch_size)[::-1]


def _cut(ranked: np.ndarray, batch_size: int) -> list[Indices]:
    indices = ranked.tolist()
    return [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]


def collate(examples: Sequence[Example], indices: Indices, batch_size: int, ref: np.ndarray | None = None) -> Batch:
    """Lay the pairs `indices` out as a batch of `batch_size` pairs: rows 0..B-1 chosen, B..2B-1 rejected.

    `ref` is (N, 2): the reference's summed log-probs of each example's chosen and rejected completion, nats; without
    it the batch carries zeros. Filler repeats the first pair with weight 0, so that it is finite in every objective.
    """
    full = indices + (indices[0],) * (batch_size - len(indices))
    rows = [(examples[i].prompt, examples[i].chosen) for i in full] + [
        (examples[i].prompt, examples[i].rejected) for i in full
    ]
    width = bucket(max(len(prompt) + len(completion) for prompt, completion in rows))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width - 1), np.float32)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[row, : len(prompt)], tokens[row, len(prompt) : end] = prompt, completion
        mask[row, len(prompt) - 1 : end - 1] = 1  # target t is predicted at position t-1
    values = np.zeros(len(rows), np.float32) if ref is None else ref[list(full)].T.reshape(-1).astype(np.float32)
    weight = np.array([1.0] * len(indices) + [0.0] * (batch_size - len(indices)), np.float32)
    first, second = np.arange(batch_size), np.arange(batch_size, 2 * batch_size)
    return Batch(
        *(mx.array(a) for a in (tokens, mask, first.astype(np.int32), second.astype(np.int32), values, weight))
    )
