"""Objectives on single completions with a thumb up or down: `Unpaired` of (B,) vectors, one loss per completion."""

from __future__ import annotations

import mlx.core as mx

from mlxdpo.losses.objective import StepStatistics
from mlxdpo.losses.ratios import Number
from mlxdpo.types import Unpaired


def kto(
    rows: Unpaired,
    *,
    beta: Number,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    step_statistics: StepStatistics | None = None,
) -> mx.array:
    """D (1 - s(beta (r - z))) for a thumb up, U (1 - s(beta (z - r))) for a thumb down: KTO.

    r is the log-ratio of the completion, z the KL of policy and reference, estimated without a gradient from
    completions of other prompts, over all rows of the optimizer step.

    Args:
        rows: summed log-probs of policy and reference, nats, `desirable` (1 or 0) and `kl`, the log-ratio of a
            completion of another prompt, nats; each (B,).
        beta: strength of the pull towards the reference, above 0; 0.1 in the paper.
        desirable_weight: D, above 0. Section 4.2: choose D and U so that D n_D / (U n_U) lies in [1, 3/2].
        undesirable_weight: U, above 0.
        step_statistics: `kl_estimate` over all rows of the step; without it these rows are all there are.

    Returns:
        (B,) one loss per completion, in (0, D) or (0, U); D/2 or U/2 while policy and reference agree.

    References:
        Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306 eq. 7.
    """
    (z,) = step_statistics or kl_estimate(rows)
    r = rows.logps - rows.ref_logps
    up, down = mx.sigmoid(beta * (z - r)), mx.sigmoid(beta * (r - z))
    return mx.where(rows.desirable > 0.5, desirable_weight * up, undesirable_weight * down)


def kl_estimate(rows: Unpaired) -> StepStatistics:
    """(B,) max(0, mean log-ratio of mismatched completions), nats, once for each row."""
    return (mx.stop_gradient(mx.broadcast_to(mx.maximum(0, rows.kl.mean()), rows.kl.shape)),)


def apo_zero_unpaired(
    rows: Unpaired, *, beta: Number, desirable_weight: Number = 1.0, undesirable_weight: Number = 1.0
) -> mx.array:
    """D (1 - s(beta r)) for a thumb up, U s(beta r) for a thumb down: APO-zero (arXiv 2408.06266 eq. 7), of which a
    completion is one half; no KL term."""
    r = rows.logps - rows.ref_logps
    return mx.where(
        rows.desirable > 0.5, desirable_weight * mx.sigmoid(-beta * r), undesirable_weight * mx.sigmoid(beta * r)
    )
