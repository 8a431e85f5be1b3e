"""The distinct rows of pairs, and the tree that their tokens make: what rows have in common stands in it once.

Plain pairs branch once, where the prompt ends. The rows of a trajectory branch at every judged turn. They are put in
lexical order, so that what a row shares with any row before it, it shares with the one just before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo.types import Example


class DistinctRow(NamedTuple):
    """One completion of one prompt.

    prompt, completion  token ids
    mask                (completion tokens,) bool, those that are scored; None: all
    group               which of the batch's prompts it is
    """

    prompt: np.ndarray
    completion: np.ndarray
    mask: np.ndarray | None
    group: int

    @property
    def scored(self) -> np.ndarray:
        """Indices of the scored tokens within the completion."""
        return np.arange(len(self.completion)) if self.mask is None else np.flatnonzero(self.mask)

    @property
    def key(self) -> bytes:
        """The same for the same completion of which the same tokens are scored."""
        return self.completion.tobytes() + (b"" if self.mask is None else self.mask.tobytes())


def distinct_rows(pairs: Sequence[Example]) -> tuple[list[DistinctRow], np.ndarray]:
    """Each distinct (prompt, completion) once, those of a prompt adjacent, and the rows of each pair, (B, 2)."""
    prompts: dict[bytes, dict[bytes, DistinctRow]] = {}
    places: list[list[tuple[bytes, bytes]]] = []
    for pair in pairs:
        prompt = pair.prompt.tobytes()
        group = prompts.setdefault(prompt, {})
        number = next(iter(group.values())).group if group else len(prompts) - 1
        both = ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
        rows = [DistinctRow(pair.prompt, *completion, number) for completion in both]
        group.update({row.key: row for row in rows if row.key not in group})
        places.append([(prompt, row.key) for row in rows])
    ordered = {prompt: _lexical(group) if branch(group.values()) else group for prompt, group in prompts.items()}
    keys = [(prompt, key) for prompt, group in ordered.items() for key in group]
    number_of = {key: i for i, key in enumerate(keys)}
    rows = [ordered[prompt][key] for prompt, key in keys]
    return rows, np.array([[number_of[key] for key in both] for both in places], np.int32)


def branch(rows: Iterable[DistinctRow]) -> bool:
    """Whether the rows are of a trajectory, so that they may share more than their prompt."""
    return any(row.mask is not None for row in rows)


def _lexical(group: dict[bytes, DistinctRow]) -> dict[bytes, DistinctRow]:
    # Big-endian bytes sort as the ids do.
    return dict(sorted(group.items(), key=lambda item: (item[1].completion.astype(">i4").tobytes(), item[0])))


def shared_with_previous(rows: Sequence[DistinctRow]) -> list[int]:
    """How many of each row's completion tokens the row before it has too, its last token aside: nothing is computed
    from that one. 0 for the first row of a prompt, and for prompts whose pairs are plain."""
    found = []
    for _, members in itertools.groupby(rows, key=lambda row: row.group):
        group = list(members)
        found.append(0)
        for before, row in itertools.pairwise(group):
            found.append(_common(before.completion[:-1], row.completion[:-1]) if branch(group) else 0)
    return found


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size


def subtree_ends(depths: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
    """Where each token's subtree ends, the tokens of a tree counted depth first.

    The tree is given as branches, one after the other: branch i adds `sizes[i]` tokens behind the first `depths[i]`
    tokens of the path that ends in the branch before it. Gives for each branch (sizes[i],) the number of the first
    token that no longer has this one on its way from the root.
    """
    starts = np.cumsum([0, *sizes])
    found = []
    for i, (depth, size) in enumerate(zip(depths, sizes, strict=True)):
        ends = np.full(size, starts[-1])
        for j in reversed(range(i + 1, len(depths))):
            # Where branch j leaves the path at or above a token, that token's subtree is over.
            ends[max(depths[j] - depth, 0) :] = starts[j]
        found.append(ends)
    return found
