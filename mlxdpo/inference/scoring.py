"""Log-probs of all pairs of a set under a policy and its reference: the one loop over batches, and its result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.data.batching import collate
from mlxdpo.data.planning import Group, Indices, outline, plan_straight
from mlxdpo.forward.layer_plan import evaluate_batch
from mlxdpo.forward.logprobs import forward_fns, score_pairs
from mlxdpo.model.adapters import dropout_off
from mlxdpo.types import Batch, Example

ModelContext = Callable[[], contextlib.AbstractContextManager[nn.Module]]
"""Gives a model to run while the context lasts."""


class PairLogps(NamedTuple):
    """Summed completion log-probs of pairs under policy and reference, nats, and lengths in tokens: each (B,)."""

    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_len: np.ndarray
    rejected_len: np.ndarray


def score_examples(
    examples: Sequence[Example],
    group: Group,
    batch_size: int,
    count: int,
    score: Callable[[Batch], mx.array],
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> np.ndarray:
    """(count, N) float64: what `score` makes of N examples, in the order given, `batch_size` of them at once.

    `score` gives (count, B) numbers of a batch, or (B,) where `count` is 1. `group` is `data.group`.
    `progress` wraps the batches, for a progress bar.
    """
    values = np.zeros((count, len(examples)))
    for indices in progress(plan_straight(outline(examples, group), batch_size)):
        batch = collate(examples, indices, batch_size)
        found = score(batch)
        evaluate_batch(batch, found)
        values[:, list(indices)] = np.array(found).reshape(count, -1)[:, : len(indices)]
    return values


def model_logps(
    model: nn.Module,
    examples: Sequence[Example],
    group: Group,
    batch_size: int,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> np.ndarray:
    """(2, N) summed log-probs of chosen and rejected completions under one model without dropout, nats."""
    forward = forward_fns(model).score

    def score(batch: Batch) -> mx.array:
        """(2, B) of a batch."""
        pairs = score_pairs(model, batch, forward)
        return mx.stack([pairs.chosen, pairs.rejected])

    with dropout_off(model):
        return score_examples(examples, group, batch_size, 2, score, progress)


def logps_under_both(
    policy: nn.Module, reference: ModelContext, examples: Sequence[Example], group: Group, batch_size: int = 8
) -> PairLogps:
    """Log-probs of every pair under a policy and its reference, in the order given."""

    def score(batch: Batch) -> mx.array:
        """(4, B) of a batch: chosen and rejected under the policy, then under the reference."""
        with dropout_off(policy) as model:
            tuned = score_pairs(model, batch, forward_fns(model).score)
            evaluate_batch(batch, tuned.chosen, tuned.rejected)
        with reference() as model, dropout_off(model):  # evaluated here, while the reference's adapters are on
            base = score_pairs(model, batch, forward_fns(model).score)
            both = mx.stack([tuned.chosen, tuned.rejected, base.chosen, base.rejected])
            evaluate_batch(batch, both)
        return both

    values = score_examples(examples, group, batch_size, 4, score)
    lengths = [np.array([len(getattr(e, side)) for e in examples], np.float64) for side in ("chosen", "rejected")]
    return PairLogps(*values, *lengths)
