"""A reward model meets a batch: one number per row, from the state of its last token. Nothing of width V is computed.

A batch lays out a completion without its last token, because nothing is predicted from it; here the last token is
what is read. So rows are laid out with one token more (`transforms.with_end`), which is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.architectures import known_parts
from mlxdpo.forward.layer_plan import checkpointed, run_layers, run_whole
from mlxdpo.forward.logprobs import Forward, ForwardFns, plan_batch, whole_rows
from mlxdpo.forward.patch_mlx_lm import patched
from mlxdpo.model.reward_head import normed_states, rewards
from mlxdpo.types import Batch


def last_places(batch: Batch) -> mx.array:
    """(R,) int32: where in `batch.rest` each row's last token stands."""
    owns = (batch.owner[None] == mx.arange(batch.length.shape[0])[:, None]) & (batch.scored > 0)
    return batch.positions[(owns * mx.arange(batch.owner.shape[0])).max(axis=1)]


def fast_rewards(checkpoint: Callable[..., Any] | None = None) -> Forward:
    """Shared prefix once, distinct rows once, and only the last token of each row meets norm and head."""

    def forward(model: nn.Module, batch: Batch) -> mx.array:
        """(R,) rewards of the batch's rows."""
        parts = known_parts(model)

        def read(batch: Batch, states: mx.array) -> mx.array:
            """(R,) rewards, from the states of all distinct tokens."""
            return rewards(model, parts.norm(states[last_places(batch)]))

        return run_layers(batch, lambda batch: plan_batch(parts, batch, checkpoint), read)

    return forward


def plain_rewards(model: nn.Module, batch: Batch) -> mx.array:
    """(R,) rewards from full rows through the model's own layers."""

    def read(batch: Batch) -> mx.array:
        """(R,) rewards."""
        with patched([]):
            states = normed_states(model, whole_rows(batch))[:, batch.prefix.shape[1] :]
        return rewards(model, states.reshape(-1, states.shape[-1])[batch.home[last_places(batch)]])

    return run_whole(batch, read)


def reward_fns(fast: bool, checkpoint: bool = False) -> ForwardFns:
    """How rewards are computed where log-probs take the `fast` path, and where they do not."""
    if not fast:
        return ForwardFns(plain_rewards, plain_rewards)
    return ForwardFns(fast_rewards(checkpointed if checkpoint else None), fast_rewards())
