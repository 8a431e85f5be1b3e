"""Objectives on pairs: pure functions of `(B,)` vectors, one loss per pair.

Notation: a = log pi(y_w|x) - log ref(y_w|x), b the same for the rejected y_l, d = a - b. No reduction here: the step
takes the weighted mean. Everything float32: a 16-bit log-sigmoid overflows.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.types import Pairs


def log_ratios(pairs: Pairs) -> tuple[mx.array, mx.array]:
    """(a, b): how much likelier the policy finds the chosen and the rejected completion than the reference, nats."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def sigmoid(pairs: Pairs, *, beta: float | mx.array, label_smoothing: float = 0.0) -> mx.array:
    """-(1-e) log s(beta d) - e log s(-beta d): DPO, arXiv 2305.18290 eq. 7; with e > 0 conservative DPO (E. Mitchell,
    "A note on DPO with noisy preferences", 2023, eq. 3), whose labels are wrong with probability e."""
    a, b = log_ratios(pairs)
    logit = beta * (a - b)
    return -(1 - label_smoothing) * nn.log_sigmoid(logit) - label_smoothing * nn.log_sigmoid(-logit)


def ipo(pairs: Pairs, *, beta: float | mx.array) -> mx.array:
    """(a/|y_w| - b/|y_l| - 1/(2 beta))^2: IPO, arXiv 2310.12036 eq. 17, with beta the paper's tau.

    Departs from the paper's sums: log-ratios are averaged over tokens, which its authors advise (trl#1265).
    """
    a, b = log_ratios(pairs)
    return (a / pairs.chosen_len - b / pairs.rejected_len - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float | mx.array) -> mx.array:
    """max(0, 1 - beta d): SLiC-HF's margin loss (arXiv 2305.10425 eq. 1) on implicit rewards, as in RSO, arXiv
    2309.06657 eq. 10."""
    a, b = log_ratios(pairs)
    return mx.maximum(0, 1 - beta * (a - b))


def start_ln2(beta: float) -> float:
    """Value where policy and reference agree: a logit of 0."""
    return math.log(2)


def start_ipo(beta: float) -> float:
    """Value where policy and reference agree: the squared target."""
    return 1 / (4 * beta**2)


def start_hinge(beta: float) -> float:
    """Value where policy and reference agree: the whole margin is missing."""
    return 1.0
