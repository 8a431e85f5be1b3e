"""REINFORCE Leave-One-Out (arXiv 2402.14740): a completion's baseline is the mean reward of its siblings; no critic.

The whole completion is one action, and the KL penalty is part of its reward. Pure functions; R = G * k completions,
the k of a prompt side by side.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def sequence_rewards(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, coefficient: float) -> np.ndarray:
    """(R,) score - coefficient * sum_t kl_t over the completion (arXiv 2402.14740). `kl`, `mask` (R, L)."""
    return scores - coefficient * (kl * mask).sum(axis=1)


def leave_one_out(rewards: np.ndarray, samples: int) -> np.ndarray:
    """(R,) R_i minus the mean reward of the other completions of its prompt (arXiv 2402.14740).

    Raises `ValueError` for fewer than two completions a prompt: there is no other.
    """
    if samples < 2 or len(rewards) % samples:
        raise ValueError(f"{len(rewards)} rewards for {samples} completions a prompt; expected two or more of each")
    groups = rewards.reshape(-1, samples)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)


def reinforce_loss(logps: mx.array, advantages: mx.array, mask: mx.array) -> mx.array:
    """(R,) -A_i log pi(y_i | x_i): its gradient is REINFORCE's (Williams 1992). `logps`, `mask` (R, L)."""
    return -advantages * (logps * mask).sum(axis=-1)
