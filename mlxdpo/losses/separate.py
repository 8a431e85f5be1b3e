"""Objectives that judge each completion of a pair against the reference by itself, so that a's and b's signs matter.

They hold the chosen completion's likelihood up (or, `apo_down`, both down) where those of the difference let it sink.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.losses.ratios import Number, log_ratios
from mlxdpo.types import Pairs


def nca_pair(pairs: Pairs, *, beta: Number) -> mx.array:
    """-log s(beta a) - 1/2 log s(-beta a) - 1/2 log s(-beta b): NCA for pairs, arXiv 2402.05369 with K = 2 and
    all of the label on the chosen completion."""
    a, b = log_ratios(pairs)
    return -nn.log_sigmoid(beta * a) - 0.5 * nn.log_sigmoid(-beta * a) - 0.5 * nn.log_sigmoid(-beta * b)


def bco_pair(pairs: Pairs, *, beta: Number) -> mx.array:
    """-log s(beta a) - log s(-beta b): BCO on pairs, arXiv 2404.04656 without the reward shift delta, as TRL has
    it since 1.0 (0.24 subtracted a running mean of rewards)."""
    a, b = log_ratios(pairs)
    return -nn.log_sigmoid(beta * a) - nn.log_sigmoid(-beta * b)


def sppo_hard(pairs: Pairs, *, beta: Number) -> mx.array:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: SPPO, arXiv 2405.00675 eq. 4.7 with win probabilities 1 and 0 and
    beta = 1/eta."""
    a, b = log_ratios(pairs)
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero(pairs: Pairs, *, beta: Number) -> mx.array:
    """1 - s(beta a) + s(beta b): APO-zero, arXiv 2408.06266 eq. 7. For chosen completions better than the policy's own:
    their likelihood rises, that of the rejected falls."""
    a, b = log_ratios(pairs)
    return mx.sigmoid(-beta * a) + mx.sigmoid(beta * b)


def apo_down(pairs: Pairs, *, beta: Number) -> mx.array:
    """s(beta a) + 1 - s(beta d): APO-down, arXiv 2408.06266 eq. 8. For chosen completions worse than the policy's own:
    both likelihoods fall, that of the rejected more."""
    a, b = log_ratios(pairs)
    return mx.sigmoid(beta * a) + mx.sigmoid(-beta * (a - b))
