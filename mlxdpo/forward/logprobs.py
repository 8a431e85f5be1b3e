"""A model meets a batch: log-probabilities of completions, in float32.

Two ways to the same numbers. The fast one computes each distinct token once and lets only scored positions meet the
head; it needs to know the model's parts (`model/trunk.py`). The plain one asks the model for all logits of full rows.
Right padding is harmless under a causal mask, and it keeps MLX's light attention path, which array masks leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward import streams
from mlxdpo.forward.architectures import ModelParts, model_parts
from mlxdpo.forward.packed import PackedLayout, can_pack, packed_layers, packing_is_worth_it
from mlxdpo.forward.shared_prefix import checkpointed, padded_layers, spreader
from mlxdpo.forward.streams import LayerPlan, run_layers
from mlxdpo.types import Batch, Pairs

CHECKED = 2  # pairs that the fast way has to get right
# How far one summed log-prob may be from the reference's at the start, nats: rounding differs with the batch's shape.
TOLERANCE = {mx.float32: 1e-2, mx.bfloat16: 4.0, mx.float16: 1.0}


Forward = Callable[[nn.Module, Batch], Any]
"""(model, batch) -> (R,) summed completion log-probs, nats; or `Rows`, where a modifier asks for more."""


def next_token_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T-1) float32: log p(tokens[:, t+1] | tokens[:, :t+1]), nats."""
    # The CPU falls back to reducing in the logits' own dtype, so they are brought to float32 first.
    return heads.target_logps(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def completion_logps(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """(R, T) token ids and (R, T-1) mask of scored targets -> (R,) summed log-probs of the completions, nats.

    Source: log pi(y|x) of arXiv 2305.18290 eq. 7, a sum over the completion's tokens. The plainest way there is: the
    yardstick of the two below.
    """
    return (next_token_logps(model, tokens) * mask).sum(axis=-1)


def plain_forward(model: nn.Module, batch: Batch) -> mx.array:
    """Full rows and full logits: for any model that mlx-lm can run."""

    def logps(part: Batch) -> mx.array:
        """(R,) log-probs of a part's rows."""
        return _by_row(heads.target_logps(scored_logits(model, part), part.targets), part)

    return whole_rows(streams.map_streams(logps, batch.parts or (batch,)), batch)


def scored_logits(model: nn.Module, batch: Batch) -> mx.array:
    """(N, V) float32 logits of the scored positions, out of full rows."""
    shared = batch.prefix.shape[1]
    rows = mx.concatenate([batch.prefix[batch.group], batch.suffix], axis=1) if shared else batch.suffix
    logits = model(rows)[:, shared:]
    return logits.reshape(-1, logits.shape[-1])[batch.home[batch.positions]].astype(mx.float32)


def plain_details(model: nn.Module, batch: Batch) -> RowDetails:
    """`plain_forward` with all that a modifier may ask."""

    def details(part: Batch) -> RowDetails:
        """The same of a part."""
        logits = scored_logits(model, part)
        return _details(heads.target_logps(logits, part.targets), heads.target_squares(logits), part)

    return _whole_details(streams.map_streams(details, batch.parts or (batch,)), batch)


def fast_forward(checkpoint: Callable[..., Any] | None = None, *, head: Any = heads.token_logps) -> Forward:
    """Shared prefix once, distinct rows once, only scored positions through the head.

    `checkpoint` is `model.prefix.checkpointed` to keep less for the backward pass; `head` is `heads.score_logps` for
    who needs no backward pass.
    """

    def logps(trunk: ModelParts, states: mx.array, batch: Batch) -> mx.array:
        """(R,) log-probs of a part's rows."""
        return _by_row(head(trunk.head, trunk.norm(states[batch.positions]), batch.targets), batch)

    return lambda model, batch: whole_rows(in_parts(model, batch, checkpoint, logps), batch)


def fast_details(
    checkpoint: Callable[..., Any] | None = None, *, head: Any = heads.token_logps_and_squares
) -> Callable[[nn.Module, Batch], RowDetails]:
    """`fast_forward` with all that a modifier may ask."""

    def details(trunk: ModelParts, states: mx.array, batch: Batch) -> RowDetails:
        """Log-probs of a part's rows, of parts of them, and how concentrated the policy is."""
        logps, squares = head(trunk.head, trunk.norm(states[batch.positions]), batch.targets)
        return _details(logps, squares, batch)

    return lambda model, batch: _whole_details(in_parts(model, batch, checkpoint, details), batch)


def in_parts(
    model: nn.Module,
    batch: Batch,
    checkpoint: Callable[..., Any] | None,
    measure: Callable[[ModelParts, mx.array, Batch], Any],
) -> list[Any]:
    """What `measure` makes of the states of each part of a batch: (M, D), those of its `rest`, before the last norm.

    Parts are computed side by side (`lanes`); a batch without any is its only one.
    """
    trunk = model_parts(model)
    assert trunk is not None  # whoever chose this path asked first
    parts = batch.parts or (batch,)
    states = run_layers([functools.partial(_layer_plan, trunk, part, checkpoint) for part in parts])
    return streams.map_streams(lambda part, found: measure(trunk, found, part), parts, states)


def _layer_plan(trunk: ModelParts, batch: Batch, checkpoint: Callable[..., Any] | None) -> LayerPlan:
    """The way of a batch through the blocks: packed where that pays, else as padded rows."""
    spread = spreader(batch.group, batch.per_prompt or None)
    prompts, rows = batch.prefix.shape, batch.rows.shape
    if can_pack(trunk) and packing_is_worth_it(prompts, rows, len(batch.rest)):
        layout = PackedLayout(prompts, batch.rows, batch.home, batch.place, spread)
        tokens = mx.concatenate([batch.prefix.reshape(-1), batch.rest])
        return packed_layers(trunk, tokens, layout, checkpoint)
    padded = padded_layers(trunk, batch.prefix, batch.suffix, spread, checkpoint)
    return padded._replace(leave=lambda *hs: padded.leave(*hs).reshape(-1, hs[-1].shape[-1])[batch.home])


def whole_rows(parts: Sequence[mx.array], batch: Batch) -> mx.array:
    """(R,) numbers of the batch's rows from those of its parts' rows."""
    return widened(_joined(parts), batch.length.shape[0])


def _whole_details(parts: Sequence[RowDetails], batch: Batch) -> RowDetails:
    rows, pairs = batch.length.shape[0], batch.chosen.shape[0]
    columns = map(_joined, zip(*parts, strict=True))
    return RowDetails(*(widened(a, count) for a, count in zip(columns, (rows, pairs, rows), strict=True)))


def _joined(parts: Sequence[mx.array]) -> mx.array:
    """(..., n) of each part, one after the other."""
    return mx.concatenate(list(parts), axis=-1) if len(parts) > 1 else parts[0]


def widened(a: mx.array, count: int) -> mx.array:
    """(..., n) widened to (..., count): what only fills a batch gets what the first has."""
    if a.shape[-1] == count:
        return a
    return mx.concatenate([a, mx.repeat(a[..., :1], count - a.shape[-1], axis=-1)], axis=-1)


def _by_row(logps: mx.array, batch: Batch) -> mx.array:
    """(N,) log-probs of tokens -> (R,) sums over each row's completion."""
    return mx.zeros(batch.length.shape).at[batch.owner].add(logps * batch.scored)


class RowDetails(NamedTuple):
    """What modifiers ask of a batch besides summed log-probs.

    logps    (R,) summed completion log-probs, nats
    shared   (2, B) those of the first min(|chosen|, |rejected|) tokens of each pair's two completions
    squares  (R,) sum over a completion's tokens of log sum_v p_v^2, without gradient
    """

    logps: mx.array
    shared: mx.array
    squares: mx.array


def _details(logps: mx.array, squares: mx.array, batch: Batch) -> RowDetails:
    return RowDetails(_by_row(logps, batch), _shared(logps, batch), _by_row(squares, batch))


def _shared(logps: mx.array, batch: Batch) -> mx.array:
    """(N,) log-probs of tokens -> (2, B) sums over the first min(|chosen|, |rejected|) tokens of each completion.

    Counted from where each completion starts. A mask and not a running sum: that would lose digits over a batch.
    """
    # A batch lays the targets of its rows out one row after the other; what only fills it weighs nothing.
    begins = mx.cumsum(batch.length) - batch.length
    rank = mx.arange(batch.owner.shape[0]) - begins[batch.owner]
    shorter = mx.minimum(batch.length[batch.chosen], batch.length[batch.rejected])
    rows = mx.stack([batch.chosen, batch.rejected])
    counts = (batch.owner == rows[..., None]) & (rank < shorter[None, :, None])
    part = (counts * (logps * batch.scored)).sum(axis=-1)
    # The shorter one is there whole: the same number as its row's, to the bit.
    return mx.where(batch.length[rows] == shorter, _by_row(logps, batch)[rows], part)


class ForwardFns(NamedTuple):
    """How a model is run: `train` under differentiation, `score` without. Both give the same numbers, to the bit."""

    train: Forward
    score: Forward


PLAIN_FORWARD = ForwardFns(plain_forward, plain_forward)
PLAIN_DETAILS = ForwardFns(plain_details, plain_details)  # type: ignore[arg-type]


def forward_fns(model: nn.Module, checkpoint: bool = False) -> ForwardFns:
    """The fast way where the model's parts are known, else the plain one, which knows no checkpointing."""
    if model_parts(model) is None:
        return PLAIN_FORWARD
    return ForwardFns(fast_forward(checkpointed if checkpoint else None), fast_forward(head=heads.score_logps))


def detailed_fns(ways: ForwardFns, checkpoint: bool = False) -> ForwardFns:
    """The same way through the model, giving `Rows`: for modifiers that ask more than summed log-probs."""
    if ways is PLAIN_FORWARD:
        return PLAIN_DETAILS
    train, score = fast_details(checkpointed if checkpoint else None), fast_details(head=heads.score_logps_and_squares)
    return ForwardFns(train, score)  # type: ignore[arg-type]


def score_pairs(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Pairs:
    """Everything an objective needs of a batch; each field (B,)."""
    found = (forward or forward_fns(model).train)(model, batch)
    rows = found if isinstance(found, RowDetails) else None
    logps: mx.array = rows.logps if rows else found
    chosen, rejected, length, extras = batch.chosen, batch.rejected, batch.length, batch.extras
    both = logps[chosen], logps[rejected], batch.ref[chosen], batch.ref[rejected], length[chosen], length[rejected]
    if rows is None:
        return Pairs(*both, *(extras or ()))
    squares = mx.stack([rows.squares[chosen], rows.squares[rejected]])
    return Pairs(*both, *(extras or ()), shared=rows.shared, ref_shared=batch.ref_shared, squares=squares)


def _tolerance(model: nn.Module) -> float:
    floating = {a.dtype for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    return max(TOLERANCE[dtype] for dtype in floating)
