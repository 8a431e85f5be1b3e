"""Objectives on single completions with a thumb up or down: `Unpaired` of (B,) vectors, one loss per completion."""

from __future__ import annotations

import mlx.core as mx

from mlxdpo.losses.ratios import Number
from mlxdpo.types import Unpaired

Window = tuple[mx.array, ...]


def kto(
    rows: Unpaired,
    *,
    beta: Number,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    window: Window | None = None,
) -> mx.array:
    """D (1 - s(beta (r - z))) for a thumb up, U (1 - s(beta (z - r))) for a thumb down: KTO, arXiv 2402.01306 eq. 7.

    r is the log-ratio of the completion, z the KL of policy and reference, estimated without a gradient from
    completions of other prompts (`kl_estimate`), over all rows of the optimizer step. Guidance of section 4.2: choose
    the weights so that D n_D / (U n_U) lies in [1, 3/2].
    """
    (z,) = window or kl_estimate(rows)
    r = rows.logps - rows.ref_logps
    up, down = mx.sigmoid(beta * (z - r)), mx.sigmoid(beta * (r - z))
    return mx.where(rows.desirable > 0.5, desirable_weight * up, undesirable_weight * down)


def kl_estimate(rows: Unpaired) -> Window:
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
