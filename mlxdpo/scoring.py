"""A model meets a batch: log-probabilities of completions, in float32.

Two ways to the same numbers. The fast one computes each distinct token once and lets only scored positions meet the
head; it needs to know the model's parts (`model/trunk.py`). The plain one asks the model for all logits of full rows.
Right padding is harmless under a causal mask, and it keeps MLX's light attention path, which array masks leave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.model import head as heads
from mlxdpo.model.packed import Layout, packed_states, packs, pays
from mlxdpo.model.prefix import checkpointed, hidden_states, spreader
from mlxdpo.model.trunk import Trunk, split
from mlxdpo.types import Batch, Pairs

Forward = Callable[[nn.Module, Batch], mx.array]
"""(model, batch) -> (R,) summed completion log-probs, nats."""


def token_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T-1) float32: log p(tokens[:, t+1] | tokens[:, :t+1]), nats."""
    # The CPU falls back to reducing in the logits' own dtype, so they are brought to float32 first.
    return heads.target_logps(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def completion_logps(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """(R, T) token ids and (R, T-1) mask of scored targets -> (R,) summed log-probs of the completions, nats.

    Source: log pi(y|x) of arXiv 2305.18290 eq. 7, a sum over the completion's tokens. The plainest way there is: the
    yardstick of the two below.
    """
    return (token_logps(model, tokens) * mask).sum(axis=-1)


def plain_forward(model: nn.Module, batch: Batch) -> mx.array:
    """Full rows and full logits: for any model that mlx-lm can run."""
    shared = batch.prefix.shape[1]
    rows = mx.concatenate([batch.prefix[batch.group], batch.suffix], axis=1) if shared else batch.suffix
    logits = model(rows)[:, shared:]
    scored = logits.reshape(-1, logits.shape[-1])[batch.home[batch.positions]].astype(mx.float32)
    return _by_row(heads.target_logps(scored, batch.targets), batch)


def fast_forward(checkpoint: Callable[..., Any] | None = None, *, head: Any = heads.token_logps) -> Forward:
    """Shared prefix once, distinct rows once, only scored positions through the head.

    `checkpoint` is `model.prefix.checkpointed` to keep less for the backward pass; `head` is `heads.score_logps` for
    who needs no backward pass.
    """

    def forward(model: nn.Module, batch: Batch) -> mx.array:
        """(R,) log-probs of the batch's rows."""
        trunk = split(model)
        assert trunk is not None  # whoever chose this path asked first
        states = rest_states(trunk, batch, checkpoint)
        scored = trunk.norm(states[batch.positions])
        return _by_row(head(trunk.head, scored, batch.targets), batch)

    return forward


def rest_states(trunk: Trunk, batch: Batch, checkpoint: Callable[..., Any] | None = None) -> mx.array:
    """(M, D) states of the batch's `rest`, before the last norm: packed where that pays, else as padded rows."""
    spread = spreader(batch.group, batch.per_prompt or None)
    prompts, rows = batch.prefix.shape, batch.rows.shape
    if packs(trunk) and pays(prompts, rows, len(batch.rest)):
        layout = Layout(prompts, batch.rows, batch.home, batch.place, spread)
        tokens = mx.concatenate([batch.prefix.reshape(-1), batch.rest])
        return packed_states(trunk, tokens, layout, checkpoint)
    states = hidden_states(trunk, batch.prefix, batch.suffix, spread, checkpoint)
    return states.reshape(-1, states.shape[-1])[batch.home]


def _by_row(logps: mx.array, batch: Batch) -> mx.array:
    """(N,) log-probs of tokens -> (R,) sums over each row's completion."""
    return mx.zeros(batch.length.shape).at[batch.owner].add(logps * batch.scored)


class Ways(NamedTuple):
    """How a model is run: `train` under differentiation, `score` without. Both give the same numbers, to the bit."""

    train: Forward
    score: Forward


PLAIN = Ways(plain_forward, plain_forward)


def ways_for(model: nn.Module, checkpoint: bool = False) -> Ways:
    """The fast way where the model's parts are known, else the plain one, which knows no checkpointing."""
    if split(model) is None:
        return PLAIN
    return Ways(fast_forward(checkpointed if checkpoint else None), fast_forward(head=heads.score_logps))


def score_pairs(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Pairs:
    """Everything an objective needs of a batch; each field (B,)."""
    logps = (forward or ways_for(model).train)(model, batch)
    chosen, rejected, length = batch.chosen, batch.rejected, batch.length
    return Pairs(
        logps[chosen], logps[rejected], batch.ref[chosen], batch.ref[rejected], length[chosen], length[rejected]
    )
