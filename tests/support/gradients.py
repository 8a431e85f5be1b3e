"""Gradients of tiny models with adapters, over ragged batches, and how far two of them are apart."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.data.batching import collate
from mlxdpo.model.adapters import attach_lora
from mlxdpo.types import Example


def moved(model, lora):
    """Attach adapters and move them away from their start, so that they matter."""
    attach_lora(model, lora)
    mx.random.seed(1)
    if lora.method != "full":
        arrays = [(n, p + mx.random.normal(p.shape) * 0.05) for n, p in tree_flatten(model.trainable_parameters())]
        model.load_weights(arrays, strict=False)
    return model


def gradients(model, function):
    """Value, and the gradient as one vector."""
    value, tree = nn.value_and_grad(model, function)(model)
    return value.item(), np.concatenate([np.array(g).ravel() for _, g in tree_flatten(tree)])


RECURRENT = {"qwen3_5", "kimi_linear"}
"""Tiny models with gated delta layers: their random states grow, so that already mlx-lm's own loop gives gradients that
are 4e-5 apart, relative, where a row goes through it whole and where it is cut behind its prompt."""


def rounding(kind):
    """How far the gradients of two ways through a tiny model may be apart by the order of sums, relative."""
    return 5e-4 if kind in RECURRENT else 1e-5


def apart(got, want):
    """Relative distance of two vectors."""
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def ragged(prompts=(70, 41, 55), completions=((9, 30, 2), (1, 25, 12), (40, 3, 3)), seed=0):
    """A batch of ranked answers whose lengths differ as in real text."""
    draw = np.random.default_rng(seed)

    def ids(n):
        return draw.integers(1, 300, n).astype(np.int32)

    pairs = []
    for prompt, lengths in zip(map(ids, prompts), completions, strict=True):
        answers = [ids(n) for n in lengths]
        pairs += [Example(prompt, a, b, "") for a, b in itertools.pairwise(answers)]
    return collate(pairs, tuple(range(len(pairs))), len(pairs))


def weighted(forward, batch):
    """A scalar in which every row counts differently."""
    weight = mx.array(np.random.default_rng(1).normal(size=len(batch.group)).astype("f"))
    return lambda model: (forward(model, batch) * weight).sum()
