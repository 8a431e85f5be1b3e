"""Objectives of the difference d between a pair's two log-ratios: pure functions of `(B,)` vectors, one loss per pair.

No reduction here: the step takes the weighted mean. Notation: see `ratios`.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.losses.ratios import Number, bounded_exp, demanded, lead, log_ratios, smoothed
from mlxdpo.types import Pairs

# AOT: the *distribution* of log-ratios over many pairs should dominate another one, whichever pair a value comes from.
#
# Sorting couples the pairs of an optimizer step. It is taken apart like this: who is matched with whom is found once
# over the whole step (`*_matches`, no gradient), and then each pair's loss is its own. The sum over the pairs, and its
# gradient, are those of the sorted vectors, however the step is cut into batches.

Window = tuple[mx.array, ...]


def aot(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, window: Window | None = None) -> mx.array:
    """-(1-e) log s(beta u) - e log s(-beta u), u = sort(pi_w - pi_l) - sort(ref_w - ref_l): AOT on pairs, arXiv
    2406.05882 (logistic loss). `window`: `aot_matches`; without it these pairs are all there are."""
    (matched,) = window or aot_matches(pairs)
    return smoothed(beta * (pairs.chosen - pairs.rejected - matched), label_smoothing)


def aot_matches(pairs: Pairs) -> Window:
    """(B,) for each pair the reference's log-prob difference that has the rank of the policy's among all."""
    policy, ref = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return (mx.stop_gradient(mx.sort(ref)[_ranks(policy)]),)


def aot_unpaired(
    pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, window: Window | None = None
) -> mx.array:
    """The same with u = sort(a) - sort(b): unpaired AOT, arXiv 2406.05882. Chosen and rejected completions of
    different prompts meet; both sides of each match get their slope, through one pair's loss each."""
    a, b = log_ratios(pairs)
    b_of_a, a_of_b = window or aot_unpaired_matches(pairs)
    loss = smoothed(beta * (a - b_of_a), label_smoothing)
    slope_only = smoothed(beta * (a_of_b - b), label_smoothing)
    return loss + slope_only - mx.stop_gradient(slope_only)


def aot_unpaired_matches(pairs: Pairs) -> Window:
    """(B,) twice: the b that has the rank of each a, and the a that has the rank of each b."""
    a, b = log_ratios(pairs)
    return mx.stop_gradient(mx.sort(b)[_ranks(a)]), mx.stop_gradient(mx.sort(a)[_ranks(b)])


def _ranks(values: mx.array) -> mx.array:
    return mx.argsort(mx.argsort(values))


# Objectives that judge each completion of a pair against the reference by itself, so that a's and b's signs matter.
#
# They hold the chosen completion's likelihood up (or, `apo_down`, both down) where those of the difference let it sink.


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


def sigmoid(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0) -> mx.array:
    """-(1-e) log s(beta d) - e log s(-beta d): DPO, arXiv 2305.18290 eq. 7; with e > 0 conservative DPO (E. Mitchell,
    "A note on DPO with noisy preferences", 2023, eq. 3), whose labels are wrong with probability e."""
    return smoothed(lead(pairs, beta), label_smoothing)


def ipo(pairs: Pairs, *, beta: Number) -> mx.array:
    """(a/|y_w| - b/|y_l| - 1/(2 beta))^2: IPO, arXiv 2310.12036 eq. 17, with beta the paper's tau.

    Departs from the paper's sums: log-ratios are averaged over tokens, which its authors advise (trl#1265).
    """
    a, b = log_ratios(pairs)
    return (a / pairs.chosen_len - b / pairs.rejected_len - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: Number) -> mx.array:
    """max(0, 1 - beta d): SLiC-HF's margin loss (arXiv 2305.10425 eq. 1) on implicit rewards, as in RSO, arXiv
    2309.06657 eq. 10."""
    return mx.maximum(0, 1 - lead(pairs, beta))


def sigmoid_norm(pairs: Pairs, *, beta: Number = 5.0) -> mx.array:
    """-log s(beta (a/|y_w| - b/|y_l|)): length-normalised DPO, arXiv 2411.15124 (Tulu 3), with its beta 5."""
    a, b = log_ratios(pairs)
    return -nn.log_sigmoid(demanded(beta * (a / pairs.chosen_len - b / pairs.rejected_len), pairs))


def exo_pair(pairs: Pairs, *, beta: Number, label_smoothing: Number = 1e-3) -> mx.array:
    """KL(q || p) of q = (s(beta d), s(-beta d)) from the label's distribution p = (1-e, e): EXO, arXiv 2402.00856
    eq. 16. The reverse of DPO's direction, so it seeks the label's mode; e > 0, or the divergence is infinite."""
    logit = lead(pairs, beta)
    won, lost = nn.log_sigmoid(logit), nn.log_sigmoid(-logit)
    return mx.exp(won) * (won - math.log(1 - label_smoothing)) + mx.exp(lost) * (lost - math.log(label_smoothing))


def robust(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.1) -> mx.array:
    """(-(1-e) log s(beta d) + e log s(-beta d)) / (1 - 2e): rDPO, arXiv 2403.00409. Its expectation over labels
    flipped with probability e is DPO's loss on the true ones; a single value may be negative."""
    logit, e = lead(pairs, beta), label_smoothing
    return (e * nn.log_sigmoid(-logit) - (1 - e) * nn.log_sigmoid(logit)) / (1 - 2 * e)


def discopop(pairs: Pairs, *, beta: Number, discopop_tau: Number = 0.05) -> mx.array:
    """-(1-m) log s(beta d) + m e^(-beta d) with m = s(beta d / tau): log-ratio modulated loss, arXiv 2406.08414 eq. 5.

    The exponential is bounded: where it overflows m is zero, and infinity times zero is no number.
    """
    logit = lead(pairs, beta)
    logistic = -nn.log_sigmoid(logit)
    return logistic + mx.sigmoid(logit / discopop_tau) * (bounded_exp(-logit) - logistic)


def dpop(pairs: Pairs, *, beta: Number = 0.3, dpop_lambda: Number = 50.0) -> mx.array:
    """-log s(beta (d - lambda max(0, -a))): DPO-Positive (Smaug), arXiv 2402.13228. The penalty stands inside the
    sigmoid and times beta; it acts as soon as the chosen completion is less likely than under the reference."""
    a, _ = log_ratios(pairs)
    fallen = mx.maximum(-a, 0)  # in this order the slope at a = 0 is 0: the first step is DPO's
    return -nn.log_sigmoid(lead(pairs, beta) - beta * dpop_lambda * fallen)


def r_dpo(pairs: Pairs, *, beta: Number, length_alpha: Number = 0.01) -> mx.array:
    """-log s(beta d + alpha (|y_w| - |y_l|)): length-regularised DPO, arXiv 2403.19159.

    The sign from its derivation: the optimum of E[r - alpha |y|] - beta KL has r = beta a + alpha |y| + const, so the
    Bradley-Terry logit is beta d + alpha (|y_w| - |y_l|), and a pair won by length alone asks nothing of the policy.
    """
    return -nn.log_sigmoid(lead(pairs, beta) + length_alpha * (pairs.chosen_len - pairs.rejected_len))
