"""From rollouts to moved weights: PPO's epochs of clipped updates, RLOO's single step. Metrics carry TRL's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.baselines import ppo, rloo
from mlxdpo.baselines.rollouts import Actor, Rollouts, portions, token_pass
from mlxdpo.config import RolloutConfig
from mlxdpo.training.step import Gradients, NonFiniteError, add, gradient_norm

Metrics = dict[str, float]
Terms = Callable[[Sequence[int]], tuple[mx.array, list[mx.array]]]
"""Rows of a batch -> their part of the loss, and sums to report."""


class WeightUpdate(NamedTuple):
    """What moves the weights: `update` of `step.make_update`, the largest gradient norm, and rows computed at once."""

    update: Callable[[Gradients, float, float], None]
    clip: float
    size: int

    def move(self, actor: Actor, terms: Terms, rows: Sequence[int], lr: float) -> tuple[list[float], float]:
        """One optimizer step on the sum of `terms` over `rows`; returns the sums and the gradient's norm.

        Raises `NonFiniteError` before a bad gradient reaches the weights.
        """
        value_and_grad = nn.value_and_grad(actor, terms)
        total: Any = None
        sums = np.zeros(0)
        for at in portions(len(rows), self.size):
            (loss, more), gradients = value_and_grad([rows[i] for i in at])
            total = add(total, gradients)
            mx.eval(total, loss, more)
            found = np.array([loss.item(), *(one.item() for one in more)])
            sums = found if not len(sums) else sums + found
        norm = gradient_norm(total).item()
        if not (math.isfinite(norm) and np.isfinite(sums).all()):
            raise NonFiniteError(
                "the loss or gradient of a batch of samples is not a finite number; the weights were not changed by "
                "it: lower optim.lr, or set model.dtype float32"
            )
        self.update(total, min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0, lr)
        return sums.tolist(), norm


def ppo_update(
    actor: Actor, mover: WeightUpdate, batch: Rollouts, knobs: RolloutConfig, rng: np.random.Generator, lr: float
) -> Metrics:
    """Epochs of minibatches on one batch of rollouts: arXiv 1707.06347 algorithm 1."""
    mask = batch.mask
    kl = ppo.ESTIMATORS[knobs.kl_estimator](batch.old, batch.ref)
    scores = ppo.less_without_end(batch.scores, batch.ended, knobs.missing_eos_penalty)
    rewards = ppo.shaped_rewards(scores, kl, mask, knobs.kl)
    raw, returns = ppo.advantages(rewards, batch.values, mask, knobs.gamma, knobs.lam)
    targets = [mx.array(a.astype(np.float32)) for a in (ppo.whiten(raw, mask), returns, batch.old, batch.values)]
    sums, norms = [], []
    for _ in range(knobs.epochs):
        for rows in np.array_split(rng.permutation(len(scores)), min(knobs.minibatches, len(scores))):
            terms = _ppo_terms(actor, batch, targets, knobs, float(mask[rows].sum()))
            found, norm = mover.move(actor, terms, rows.tolist(), lr)
            sums.append(found)
            norms.append(norm)
    loss, policy, value, clipped, approx = np.mean(sums, axis=0)
    spread = returns[mask > 0]
    unexplained = float(np.var((returns - batch.values)[mask > 0]))
    return _shared_metrics(batch, scores, rewards.sum(axis=1)) | {
        "loss": float(loss),
        "loss/policy_avg": float(policy),
        "loss/value_avg": float(value),
        "policy/clipfrac_avg": float(clipped),
        "policy/approxkl_avg": float(approx),
        "val/explained": 1 - unexplained / float(np.var(spread)) if np.var(spread) > 0 else 0.0,
        "grad_norm": float(np.mean(norms)),
    }


def _ppo_terms(
    actor: Actor, batch: Rollouts, targets: Sequence[mx.array], knobs: RolloutConfig, tokens: float
) -> Terms:
    """The loss of some rows as their share of a mean over the `tokens` of a minibatch."""

    def terms(rows: Sequence[int]) -> tuple[mx.array, list[mx.array]]:
        """Loss; policy loss, value loss, share of clipped tokens, half the mean squared log-ratio."""
        part, index = batch.rows.part(rows), mx.array(list(rows))
        advantages, returns, old, before = (a[index] for a in targets)
        logps, states = token_pass(actor.model, part)
        logps = mx.where(part.mask > 0, logps, old)  # a ratio of padding may overflow, and 0 * inf is no gradient
        mean = lambda each: mx.where(part.mask > 0, each, 0.0).sum() / tokens  # noqa: E731
        policy = mean(ppo.clipped_surrogate_loss(logps, old, advantages, knobs.clip))
        value = mean(ppo.value_loss(actor.values(states), before, returns, knobs.value_clip))
        moved = logps - old
        clipped = mean((mx.abs(mx.exp(moved) - 1) > knobs.clip).astype(mx.float32))
        return policy + knobs.value_coef * value, [policy, value, clipped, 0.5 * mean(mx.square(moved))]

    return terms


def rloo_update(
    actor: Actor, mover: WeightUpdate, batch: Rollouts, knobs: RolloutConfig, rng: np.random.Generator, lr: float
) -> Metrics:
    """One step on one batch, which is on-policy to the bit: arXiv 2402.14740."""
    mask = batch.mask
    kl = ppo.ESTIMATORS[knobs.kl_estimator](batch.old, batch.ref)
    scores = ppo.less_without_end(batch.scores, batch.ended, knobs.missing_eos_penalty)
    rewards = rloo.sequence_rewards(scores, kl, mask, knobs.kl)
    advantages = mx.array(rloo.leave_one_out(rewards, knobs.samples).astype(np.float32))

    def terms(rows: Sequence[int]) -> tuple[mx.array, list[mx.array]]:
        """The share of some rows in the mean over the batch."""
        part, index = batch.rows.part(rows), mx.array(list(rows))
        logps, _ = token_pass(actor.model, part)
        return rloo.reinforce_loss(logps, advantages[index], part.mask).sum() / len(rewards), []

    (loss,), norm = mover.move(actor, terms, range(len(rewards)), lr)
    return _shared_metrics(batch, scores, rewards) | {"loss": loss, "grad_norm": norm}


def _shared_metrics(batch: Rollouts, scores: np.ndarray, rewards: np.ndarray) -> Metrics:
    """What both report, by TRL's names: means over completions; KL in nats a completion, k1."""
    mask = batch.mask
    return {
        "objective/scores": float(scores.mean()),
        "objective/rlhf_reward": float(rewards.mean()),
        "objective/kl": float(((batch.old - batch.ref) * mask).sum(axis=1).mean()),
        "objective/entropy": float(-(batch.old * mask).sum(axis=1).mean()),
        "completions/mean_length": float(mask.sum(axis=1).mean()),
        "completions/ended": float(batch.ended.mean()),
    }
