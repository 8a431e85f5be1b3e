"""The way of a batch through a model's blocks, written down before it is gone, so that several can be gone abreast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxdpo import lanes


class Passage(NamedTuple):
    """What enters the first block, each block as a function of what enters it, and how to read the states at the end.

    The arrays of a state are (..., D) hidden states; every block gives as many as it takes.
    """

    enter: lanes.State
    blocks: Sequence[Callable[..., lanes.State]]
    leave: Callable[..., mx.array]


def walk(passages: Sequence[Callable[[], Passage]]) -> list[mx.array]:
    """The states at the end of each passage, the n-th gone in lane n, all of them block by block."""
    opened = lanes.each(lambda passage: passage(), passages)
    states = [passage.enter for passage in opened]
    for blocks in zip(*(passage.blocks for passage in opened), strict=True):
        states = lanes.abreast(lanes.each(lambda block, state: block(*state), blocks, states))
    return lanes.each(lambda passage, state: passage.leave(*state), opened, states)
