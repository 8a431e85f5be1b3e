"""Objectives that ask no reference. Three of them imitate the chosen completion too, with the mean over *tokens*.

That mean couples the pairs of an optimizer step, by their lengths alone: a pair's share is its summed log-prob over the
mean length of the step's chosen completions (`mean_length`), so that the mean over pairs is the mean over tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.losses.ratios import Number, bounded_expm1, demanded, log1mexp, smoothed, token_means
from mlxdpo.types import Pairs

# What an objective reports besides rewards and log-probs, by TRL's names. Each gets columns of NumPy float64, (B,).


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


Window = tuple[mx.array, ...]


def sft(pairs: Pairs, *, window: Window | None = None) -> mx.array:
    """-log pi(y_w|x) / mean |y_w|: imitation of the chosen completions. Over the pairs of a step its mean is minus the
    mean log-prob of all their chosen tokens, the SFT term of RPO (arXiv 2404.19733, there with a weight).
    `window`: `mean_length`; without it these pairs are all there are."""
    (mean,) = window or mean_length(pairs)
    return -pairs.chosen / mean


def mean_length(pairs: Pairs) -> Window:
    """(B,) the mean length of the chosen completions, tokens, once for each pair."""
    return (mx.broadcast_to(pairs.chosen_len.mean(), pairs.chosen_len.shape),)


def cpo(
    pairs: Pairs,
    *,
    beta: Number,
    label_smoothing: Number = 0.0,
    cpo_alpha: Number = 1.0,
    window: Window | None = None,
) -> mx.array:
    """-log s(beta (pi_w - pi_l)) + alpha NLL(y_w): CPO, arXiv 2401.08417 eq. 3 with its likelihood term;
    label_smoothing as in conservative DPO."""
    logit = demanded(beta * (pairs.chosen - pairs.rejected), pairs)
    return smoothed(logit, label_smoothing) + cpo_alpha * sft(pairs, window=window)


def orpo(pairs: Pairs, *, beta: Number, window: Window | None = None) -> mx.array:
    """NLL(y_w) - beta log s(log odds_w - log odds_l), odds = p / (1 - p) of the mean token log-prob: ORPO, arXiv
    2403.07691 eq. 6 and 7, with beta the paper's lambda. NLL is over completion tokens (TRL's takes the prompt's too).
    """
    w, low = token_means(pairs)
    log_odds = (w - low) - (log1mexp(w) - log1mexp(low))
    return sft(pairs, window=window) - beta * nn.log_sigmoid(log_odds)


def simpo(pairs: Pairs, *, beta: Number = 2.0, gamma: Number = 1.0, label_smoothing: Number = 0.0) -> mx.array:
    """-log s(beta pi_w/|y_w| - beta pi_l/|y_l| - gamma): SimPO, arXiv 2405.14734 eq. 6, gamma in reward units."""
    w, low = token_means(pairs)
    return smoothed(demanded(beta * (w - low) - gamma, pairs), label_smoothing)


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
    w, low = token_means(pairs)
    lead = shaped(w, alphapo_alpha) - shaped(low, alphapo_alpha)
    return smoothed(demanded(beta * lead - gamma, pairs), label_smoothing)


def shaped(logp: mx.array, alpha: Number) -> mx.array:
    """(1 - p^-alpha)/alpha of a log-prob, nats; log p itself at alpha = 0."""
    return logp if alpha == 0 else -bounded_expm1(-alpha * logp) / alpha
