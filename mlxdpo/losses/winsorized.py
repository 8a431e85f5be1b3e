"""wDPO: the few pairs that a step contradicts are partly flipped, and the largest losses are drawn towards a quantile.

Both take all pairs of an optimizer step: found once, without a gradient (`winsor_weights`), so that each pair's loss
then depends on that pair alone.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.losses.objective import StepStatistics
from mlxdpo.losses.ratios import Number, log_ratios
from mlxdpo.types import Pairs

QUANTILE = 0.7  # of a step's losses, from which they are drawn in; the authors' value
FLOOR = 0.02  # least share of a step's pairs that is drawn in; theirs too
TINY = 1e-12  # a divisor that is 0 where nothing is to be divided


def wdpo(
    pairs: Pairs,
    *,
    beta: Number,
    flip_budget: Number = 0.15,
    winsor_budget: Number = 0.5,
    step_statistics: StepStatistics | None = None,
) -> mx.array:
    """(1-r) m + r T of m = -(1-q) log s(z) - q log s(-z), z = beta d: wDPO, arXiv 2603.07211.

    q is how far the label counts as flipped, T the 0.7 quantile of a step's m, and r how far a loss above it is drawn
    towards it; the slope of such a pair is (1-r) times as steep. None of them has a gradient. Their formulas are those
    of the authors' code (github.com/liujilong0116/CompassDPO, its wDPO trainer), which the paper leaves open.

    Args:
        pairs: summed log-probs of policy and reference for both completions, each (B,), nats.
        beta: strength of the pull towards the reference, above 0; 0.1 in the paper.
        flip_budget: sum of q over a step's pairs, as a share of them; 0 flips nothing.
        winsor_budget: largest sum of r over a step's pairs, as a share of them; 0 leaves the least, 0.02.
        step_statistics: `winsor_weights` over all pairs of the step; without it these pairs are all there are.

    Returns:
        (B,) one loss per pair, nats, at least 0; log 2 while policy and reference agree.
    """
    q, r, threshold = step_statistics or winsor_weights(pairs, beta, flip_budget, winsor_budget)
    return (1 - r) * _mixed(_reward_lead(pairs, beta), q) + r * threshold


def winsor_weights(pairs: Pairs, beta: Number, flip_budget: Number, winsor_budget: Number) -> StepStatistics:
    """(B,) three times: q, r and T of wDPO, for all pairs of a step (`wdpo`).

    q = min(1, flip_budget B sparsemax(max(0, -z))), and what the 1 cuts off goes to the others in proportion. r =
    min(1, w B e / sum e) of the excess e = max(0, m - T), where w lies between 0.02 and `winsor_budget`, by the mean of
    s(-z / mean |z|).
    """
    z = _reward_lead(pairs, beta)
    q = _flip_weights(z, flip_budget)
    risen = _above_start(z, q)
    threshold = _quantile(risen, QUANTILE)
    doubt = mx.sigmoid(-z / mx.maximum(mx.abs(z).mean(), TINY)).mean()
    share = FLOOR + (mx.maximum(winsor_budget, FLOOR) - FLOOR) * doubt
    excess = mx.maximum(risen - threshold, 0)
    r = mx.minimum(share * z.size * excess / mx.maximum(excess.sum(), TINY), 1)
    cut = mx.broadcast_to(threshold + math.log(2), z.shape)
    return mx.stop_gradient(q), mx.stop_gradient(r), mx.stop_gradient(cut)


def sparsemax(scores: mx.array) -> mx.array:
    """(B,) the point of the simplex nearest to `scores`, most of it 0: arXiv 1602.02068 algorithm 1."""
    scores = scores - scores.max()
    ordered = -mx.sort(-scores)
    sums, place = mx.cumsum(ordered), mx.arange(1, scores.size + 1)
    count = (1 + place * ordered > sums).sum()
    return mx.maximum(scores - (sums[count - 1] - 1) / count, 0)


def _reward_lead(pairs: Pairs, beta: Number) -> mx.array:
    a, b = log_ratios(pairs)
    return beta * (a - b)


def _mixed(z: mx.array, q: mx.array) -> mx.array:
    return -(1 - q) * nn.log_sigmoid(z) - q * nn.log_sigmoid(-z)


def _above_start(z: mx.array, q: mx.array) -> mx.array:
    """m less log 2, its value at z = 0, as log cosh(z/2) - (1/2 - q) z: differences of m keep their digits there."""
    half = mx.abs(z) / 2
    near = mx.log1p(2 * mx.sinh(mx.minimum(half, 1) / 2) ** 2)
    return mx.where(half < 1, near, half + mx.log1p(mx.exp(-2 * half)) - math.log(2)) - (0.5 - q) * z


def _flip_weights(z: mx.array, budget: Number) -> mx.array:
    """(B,) q: pairs that are lost by far first; nothing where none is lost."""
    shares = sparsemax(mx.maximum(-z, 0))
    given = budget * z.size * shares
    free = given < 1
    left = mx.maximum(budget * z.size - mx.minimum(given, 1).sum(), 0)
    more = left * shares / mx.maximum(mx.where(free, shares, 0).sum(), TINY)
    q = mx.minimum(mx.where(free, given + more, 1), 1)
    return mx.where((z < 0).any(), q, 0)


def _quantile(values: mx.array, share: float) -> mx.array:
    """Linear between the two nearest of the sorted values."""
    ordered, at = mx.sort(values), share * (values.size - 1)
    low = int(at)
    high = min(low + 1, values.size - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
