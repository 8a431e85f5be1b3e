"""Arithmetic that a step cannot do without: each distinct token once, multiply and add counted as two operations.

For T distinct tokens, L weights in the linear maps of the blocks that a token meets, A in their adapters, V x D in the
head, N scored positions, and C causal (query, key) pairs of each of the H heads of size d in each block:

    forward            2 T (L + A)  +  4 C H d per block  +  2 N V D
    backward, inputs   2 T (L + A)  +  8 C H d per block  +  2 N V D
    backward, weights  2 T A with adapters; 2 T L + 2 N V D when everything is trained

Attention is two matmuls forward and four backward (arXiv 2205.14135 algorithms 1 and 4, without what is computed
again). Norms, activations, softmax and the optimizer are not counted. A share of a machine's matmul rate reached in
this measure cannot be raised by computing padding or a prompt twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Work(NamedTuple):
    """T, C and N of a batch: distinct tokens, causal pairs of one head, scored positions."""

    tokens: int
    pairs: int
    scored: int


class Weights(NamedTuple):
    """L, A, V * D, H * d and the blocks of a model; `full` says that its weights, not adapters, are trained."""

    linear: int
    adapters: int
    head: int
    attention: int
    layers: int
    full: bool = False


def work(prompts: Iterable[tuple[int, Iterable[int]]]) -> Work:
    """`prompts` gives each prompt's tokens and those of its distinct completions, whose last token is only predicted.

    A token attends to itself and to all before it in its row: p (p + 1) / 2 pairs for a prompt of p.
    """
    tokens = pairs = scored = 0
    for prompt, completions in prompts:
        tokens, pairs = tokens + prompt, pairs + prompt * (prompt + 1) // 2
        for length in completions:
            own = length - 1
            tokens, pairs, scored = tokens + own, pairs + own * prompt + own * (own + 1) // 2, scored + length
    return Work(tokens, pairs, scored)


def forward_flops(weights: Weights, at: Work) -> int:
    """Operations of one pass without gradients."""
    blocks = 2 * at.tokens * (weights.linear + weights.adapters)
    return blocks + 4 * at.pairs * weights.attention * weights.layers + 2 * at.scored * weights.head


def step_flops(weights: Weights, at: Work) -> int:
    """Operations of a training step."""
    inputs = forward_flops(weights, at) + 4 * at.pairs * weights.attention * weights.layers
    trained = 2 * at.tokens * weights.adapters
    if weights.full:
        trained = 2 * at.tokens * weights.linear + 2 * at.scored * weights.head
    return forward_flops(weights, at) + inputs + trained
