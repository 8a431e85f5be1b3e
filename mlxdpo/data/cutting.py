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
    count = min(most, int(tokens[-1]) // LEAST)
    if count < 2 or not len(free):
        return [slice(0, pairs)]
    wanted = tokens[-1] * np.arange(1, count) / count
    ends = {int(free[np.abs(tokens[free] - goal).argmin()]) + 1 for goal in wanted}
    return [slice(start, end) for start, end in itertools.pairwise([0, *sorted(ends), pairs])]
