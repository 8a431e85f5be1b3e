"""A model meets its own completions, token by token: log-probs and states of every sampled token.

Unlike preference pairs, the same completions are passed through the model many times (old policy, reference, every
epoch of updates). What lies below the first trained layer gives the same states each time, so it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.data.batch_shapes import NARROWEST
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.architectures import ModelParts, model_parts
from mlxdpo.forward.shared_prefix import hidden_states
from mlxdpo.model.reward_head import normed_states

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


def frozen_layers(model: nn.Module, parts: ModelParts) -> int:
    """How many layers from the bottom give the same states whatever is trained; 0 when the embedding is trained."""
    if any("embed" in name for name, _ in tree_flatten(model.trainable_parameters())):
        return 0
    trained = [i for i, layer in enumerate(parts.layers) if tree_flatten(layer.trainable_parameters())]
    return min(trained, default=len(parts.layers))


def with_lower(model: nn.Module, rows: RolloutRows, size: int) -> RolloutRows:
    """The rows with the states below the first trained layer, `size` rows at once; as they are where there is none."""
    parts = model_parts(model)
    count = 0 if parts is None else frozen_layers(model, parts)
    if parts is None or count == 0:
        return rows
    under, lower = parts._replace(layers=parts.layers[:count], windows=parts.windows[:count]), []
    for start in range(0, rows.tokens.shape[0], size):
        tokens = rows.tokens[start : start + size]
        lower.append(hidden_states(under, tokens[:, :0], tokens, lambda h: h))
        mx.eval(lower[-1])
    return rows._replace(lower=mx.concatenate(lower), depth=count)


def token_pass(model: nn.Module, rows: RolloutRows, head: HeadPass = heads.token_logps) -> tuple[mx.array, mx.array]:
    """(R, L) log-probs of the completion tokens, nats, and (R, L, D) normed states that predict them.

    `head` is `heads.score_logps` for who needs no gradient. What stands where the mask is 0 means nothing.
    """
    parts = model_parts(model)
    if parts is None:
        return _whole_model_pass(model, rows)
    if (lower := rows.lower) is not None:
        above = slice(rows.depth, None)
        parts = parts._replace(embed=lambda _: lower, layers=parts.layers[above], windows=parts.windows[above])
    states = hidden_states(parts, rows.tokens[:, :0], rows.tokens, lambda h: h)
    picked = parts.norm(_picked(states, rows.at))
    logps = head(parts.head, picked.reshape(-1, picked.shape[-1]), rows.targets.reshape(-1))
    return logps.reshape(rows.targets.shape), picked


def _whole_model_pass(model: Any, rows: RolloutRows) -> tuple[mx.array, mx.array]:
    logits = _picked(model(rows.tokens), rows.at).astype(mx.float32)
    return heads.target_logps(logits, rows.targets), _picked(normed_states(model, rows.tokens), rows.at)


def _picked(states: mx.array, at: mx.array) -> mx.array:
    """(R, T, D) and (R, L) -> (R, L, D)."""
    return mx.take_along_axis(states, at[..., None], axis=1)
