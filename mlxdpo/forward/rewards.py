"""A reward model meets a batch: one number per row, from the state of its last token. Nothing of width V is computed.

A batch lays out a completion without its last token, because nothing is predicted from it; here the last token is
what is read. So rows are laid out with one token more (`transforms.with_end`), which is never computed.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.choose_forward import ForwardFns
from mlxdpo.forward.layer_plan import join_columns
from mlxdpo.forward.levels import Level, read_parts
from mlxdpo.forward.reward_head import rewards
from mlxdpo.types import Batch, UserError


def last_places(batch: Batch) -> mx.array:
    """(R,) int32: where in `batch.rest` each row's last token stands."""
    owns = (batch.owner[None] == mx.arange(batch.length.shape[0])[:, None]) & (batch.scored > 0)
    return batch.positions[(owns * mx.arange(batch.owner.shape[0])).max(axis=1)]


def reward_fns(level: Level, checkpoint: bool = False) -> ForwardFns:
    """How rewards are computed at a level: only the last token of each row meets the head.

    Raises `UserError` at `plain`: there is no place for a reward head.
    """
    if level.plain:
        raise UserError(f"a reward model replaces a model's head, but {level.why}; use another model")

    def forward(model: nn.Module, batch: Batch, checkpoint: bool = False) -> mx.array:
        """(R,) rewards of the batch's rows."""
        read = lambda part, states: rewards(model, states[last_places(part)])  # noqa: E731
        return join_columns(read_parts(model, level, batch, checkpoint, read), batch.length.shape[0])

    return ForwardFns(functools.partial(forward, checkpoint=checkpoint), forward, level)
