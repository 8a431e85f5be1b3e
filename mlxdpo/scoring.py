"""A model meets a batch: log-probabilities of completions, in float32.

Right padding is harmless under a causal mask, and it keeps MLX's light attention path, which array masks leave.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.types import Batch, Pairs


def token_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T-1) float32: log p(tokens[:, t+1] | tokens[:, :t+1]), nats."""
    logits = model(tokens[:, :-1])
    # The CPU falls back to reducing in the logits' own dtype, so they are brought to float32 first.
    return -mx.fast.cross_entropy(logits.astype(mx.float32), tokens[:, 1:])


def completion_logps(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """(R, T) token ids and (R, T-1) mask of scored targets -> (R,) summed log-probs of the completions, nats.

    Source: log pi(y|x) of arXiv 2305.18290 eq. 7, a sum over the completion's tokens.
    """
    return (token_logps(model, tokens) * mask).sum(axis=-1)


def score_pairs(model: nn.Module, batch: Batch) -> Pairs:
    """Everything an objective needs of a batch; each field (B,)."""
    logps, lengths = completion_logps(model, batch.tokens, batch.mask), batch.mask.sum(axis=-1)
    chosen, rejected = batch.chosen, batch.rejected
    return Pairs(
        logps[chosen],
        logps[rejected],
        batch.ref[chosen],
        batch.ref[rejected],
        lengths[chosen],
        lengths[rejected],
    )
