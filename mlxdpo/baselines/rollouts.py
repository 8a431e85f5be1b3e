"""Rollouts: completions that the policy just drew, their scores, and what policy, reference and critic say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.baselines.passes import RolloutRows, lay_out, token_pass, with_lower
from mlxdpo.baselines.ppo import mask_after_end
from mlxdpo.forward import fused_head as heads
from mlxdpo.inference.generate import generate
from mlxdpo.types import Text, UserError

Score = Callable[[Sequence[Text], Sequence[str]], Sequence[float] | np.ndarray]
"""(prompts, completions) -> (R,) numbers, the more the better; NaN where an answer cannot be judged."""
Side = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the reference to run while the context lasts."""


class Reward(NamedTuple):
    """What the policy is tuned to please: a name for the manifest, and the function."""

    name: str
    score: Score


class Reference(NamedTuple):
    """The frozen model. `shares` says that it is the policy with its adapters off: layers below them are the same."""

    side: Side
    shares: bool


class Actor(nn.Module):
    """A policy and, for PPO, a value function on its states (a trunk shared as in arXiv 1707.06347 section 5)."""

    def __init__(self, model: nn.Module, critic: nn.Linear | None = None):
        super().__init__()
        self.model = model
        if critic is not None:
            self.critic = critic

    def values(self, states: mx.array) -> mx.array:
        """(R, L, D) normed states -> (R, L) float32 reward that is expected from there on; 0 without a critic."""
        if "critic" not in self:
            return mx.zeros(states.shape[:-1])
        return self.critic(states.astype(mx.float32))[..., 0]


def new_critic(size: int) -> nn.Linear:
    """A critic that expects nothing: the first values are 0, whatever the states."""
    critic = nn.Linear(size, 1)
    critic.update({"weight": mx.zeros((1, size)), "bias": mx.zeros((1,))})
    return critic


class Drawn(NamedTuple):
    """Sampled completions, their end included, and whether they have one; one entry for each prompt given."""

    prompts: list[list[int]]
    completions: list[list[int]]
    ended: np.ndarray


class Rollouts(NamedTuple):
    """R completions: `scores`, `ended` (R,); log-probs of policy (`old`) and reference, nats, and values, (R, L)."""

    rows: RolloutRows
    scores: np.ndarray
    ended: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    values: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(R, L) float64."""
        return np.array(self.rows.mask, np.float64)


def draw_completions(
    model: nn.Module, prompts: Sequence[list[int]], max_tokens: int, eos_ids: frozenset[int], seed: int, size: int
) -> Drawn:
    """One completion for each prompt, at temperature 1: what the policy's log-probs are about.

    A prompt given k times gets k different ones. Sampling goes on behind an end and is cut there, because the end is a
    token like any other, and models with several of them do not say which one it was.
    """
    done = generate(model, prompts, max_tokens=max_tokens, eos_ids=(), seed=seed, batch_size=size)
    tokens = np.array([one.tokens for one in done])
    lengths = mask_after_end(tokens, eos_ids).sum(axis=1).astype(int)
    completions = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    ended = np.array([completion[-1] in eos_ids for completion in completions])
    return Drawn(list(prompts), completions, ended)


def checked_scores(name: str, scores: Sequence[float] | np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """(R,) float64 scores, and how many answers could not be judged (NaN): those count as the worst of the batch.

    Left at nothing they would be a way out of a low reward. Raises `UserError` for another number of scores, an
    infinite one, or a batch of which no answer could be judged.
    """
    values = np.asarray(scores, np.float64)
    if values.shape != (count,):
        raise UserError(f"reward {name} gave {values.shape} numbers for {count} completions; expected one for each")
    bad = np.isnan(values)
    if bad.all() or np.isinf(values).any():
        what = "no number for any" if bad.all() else "an infinite number for one"
        raise UserError(f"reward {name} gave {what} of {count} completions; look at what it is given")
    return np.where(bad, values[~bad].min(), values), int(bad.sum())


def score_completions(actor: Actor, reference: Reference, drawn: Drawn, scores: np.ndarray, size: int) -> Rollouts:
    """Lay the completions out and ask policy, critic and reference about them, `size` rows at once."""
    rows = with_lower(actor.model, lay_out(drawn.prompts, drawn.completions), size)
    own = _score_rollouts(actor.model, rows, size, actor.values)
    with reference.side() as model:
        ref = _score_rollouts(model, rows if reference.shares else rows._replace(lower=None), size, None)
    return Rollouts(rows, scores, drawn.ended, own[0], ref[0], own[1])


def _score_rollouts(
    model: nn.Module, rows: RolloutRows, size: int, values: Callable[[mx.array], mx.array] | None
) -> tuple[np.ndarray, np.ndarray]:
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for at in portions(rows.tokens.shape[0], size):
        logps, states = token_pass(model, rows.part(at), heads.score_logps)
        value = mx.zeros(logps.shape) if values is None else values(states)
        mx.eval(logps, value)
        found.append((np.array(logps, np.float64), np.array(value, np.float64)))
    logps, value = (np.concatenate(column) for column in zip(*found, strict=True))
    return logps, value


def portions(count: int, size: int) -> list[range]:
    """0..count-1 in pieces of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
