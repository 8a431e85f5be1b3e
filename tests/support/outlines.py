"""Outlines of pairs that are not there, for tests of plans."""

import numpy as np

from mlxdpo.data.planning import Outline


def alone(lengths):
    """Pairs of `lengths` tokens, each of a prompt of its own."""
    count = len(lengths)
    return Outline(np.array(lengths, np.int64), np.arange(2 * count).reshape(count, 2), np.arange(count))


def ranked(lengths, completions):
    """Prompts with `completions[i]` ranked answers each and all their pairs, rows of `lengths[i]` tokens."""
    pairs = [
        (length, (100 * u + a, 100 * u + b), u)
        for u, (length, k) in enumerate(zip(lengths, completions, strict=True))
        for a in range(k)
        for b in range(a + 1, k)
    ]
    lengths, rows, units = zip(*pairs, strict=True)
    return Outline(np.array(lengths, np.int64), np.array(rows), np.array(units))
