"""Objectives on pairs of a chosen and a rejected completion: pure functions of (B,) vectors, one loss per pair.

No reduction here: the step takes the weighted mean. Notation: see `ratios.py`. Three groups:

- of the difference d of the two log-ratios (`sigmoid` to `r_dpo`);
- separate: each completion against the reference (`nca_pair` to `apo_down`). They hold the chosen completion's
  likelihood up (`apo_down`: push both down), where those of the difference let it fall;
- ranked: AOT, where the *distribution* of log-ratios over many pairs should dominate another one. Sorting couples the
  pairs of an optimizer step. Who is matched with whom is found once over the whole step (`aot_matches`, without a
  gradient); then each pair's loss depends on that pair alone, and the sum over the pairs and its gradient are those of
  the sorted vectors, however the step is cut into batches.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.losses.objective import StepStatistics
from mlxdpo.losses.ratios import Number, bounded_exp, less_margin, log_ratios, reward_lead, smoothed_logistic
from mlxdpo.types import Pairs


def sigmoid(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0) -> mx.array:
    """-(1-e) log s(beta d) - e log s(-beta d): DPO; with e > 0 conservative DPO. A row's margin is taken off beta d.

    Args:
        pairs: summed log-probs of policy and reference for both completions, each (B,), nats, at most 0; `margin`
            (B,) where rows have one (ODPO), in reward units (beta * nats).
        beta: strength of the pull towards the reference, above 0; 0.1 to 0.5 in the paper.
        label_smoothing: e, the probability that a label is wrong, in [0, 0.5); 0 is DPO.

    Returns:
        (B,) one loss per pair, nats, at least 0; log 2 while policy and reference agree, without margins.

    References:
        Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290 eq. 7; E. Mitchell, "A note on DPO with
        noisy preferences", 2023, eq. 3 (conservative DPO); arXiv 2402.10571 (the margin of ODPO).
    """
    chosen_ratio = pairs.chosen - pairs.ref_chosen
    rejected_ratio = pairs.rejected - pairs.ref_rejected
    logit = beta * (chosen_ratio - rejected_ratio)
    if pairs.margin is not None:
        logit = logit - pairs.margin
    # log(1 - s(x)) as log s(-x): no rounding of 1 - s(x) to 0.
    return -(1 - label_smoothing) * nn.log_sigmoid(logit) - label_smoothing * nn.log_sigmoid(-logit)


def ipo(pairs: Pairs, *, beta: Number) -> mx.array:
    """(a/|y_w| - b/|y_l| - 1/(2 beta))^2: IPO, with log-ratios averaged over tokens.

    The paper has sums; its authors advise means (trl#1265).

    Args:
        pairs: summed log-probs of policy and reference for both completions, each (B,), nats, and their lengths (B,)
            in tokens, at least 1.
        beta: the paper's tau, above 0; the target lead is 1/(2 beta) nats a token, 5 at the usual 0.1.

    Returns:
        (B,) one loss per pair, squared nats a token, at least 0; 1/(4 beta^2) while policy and reference agree.

    References:
        Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036
        eq. 17.
    """
    a, b = log_ratios(pairs)
    return (a / pairs.chosen_len - b / pairs.rejected_len - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: Number) -> mx.array:
    """max(0, 1 - beta d): the margin loss of SLiC-HF on implicit rewards, as in RSO. A row's margin comes off beta d.

    Args:
        pairs: summed log-probs of policy and reference for both completions, each (B,), nats; `margin` (B,) where
            rows have one, in reward units.
        beta: above 0; a pair won by d >= 1/beta nats has no gradient.

    Returns:
        (B,) one loss per pair, reward units, at least 0; 1 while policy and reference agree, without margins.

    References:
        Zhao et al., SLiC-HF, arXiv 2305.10425 eq. 1; Liu et al., RSO, arXiv 2309.06657 eq. 10.
    """
    return mx.maximum(0, 1 - reward_lead(pairs, beta))


def sigmoid_norm(pairs: Pairs, *, beta: Number = 5.0) -> mx.array:
    """-log s(beta (a/|y_w| - b/|y_l|)): length-normalised DPO, arXiv 2411.15124 (Tulu 3), with its beta 5."""
    a, b = log_ratios(pairs)
    return -nn.log_sigmoid(less_margin(beta * (a / pairs.chosen_len - b / pairs.rejected_len), pairs))


def exo_pair(pairs: Pairs, *, beta: Number, label_smoothing: Number = 1e-3) -> mx.array:
    """KL(q || p) of q = (s(beta d), s(-beta d)) from the label's distribution p = (1-e, e): EXO, arXiv 2402.00856
    eq. 16. The reverse of DPO's direction, so it seeks the label's mode; e > 0, or the divergence is infinite."""
    logit = reward_lead(pairs, beta)
    won, lost = nn.log_sigmoid(logit), nn.log_sigmoid(-logit)
    return mx.exp(won) * (won - math.log(1 - label_smoothing)) + mx.exp(lost) * (lost - math.log(label_smoothing))


def robust(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.1) -> mx.array:
    """(-(1-e) log s(beta d) + e log s(-beta d)) / (1 - 2e): rDPO, arXiv 2403.00409. Its expectation over labels
    flipped with probability e is DPO's loss on the true ones; a single value may be negative."""
    logit, e = reward_lead(pairs, beta), label_smoothing
    return (e * nn.log_sigmoid(-logit) - (1 - e) * nn.log_sigmoid(logit)) / (1 - 2 * e)


def fa_dpo(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.1) -> mx.array:
    """-log((1-e) s(beta d) + e s(-beta d)): FA-DPO, arXiv 2512.00709, the likelihood of a label that was flipped with
    probability e after a Bradley-Terry choice.

    Other than conservative DPO it mixes inside the logarithm: a pair lost by far loses its slope, one with e above 1/2
    pulls the other way. The paper fits e to features of each pair; here rows bring it.

    Args:
        pairs: summed log-probs of policy and reference for both completions, each (B,), nats; `label` (B,) where rows
            say with which probability chosen is the better completion, 1 - e; `margin` (B,) where rows have one.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: e of all pairs, in [0, 0.5); with `label` the chance that what it says is wrong once more.

    Returns:
        (B,) one loss per pair, nats, at least 0; log 2 while policy and reference agree, without margins.
    """
    logit = reward_lead(pairs, beta)
    label = mx.ones_like(logit) if pairs.label is None else pairs.label
    right = (1 - label_smoothing) * label + label_smoothing * (1 - label)
    # log 0 = -inf is what a certain label gives, and drops out with a slope of 0.
    return -mx.logaddexp(mx.log(right) + nn.log_sigmoid(logit), mx.log(1 - right) + nn.log_sigmoid(-logit))


def discopop(pairs: Pairs, *, beta: Number, discopop_tau: Number = 0.05) -> mx.array:
    """-(1-m) log s(beta d) + m e^(-beta d) with m = s(beta d / tau): log-ratio modulated loss, arXiv 2406.08414 eq. 5.

    The exponential is bounded: where it overflows m is zero, and infinity times zero is no number.
    """
    logit = reward_lead(pairs, beta)
    logistic = -nn.log_sigmoid(logit)
    return logistic + mx.sigmoid(logit / discopop_tau) * (bounded_exp(-logit) - logistic)


def dpop(pairs: Pairs, *, beta: Number = 0.3, dpop_lambda: Number = 50.0) -> mx.array:
    """-log s(beta (d - lambda max(0, -a))): DPO-Positive (Smaug), arXiv 2402.13228. The penalty stands inside the
    sigmoid and times beta; it acts as soon as the chosen completion is less likely than under the reference."""
    a, _ = log_ratios(pairs)
    fallen = mx.maximum(-a, 0)  # in this order the slope at a = 0 is 0: the first step is DPO's
    return -nn.log_sigmoid(reward_lead(pairs, beta) - beta * dpop_lambda * fallen)


def r_dpo(pairs: Pairs, *, beta: Number, length_alpha: Number = 0.01) -> mx.array:
    """-log s(beta d + alpha (|y_w| - |y_l|)): length-regularised DPO, arXiv 2403.19159.

    The sign from its derivation: the optimum of E[r - alpha |y|] - beta KL has r = beta a + alpha |y| + const, so the
    Bradley-Terry logit is beta d + alpha (|y_w| - |y_l|), and a pair won by length alone asks nothing of the policy.
    """
    return -nn.log_sigmoid(reward_lead(pairs, beta) + length_alpha * (pairs.chosen_len - pairs.rejected_len))


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


def aot(
    pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, step_statistics: StepStatistics | None = None
) -> mx.array:
    """-(1-e) log s(beta u) - e log s(-beta u), u = sort(pi_w - pi_l) - sort(ref_w - ref_l): AOT on pairs, arXiv
    2406.05882 (logistic loss). `step_statistics`: `aot_matches`; without it these pairs are all there are."""
    (matched,) = step_statistics or aot_matches(pairs)
    return smoothed_logistic(beta * (pairs.chosen - pairs.rejected - matched), label_smoothing)


def aot_matches(pairs: Pairs) -> StepStatistics:
    """(B,) for each pair the reference's log-prob difference that has the rank of the policy's among all."""
    policy, ref = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return (mx.stop_gradient(mx.sort(ref)[_ranks(policy)]),)


def aot_unpaired(
    pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, step_statistics: StepStatistics | None = None
) -> mx.array:
    """The same with u = sort(a) - sort(b): unpaired AOT, arXiv 2406.05882. Chosen and rejected completions of
    different prompts meet; both sides of each match get their slope, through one pair's loss each."""
    a, b = log_ratios(pairs)
    b_of_a, a_of_b = step_statistics or aot_unpaired_matches(pairs)
    loss = smoothed_logistic(beta * (a - b_of_a), label_smoothing)
    slope_only = smoothed_logistic(beta * (a_of_b - b), label_smoothing)
    return loss + slope_only - mx.stop_gradient(slope_only)


def aot_unpaired_matches(pairs: Pairs) -> StepStatistics:
    """(B,) twice: the b that has the rank of each a, and the a that has the rank of each b."""
    a, b = log_ratios(pairs)
    return mx.stop_gradient(mx.sort(b)[_ranks(a)]), mx.stop_gradient(mx.sort(a)[_ranks(b)])


def _ranks(values: mx.array) -> mx.array:
    return mx.argsort(mx.argsort(values))
