"""A reward model meets a batch: one number per row, from the state of its last token. Nothing of width V is computed.

A batch lays out a completion without its last token, because nothing is predicted from it; here the last token is
what is read. So rows are laid out with one token more (`data.takes.with_end`), which is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward import streams
from mlxdpo.forward.architectures import ModelParts
from mlxdpo.forward.logprobs import Forward, ForwardFns, in_parts, whole_rows
from mlxdpo.forward.shared_prefix import checkpointed
from mlxdpo.model.reward_head import normed_states, rewards
from mlxdpo.types import Batch


def last_places(batch: Batch) -> mx.array:
    """(R,) int32: where in `batch.rest` each row's last token stands."""
    order = mx.arange(batch.owner.shape[0]) * batch.scored.astype(mx.int32)
    return batch.positions[mx.zeros(batch.length.shape, mx.int32).at[batch.owner].maximum(order)]


def fast_rewards(checkpoint: Callable[..., Any] | None = None) -> Forward:
    """Shared prefix once, distinct rows once, and only the last token of each row meets norm and head."""

    def forward(model: nn.Module, batch: Batch) -> mx.array:
        """(R,) rewards of the batch's rows."""

        def measure(trunk: ModelParts, states: mx.array, part: Batch) -> mx.array:
            """(R,) rewards of a part's rows."""
            return rewards(model, trunk.norm(states[last_places(part)]))

        return whole_rows(in_parts(model, batch, checkpoint, measure), batch)

    return forward


def plain_rewards(model: nn.Module, batch: Batch) -> mx.array:
    """(R,) rewards from full rows through the model's own trunk."""

    def measure(part: Batch) -> mx.array:
        """(R,) rewards of a part's rows."""
        shared = part.prefix.shape[1]
        rows = mx.concatenate([part.prefix[part.group], part.suffix], axis=1) if shared else part.suffix
        states = normed_states(model, rows)[:, shared:]
        return rewards(model, states.reshape(-1, states.shape[-1])[part.home[last_places(part)]])

    return whole_rows(streams.map_streams(measure, batch.parts or (batch,)), batch)


def reward_fns(fast: bool, checkpoint: bool = False) -> ForwardFns:
    """How rewards are computed where log-probs take the `fast` way, and where they do not."""
    if not fast:
        return ForwardFns(plain_rewards, plain_rewards)
    return ForwardFns(fast_rewards(checkpointed if checkpoint else None), fast_rewards())
