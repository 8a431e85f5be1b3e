"""Objectives that ask no reference. Three of them imitate the chosen completion too, with the mean over *tokens*.

That mean couples the pairs of an optimizer step, by their lengths alone: a pair's share is its summed log-prob over the
mean length of the step's chosen completions (`mean_length`), so that the mean over pairs is the mean over tokens.

`imitation` and `odds` are what objectives report besides rewards and log-probs, by TRL's names: of the pairs of a
logged step as NumPy float64 columns (B,) (`metrics.Scored`).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.losses.objective import StepStatistics
from mlxdpo.losses.ratios import Number, bounded_expm1, less_margin, log1mexp, mean_logps, smoothed_logistic
from mlxdpo.types import Pairs


def sft(pairs: Pairs, *, step_statistics: StepStatistics | None = None) -> mx.array:
    """-log pi(y_w|x) / mean |y_w|: imitation of the chosen completions. Over the pairs of a step its mean is minus the
    mean log-prob of all their chosen tokens, the SFT term of RPO (arXiv 2404.19733, there with a weight).
    `step_statistics`: `mean_length`; without it these pairs are all there are."""
    (mean,) = step_statistics or mean_length(pairs)
    return -pairs.chosen / mean


def mean_length(pairs: Pairs) -> StepStatistics:
    """(B,) the mean length of the chosen completions, tokens, once for each pair."""
    return (mx.broadcast_to(pairs.chosen_len.mean(), pairs.chosen_len.shape),)


def cpo(
    pairs: Pairs,
    *,
    beta: Number,
    label_smoothing: Number = 0.0,
    cpo_alpha: Number = 1.0,
    step_statistics: StepStatistics | None = None,
) -> mx.array:
    """-log s(beta (pi_w - pi_l)) + alpha NLL(y_w): CPO, arXiv 2401.08417 eq. 3 with its likelihood term;
    label_smoothing as in conservative DPO."""
    logit = less_margin(beta * (pairs.chosen - pairs.rejected), pairs)
    return smoothed_logistic(logit, label_smoothing) + cpo_alpha * sft(pairs, step_statistics=step_statistics)


def orpo(pairs: Pairs, *, beta: Number, step_statistics: StepStatistics | None = None) -> mx.array:
    """NLL(y_w) - beta log s(log odds_w - log odds_l), odds = p / (1 - p) of the mean token log-prob: ORPO.

    NLL is over completion tokens (TRL's takes the prompt's too).

    Args:
        pairs: summed log-probs of the policy for both completions, each (B,), nats, below 0, and their lengths (B,)
            in tokens, at least 1. The reference's are not read.
        beta: the paper's lambda, the weight of the odds-ratio term, above 0; 0.1 there.
        step_statistics: `mean_length` over all pairs of the step; without it these pairs are all there are.

    Returns:
        (B,) one loss per pair, nats a token. Its mean over a step is the mean NLL of all chosen tokens plus the
        odds-ratio term.

    References:
        Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691 eq. 6 and 7.
    """
    w, low = mean_logps(pairs)
    log_odds = (w - low) - (log1mexp(w) - log1mexp(low))
    return sft(pairs, step_statistics=step_statistics) - beta * nn.log_sigmoid(log_odds)


def simpo(pairs: Pairs, *, beta: Number = 2.0, gamma: Number = 1.0, label_smoothing: Number = 0.0) -> mx.array:
    """-log s(beta pi_w/|y_w| - beta pi_l/|y_l| - gamma): SimPO; label_smoothing as in conservative DPO.

    Args:
        pairs: summed log-probs of the policy for both completions, each (B,), nats, and their lengths (B,) in tokens,
            at least 1; `margin` (B,) where rows have one, added to gamma. The reference's are not read.
        beta: scale of the mean log-prob, above 0; 2.0 or 2.5 in the paper.
        gamma: target margin in reward units (beta * nats a token), at least 0; 0.3 to 1.6 in the paper.
        label_smoothing: the probability that a label is wrong, in [0, 0.5); 0 in the paper.

    Returns:
        (B,) one loss per pair, nats, at least 0.

    References:
        Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734 eq. 6.
    """
    w, low = mean_logps(pairs)
    return smoothed_logistic(less_margin(beta * (w - low) - gamma, pairs), label_smoothing)


def alphapo(
    pairs: Pairs,
    *,
    beta: Number = 2.5,
    gamma: Number = 0.25,
    alphapo_alpha: Number = 0.25,
    label_smoothing: Number = 0.0,
) -> mx.array:
    """SimPO with the reward beta (1 - p^-alpha)/alpha of the mean token probability p: AlphaPO, arXiv 2501.03884.
    alpha = 0 is SimPO. Written -expm1(-alpha log p)/alpha, with the exponent bounded."""
    w, low = mean_logps(pairs)
    lead = shaped_reward(w, alphapo_alpha) - shaped_reward(low, alphapo_alpha)
    return smoothed_logistic(less_margin(beta * lead - gamma, pairs), label_smoothing)


def shaped_reward(logp: mx.array, alpha: Number) -> mx.array:
    """(1 - p^-alpha)/alpha of a log-prob, nats; log p itself at alpha = 0."""
    return logp if alpha == 0 else -bounded_expm1(-alpha * logp) / alpha


def imitation(scored: Any) -> dict[str, float]:
    """`nll_loss`: minus the mean log-prob of a chosen token, nats."""
    return {"nll_loss": float(-scored.chosen.sum() / scored.chosen_len.sum())}


def odds(scored: Any) -> dict[str, float]:
    """`log_odds_chosen`: mean log of the chosen completion's odds over the rejected one's, arXiv 2403.07691 eq. 4;
    `log_odds_ratio`: mean log-sigmoid of it."""
    w, low = scored.chosen / scored.chosen_len, scored.rejected / scored.rejected_len
    ratio = (w - low) - (np.log(-np.expm1(w)) - np.log(-np.expm1(low)))
    found = {"log_odds_chosen": float(ratio.mean()), "log_odds_ratio": float(-np.logaddexp(0, -ratio).mean())}
    return imitation(scored) | found
