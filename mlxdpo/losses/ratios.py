"""What objectives are made of: log-ratios, means over tokens, numbers that stay finite.

Notation of this room: a = log pi(y_w|x) - log ref(y_w|x), b the same for the rejected y_l, d = a - b, s the sigmoid.
Everything float32: a 16-bit log-sigmoid overflows.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.types import Pairs

Number = float | mx.array
EXPONENT = 40.0  # e^40 squared is still a float32; a probability ratio beyond it says nothing more


def log_ratios(pairs: Pairs) -> tuple[mx.array, mx.array]:
    """(a, b): how much likelier the policy finds the chosen and the rejected completion than the reference, nats."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def reward_lead(pairs: Pairs, beta: Number) -> mx.array:
    """beta d, less the margin that a row may demand (ODPO, arXiv 2402.10571); reward units."""
    a, b = log_ratios(pairs)
    return less_margin(beta * (a - b), pairs)


def less_margin(reward: mx.array, pairs: Pairs) -> mx.array:
    """A difference of rewards less the row's margin, where there is one."""
    return reward if pairs.margin is None else reward - pairs.margin


def mean_logps(pairs: Pairs) -> tuple[mx.array, mx.array]:
    """Mean log-prob of a token of the chosen and of the rejected completion, nats."""
    return pairs.chosen / pairs.chosen_len, pairs.rejected / pairs.rejected_len


def smoothed_logistic(logit: mx.array, label_smoothing: Number) -> mx.array:
    """-(1-e) log s(logit) - e log s(-logit): the cross entropy of a label that is wrong with probability e."""
    return -(1 - label_smoothing) * nn.log_sigmoid(logit) - label_smoothing * nn.log_sigmoid(-logit)


def bounded_exp(x: mx.array) -> mx.array:
    """e^x, at most e^40: a bound far beyond any log-ratio of a sound run, so that squares and slopes stay finite."""
    return mx.exp(mx.minimum(x, EXPONENT))


def bounded_expm1(x: mx.array) -> mx.array:
    """e^x - 1, accurate near 0, at most e^40. MLX differentiates expm1 by expm1 + 1, which loses the slope far below
    0; there plain e^x is accurate enough."""
    return mx.where(mx.abs(x) < 0.5, mx.expm1(mx.clip(x, -0.5, 0.5)), bounded_exp(x) - 1)


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - e^x) for x < 0, accurate at both ends (M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012).

    The branch that is not taken gets harmless input: its infinite slope times zero would be NaN.
    """
    x = mx.minimum(x, -1e-6)  # a completion of probability 1 has infinite odds
    near = x > -math.log(2)
    return mx.where(near, mx.log(-mx.expm1(mx.where(near, x, -1.0))), mx.log1p(-mx.exp(mx.where(near, -1.0, x))))
