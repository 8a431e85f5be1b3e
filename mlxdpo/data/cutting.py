"""Where to cut a batch into parts that are computed side by side: between prompts, into equal numbers of tokens."""

from __future__ import annotations

import itertools

import numpy as np

LEAST = 128  # distinct tokens of a part: below, lanes wait for each other longer than they gain


def cut_by_prompts(prompts: np.ndarray, rows: np.ndarray, lengths: np.ndarray, most: int) -> list[slice]:
    """At most `most` runs of pairs, none of which shares a prompt with another; one run where there is nothing to cut.

    `prompts` (B,) and `rows` (B, 2) number each pair's prompt and completions, `lengths` (B, 3) are their tokens. The
    runs come as close to equal numbers of distinct tokens as prompts allow.
    """
    pairs = len(prompts)
    if most < 2 or pairs < 2:
        return [slice(0, pairs)]
    tokens = np.cumsum(_distinct(prompts, rows, lengths))
    count = min(most, int(tokens[-1]) // LEAST)
    _, inverse = np.unique(prompts, return_inverse=True)
    last = np.zeros(pairs, int)
    np.maximum.at(last, inverse, np.arange(pairs))
    reach = np.maximum.accumulate(last[inverse])  # how far the prompts met so far go
    free = np.flatnonzero(reach == np.arange(pairs))[:-1]  # a cut behind one of these parts no prompt
    if count < 2 or not len(free):
        return [slice(0, pairs)]
    wanted = tokens[-1] * np.arange(1, count) / count
    ends = {int(free[np.abs(tokens[free] - goal).argmin()]) + 1 for goal in wanted}
    return [slice(start, end) for start, end in itertools.pairwise([0, *sorted(ends), pairs])]


def _distinct(prompts: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) tokens that each pair adds to those before it."""
    added = np.zeros(len(prompts), int)
    _, first = np.unique(prompts, return_index=True)
    added[first] += lengths[first, 0]
    _, first = np.unique(rows.ravel(), return_index=True)
    np.add.at(added, first // 2, lengths[:, 1:].ravel()[first])
    return added
