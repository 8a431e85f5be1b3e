"""Proximal Policy Optimization of a language model as pure functions: rewards, advantages and the two clipped losses.

PPO is arXiv 1707.06347, its advantages arXiv 1506.02438 (GAE), the KL penalty in the reward and the value function
arXiv 2203.02155 (InstructGPT) and 1909.08593; conventions (whitening, where the score goes, what is masked) are TRL's.

Shapes: R completions, padded on the right to L tokens; `mask` (R, L) is 1 through the token that ends a completion.
What needs no gradient is computed in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np


def k1(logps: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """log pi - log ref of the sampled tokens, nats: unbiased for the KL, and below zero for many a token.

    J. Schulman, "Approximating KL Divergence" (2020); the penalty of arXiv 1909.08593 eq. 2.
    """
    return logps - ref


def k3(logps: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """exp(l) - 1 - l with l = log ref - log pi, nats: never below zero, less noisy; same source."""
    ratio = ref - logps
    return np.expm1(ratio) - ratio


ESTIMATORS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"k1": k1, "k3": k3}


def mask_after_end(tokens: np.ndarray, eos_ids: frozenset[int]) -> np.ndarray:
    """(R, L) sampled tokens -> (R, L) float64: 1 through the first end of sequence, 0 behind it.

    The end itself is an action of the policy like any other; what was sampled behind it is nobody's.
    """
    ends = np.isin(tokens, sorted(eos_ids))
    return (np.cumsum(ends, axis=1) - ends == 0).astype(np.float64)


def less_without_end(scores: np.ndarray, ended: np.ndarray, penalty: float) -> np.ndarray:
    """(R,) scores of whole completions, less `penalty` for those that did not end by themselves (TRL)."""
    return scores - penalty * ~ended.astype(bool)


def shaped_rewards(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, coefficient: float) -> np.ndarray:
    """(R, L) r_t = -coefficient * kl_t, plus the completion's score at its last token; 0 where the mask is 0.

    arXiv 2203.02155 eq. 2 without its pretraining term; arXiv 1909.08593 eq. 2. `scores` (R,), `kl` (R, L) nats.
    """
    rewards = np.where(mask > 0, -coefficient * kl, 0.0)
    last = mask.sum(axis=1).astype(int) - 1
    rewards[np.arange(len(scores)), last] += scores
    return rewards


def advantages(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(R, L) advantages and returns: GAE, arXiv 1506.02438 eq. 16; returns are advantages + values.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; behind the last token both are 0.
    """
    held = np.where(mask > 0, values, 0.0)
    result, after, following = np.zeros_like(rewards), np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - held[:, t]
        after = np.where(mask[:, t] > 0, delta + gamma * lam * after, 0.0)
        result[:, t], following = after, held[:, t]
    return result, result + held


def whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the masked entries, 0 elsewhere; the variance is the unbiased one, as in TRL.

    A single entry has no spread: it becomes 0.
    """
    kept = values[mask > 0]
    spread = np.sqrt(kept.var(ddof=1) + 1e-8) if len(kept) > 1 else np.inf
    return np.where(mask > 0, (values - kept.mean()) / spread, 0.0)


def clipped_surrogate_loss(logps: mx.array, old: mx.array, advantages: mx.array, clip: float) -> mx.array:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of each token, rho = exp(log pi - log pi_old).

    Minus the clipped surrogate of arXiv 1707.06347 eq. 7; any shape, the same for all three arrays.
    """
    ratio = mx.exp(logps - old)
    return mx.maximum(-advantages * ratio, -advantages * mx.clip(ratio, 1 - clip, 1 + clip))


def value_loss(values: mx.array, old: mx.array, returns: mx.array, clip: float) -> mx.array:
    """max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2 of each token.

    The squared error of arXiv 1707.06347 eq. 9, clipped as in its authors' code and TRL.
    """
    near = old + mx.clip(values - old, -clip, clip)
    return 0.5 * mx.maximum(mx.square(values - returns), mx.square(near - returns))
