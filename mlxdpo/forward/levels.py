"""How far the fast way reaches in a model: four levels, of which each takes what the one below does and adds to it.

    packed   distinct tokens without padding (`packed.py`)
    prefix   the shared prefix of a prompt once, rows behind it (`shared_prefix.py`)
    head     full rows; only scored positions meet the head, fused with the log-softmax (`fused_head.py`)
    plain    full rows and full logits, as generation runs the model

No architecture is known by name: a level that a model's code cannot be traced through is not offered, and those that
are offered are compared with the plain one before they are used (`choose_forward.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.data.batching import collate
from mlxdpo.forward.find_head import NoFastWay, find_head
from mlxdpo.forward.fused_head import Head, plain_map
from mlxdpo.forward.layer_checkpoint import checkpointed_layers
from mlxdpo.forward.layer_plan import run_side_by_side
from mlxdpo.forward.packed import packed_states
from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.shared_prefix import prefixed_states, whole_states
from mlxdpo.forward.streams import map_streams
from mlxdpo.forward.token_rows import spreader, token_rows
from mlxdpo.types import Batch, Example

# What a model's code may raise where it is run in a way that it was not written for.
STRANGE = (NoFastWay, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Level(NamedTuple):
    """How a model is run: the level's name, its head (None at `plain`), and why it is not a faster one. `agrees` says
    whether its numbers were compared with the plain way's."""

    name: str
    head: Head | None = None
    why: str = ""
    agrees: bool = False

    @property
    def packs(self) -> bool:
        """Whether rows run without padding."""
        return self.name == "packed"

    @property
    def plain(self) -> bool:
        """Whether full logits are computed."""
        return self.head is None


PLAIN = Level("plain")


def offered_levels(model: nn.Module) -> list[Level]:
    """The levels that the model's code can be traced through, the fastest first, without `plain` if there is another.

    Nothing is computed, so the model needs no weights.
    """
    try:
        head = find_head(model)
    except STRANGE as error:
        return [PLAIN._replace(why=_said(error))]
    found, why, batch = [], "", probe_batch(head)
    for name in ("packed", "prefix", "head"):
        try:
            level = Level(name, head, why)
            rest_states(model, level, batch)
            found.append(level)
        except STRANGE as error:
            why = why or _said(error)
    return found or [PLAIN._replace(why=why)]


def _said(error: BaseException) -> str:
    if isinstance(error, NoFastWay):
        return str(error)
    text = (str(error).splitlines() or [""])[0]
    return f"its code cannot be run so ({type(error).__name__}: {text.replace('mlxdpo.forward.packed.', '')[:100]})"


def probe_batch(head: Head) -> Batch:
    """A small batch of random tokens: two prompts with a shared prefix, rows of unequal length."""
    draw = np.random.default_rng(0)
    most = plain_map(head.module()).weight.shape[0]
    ids = lambda count: draw.integers(0, most, count).astype(np.int32)  # noqa: E731
    pairs = [Example(ids(36), ids(9), ids(4), "random"), Example(ids(33), ids(3), ids(8), "random")]
    return collate(pairs, (0, 1), 2)


def rest_states(model: nn.Module, level: Level, batch: Batch) -> mx.array:
    """(M, D): what enters the head at each of `batch.rest`."""
    assert level.head is not None
    with patched(attention_files(model)):
        if level.packs:
            return packed_states(model, level.head, batch)
        if level.name == "prefix":
            spread = spreader(batch.group, batch.per_prompt or None)
            states = prefixed_states(model, level.head, batch.prefix, batch.suffix, spread)
        else:
            states = whole_states(model, level.head, whole_rows(batch))[:, batch.prefix.shape[1] :]
        return token_rows(batch).to_tokens(states)


def read_parts(
    model: nn.Module, level: Level, batch: Batch, checkpoint: bool, read: Callable[[Batch, mx.array], Any]
) -> list[Any]:
    """What `read` makes of each part of a batch and its `rest_states`; a CPU computes the parts side by side."""
    parts = batch.parts or (batch,)
    runs = [functools.partial(rest_states, model, level, part) for part in parts]
    with checkpointed_layers(model) if checkpoint else contextlib.nullcontext(), patched(attention_files(model)):
        # A shared prefix takes two calls of the model, so its layers cannot be taken apart.
        one_call = level.name != "prefix"
        states = run_side_by_side(model, runs) if one_call else map_streams(lambda run: run(), runs)
    return map_streams(read, parts, states)


def whole_rows(batch: Batch) -> mx.array:
    """(R, P + S) token ids: each row with its prefix."""
    return mx.concatenate([batch.prefix[batch.group], batch.suffix], axis=1) if batch.prefix.shape[1] else batch.suffix
