"""Which pairs are computed together: pure plans of batches. Nothing is dropped, nothing is seen twice.

A *unit* is the pairs of one prompt (`data.group: prompt`) or one pair (`none`). Units are shuffled, never pairs of
different ones mixed: the completions of a prompt meet in one batch, where each is computed once.

An optimizer step takes one *window* of units with about batch_size * accumulate pairs, exactly that many where every
unit is one pair. Windows depend only on that product, the seed and the epoch, so batch 8 x 1 and 1 x 8 walk the same
trajectory; inside a window units of similar length are batched together.

A batch has room for 2 * batch_size distinct completions, however many pairs those make.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mlxdpo.data.examples import Examples
from mlxdpo.types import Example

Indices = tuple[int, ...]
Group = Literal["prompt", "none"]


class Outline(NamedTuple):
    """All that a plan needs to know of N pairs.

    lengths  (N,) tokens of the longer of each pair's two rows
    rows     (N, 2) numbers of the rows: the same completion of the same prompt has the same number
    units    (N,) numbers of the units, counted from 0 in the order of their first pairs
    """

    lengths: np.ndarray
    rows: np.ndarray
    units: np.ndarray


class Epoch(NamedTuple):
    """The windows of one pass, each a tuple of batches, each a tuple of example indices."""

    windows: tuple[tuple[Indices, ...], ...]


def outline(examples: Sequence[Example], group: Group) -> Outline:
    """What plans are made of, without touching a token of stored `Examples`."""
    pairs = Examples.of(examples)
    units = pairs.prompt_numbers if group == "prompt" else np.arange(len(pairs))
    return Outline(pairs.row_lengths, pairs.row_numbers, units)


def steps_per_epoch(pairs: Outline, batch_size: int, accumulate: int) -> int:
    """Windows of one pass: the same for every seed and epoch."""
    window = batch_size * accumulate
    return -(-int(_measures(pairs, window).sum()) // window)


def plan_epoch(pairs: Outline, batch_size: int, accumulate: int, seed: int, epoch: int) -> Epoch:
    """All pairs once, their units shuffled by (seed, epoch) alone, cut into windows and those into batches."""
    window = batch_size * accumulate
    measures = _measures(pairs, window)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(measures))
    place = np.empty(len(order), np.int64)
    place[order] = np.repeat(
        np.arange(steps_per_epoch(pairs, batch_size, accumulate)), _shares(measures[order], window)
    )
    home = place[pairs.units]
    ranked = np.lexsort((np.arange(len(home)), pairs.units, _unit_lengths(pairs)[pairs.units], home))
    bounds = np.flatnonzero(np.diff(home[ranked])) + 1
    cut = _cutter(pairs, batch_size)
    return Epoch(tuple(tuple(cut(indices)) for indices in np.split(ranked, bounds) if len(indices)))


def plan_straight(pairs: Outline, batch_size: int) -> list[Indices]:
    """All pairs once, longest first, so that a run that will not fit in memory fails at its first batch."""
    ranked = np.lexsort((np.arange(len(pairs.units)), pairs.units, _unit_lengths(pairs)[pairs.units]))
    return list(_cutter(pairs, batch_size)(ranked))[::-1]


def _measures(pairs: Outline, window: int) -> np.ndarray:
    """(U,) how much of a window each unit fills: its pairs, but never more than one window."""
    return np.minimum(np.bincount(pairs.units), window)


def _unit_lengths(pairs: Outline) -> np.ndarray:
    """(U,) tokens of each unit's longest row."""
    longest = np.zeros(int(pairs.units.max(initial=-1)) + 1, np.int64)
    np.maximum.at(longest, pairs.units, pairs.lengths)
    return longest


def _shares(measures: np.ndarray, window: int) -> np.ndarray:
    """How many of the units, taken in order, go to each window: its end is the unit border nearest to its due.

    No unit is longer than a window, so no two windows end at the same border; none is empty.
    """
    ends = np.concatenate([[0], np.cumsum(measures)])
    count = -(-int(ends[-1]) // window)
    due = np.arange(1, count) * window
    after = np.searchsorted(ends, due)
    border = np.where(due - ends[after - 1] <= ends[after] - due, after - 1, after)
    border = np.minimum(border, len(measures) - np.arange(count - 1, 0, -1))  # leave one for each window to come
    return np.diff(np.concatenate([[0], border, [len(measures)]])[: count + 2])


def _cutter(pairs: Outline, batch_size: int) -> Callable[[np.ndarray], Iterator[Indices]]:
    """What cuts indices, the pairs of a unit side by side, into batches of at most 2 * batch_size distinct rows."""
    if len(np.unique(pairs.rows)) == pairs.rows.size:  # every pair has two rows of its own: nothing to count
        return lambda ranked: _equal_batches(ranked.tolist(), batch_size)
    return lambda ranked: _greedy(ranked.tolist(), pairs, 2 * batch_size)


def _equal_batches(indices: list[int], size: int) -> Iterator[Indices]:
    return (tuple(indices[i : i + size]) for i in range(0, len(indices), size))


def _greedy(indices: list[int], pairs: Outline, room: int) -> Iterator[Indices]:
    """One piece after the other into a batch while there is room for its rows."""
    batch: list[int] = []
    held: set[int] = set()
    for piece, rows in _units_and_rows(indices, pairs, room):
        if batch and len(held | rows) > room:
            yield tuple(batch)
            batch, held = [], set()
        batch += piece
        held |= rows
    if batch:
        yield tuple(batch)


def _units_and_rows(indices: list[int], pairs: Outline, room: int) -> Iterator[tuple[list[int], set[int]]]:
    """Units with their rows; a unit that no batch has room for, pair by pair."""
    for _, members in itertools.groupby(indices, lambda i: pairs.units[i]):
        unit = list(members)
        rows = set(pairs.rows[unit].ravel().tolist())
        if len(rows) <= room:
            yield unit, rows
        else:
            yield from (([i], set(pairs.rows[i].tolist())) for i in unit)
