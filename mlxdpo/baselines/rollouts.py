"""Rollouts: completions that the policy just drew, their scores, and what policy, reference and critic say of them.

Unlike preference pairs, the same completions are passed through the model many times (old policy, reference, every
epoch of updates). What lies below the first trained layer gives the same states each time, so it is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.baselines.ppo import mask_after_end
from mlxdpo.data.batch_shapes import NARROWEST
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.find_head import find_head
from mlxdpo.forward.layer_plan import LayerPlan, plan_layers
from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.shared_prefix import whole_states
from mlxdpo.inference.generate import generate
from mlxdpo.types import Text, UserError

HeadPass = Callable[[heads.Head, mx.array, mx.array], mx.array]


class RolloutRows(NamedTuple):
    """R completions behind their prompts, padded on the right, which a causal model does not see.

    tokens   (R, T) int32, prompt and completion
    at       (R, L) int32, the position that predicts each completion token
    targets  (R, L) int32, the completion tokens
    mask     (R, L) float32, 1 for the tokens of the completion, its end included
    lower    (R, T, D) states behind the first `depth` layers, which nothing trains; None where all is computed
    """

    tokens: mx.array
    at: mx.array
    targets: mx.array
    mask: mx.array
    lower: mx.array | None = None
    depth: int = 0

    def part(self, rows: Sequence[int]) -> RolloutRows:
        """Some of the rows."""
        index = mx.array(list(rows))
        lower = None if self.lower is None else self.lower[index]
        return RolloutRows(self.tokens[index], self.at[index], self.targets[index], self.mask[index], lower, self.depth)


def lay_out(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> RolloutRows:
    """Token ids of prompts and completions, one for one, as rows; a completion has at least one token."""
    count, longest = len(prompts), max(map(len, completions))
    width = max(NARROWEST, *(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)))
    tokens = np.zeros((count, width), np.int32)
    at, targets = np.zeros((2, count, longest), np.int32)
    mask = np.zeros((count, longest), np.float32)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        size = len(completion)
        tokens[i, : len(prompt) + size] = [*prompt, *completion]
        at[i, :size], targets[i, :size] = len(prompt) - 1 + np.arange(size), completion
        mask[i, :size] = 1
    return RolloutRows(*map(mx.array, (tokens, at, targets, mask)))


def frozen_layers(model: Any) -> int:
    """How many layers from the bottom give the same states whatever is trained; 0 when the embedding is trained."""
    if any("embed" in name for name, _ in tree_flatten(model.trainable_parameters())):
        return 0
    trained = [i for i, layer in enumerate(model.layers) if tree_flatten(layer.trainable_parameters())]
    return min(trained, default=len(model.layers))


def with_lower(model: nn.Module, rows: RolloutRows, size: int) -> RolloutRows:
    """The rows with the states below the first trained layer, `size` rows at once; as they are where there is none, or
    where the layers do more than turn one array into the next."""
    count, head, lower = frozen_layers(model), find_head(model), []
    for start in range(0, rows.tokens.shape[0], size) if count else ():
        plan = plan_layers(model, functools.partial(whole_states, model, head, rows.tokens[start : start + size]))
        if plan is None:
            return rows
        with patched(attention_files(model)):
            lower.append(functools.reduce(lambda h, layer: layer(h), plan.layers[:count], plan.enter))
        mx.eval(lower[-1])
    return rows._replace(lower=mx.concatenate(lower), depth=count) if lower else rows


def token_pass(model: nn.Module, rows: RolloutRows, head: HeadPass = heads.token_logps) -> tuple[mx.array, mx.array]:
    """(R, L) log-probs of the completion tokens, nats, and (R, L, D) normed states that predict them.

    `head` is `heads.score_logps` for who needs no gradient. What stands where the mask is 0 means nothing.
    """
    found = find_head(model)
    run = functools.partial(whole_states, model, found, rows.tokens)
    plan = None if rows.lower is None else plan_layers(model, run)
    with patched(attention_files(model)):
        states = run() if plan is None else plan.leave(_from_lower(plan, rows))
    picked = _picked(states, rows.at)
    logps = head(found, picked.reshape(-1, picked.shape[-1]), rows.targets.reshape(-1))
    return logps.reshape(rows.targets.shape), picked


def _from_lower(plan: LayerPlan, rows: RolloutRows) -> mx.array:
    assert rows.lower is not None
    return functools.reduce(lambda h, layer: layer(h), plan.layers[rows.depth :], rows.lower)


def _picked(states: mx.array, at: mx.array) -> mx.array:
    """(R, T, D) and (R, L) -> (R, L, D)."""
    return mx.take_along_axis(states, at[..., None], axis=1)


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
        raise UserError(f"reward {name} gave {what} of {count} completions; check its inputs")
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
