"""A model meets a batch: log-probabilities of completions, in float32.

Two paths to the same numbers. The fast one computes each distinct token once and runs the head over scored positions
alone; it needs to know the model's parts (`architectures.py`). The plain one asks the model for all logits of full
rows. Right padding is harmless under a causal mask, and it keeps MLX's attention that takes less memory: array masks
leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.architectures import ModelParts, known_parts, model_parts
from mlxdpo.forward.layer_plan import LayerPlan, checkpointed, join_columns, run_layers, run_whole
from mlxdpo.forward.packed import PackedLayout, can_pack, packed_layers, packing_is_worth_it
from mlxdpo.forward.shared_prefix import padded_layers
from mlxdpo.forward.token_rows import of_rows, row_sums, spreader, token_rows
from mlxdpo.machine.device import this_machine
from mlxdpo.types import Batch, Pairs

# Rounding of a token's log-prob where activations are float32, nats: a GPU may multiply in TF32 (M5, CUDA).
TOKEN_ROUNDING = {"cpu": 5e-5, "metal": 4e-3, "cuda": 4e-3}


Forward = Callable[[nn.Module, Batch], Any]
"""(model, batch) -> (R,) summed completion log-probs, nats; or `RowDetails`, where a modifier asks for more."""


def next_token_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T-1) float32: log p(tokens[:, t+1] | tokens[:, :t+1]), nats."""
    # The CPU falls back to reducing in the logits' own dtype, so they are brought to float32 first.
    return heads.target_logps(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def completion_logps(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """(R, T) token ids and (R, T-1) mask of scored targets -> (R,) summed log-probs of the completions, nats.

    Source: log pi(y|x) of arXiv 2305.18290 eq. 7, a sum over the completion's tokens. The
    simplest code for it: what the two paths below are checked against.
    """
    return (next_token_logps(model, tokens) * mask).sum(axis=-1)


def plain_forward(model: nn.Module, batch: Batch) -> mx.array:
    """(R,) log-probs from full rows and full logits: for any model that mlx-lm can run."""
    return run_whole(
        batch, lambda batch: row_sums(heads.target_logps(scored_logits(model, batch), batch.targets), batch)
    )


def plain_details(model: nn.Module, batch: Batch) -> RowDetails:
    """`plain_forward` with all that a modifier may ask."""

    def read(batch: Batch) -> RowDetails:
        """From the logits of the scored positions."""
        logits = scored_logits(model, batch)
        return _details(heads.target_logps(logits, batch.targets), heads.target_squares(logits), batch)

    return run_whole(batch, read, _join_details)


def scored_logits(model: nn.Module, batch: Batch) -> mx.array:
    """(N, V) float32 logits of the scored positions, out of full rows."""
    logits = model(whole_rows(batch))[:, batch.prefix.shape[1] :]
    return token_rows(batch).scored_in_rows(logits, batch).astype(mx.float32)


def whole_rows(batch: Batch) -> mx.array:
    """(R, P + S) token ids: each row with its prefix."""
    return mx.concatenate([batch.prefix[batch.group], batch.suffix], axis=1) if batch.prefix.shape[1] else batch.suffix


def fast_forward(checkpoint: Callable[..., Any] | None = None, *, head: Any = heads.token_logps) -> Forward:
    """Shared prefix once, distinct rows once, only scored positions through the head.

    `checkpoint` is `checkpointed` to keep less for the backward pass; `head` is `heads.score_logps` where no backward
    pass follows.
    """

    def forward(model: nn.Module, batch: Batch) -> mx.array:
        """(R,) log-probs of the batch's rows."""
        parts = known_parts(model)

        def read(batch: Batch, states: mx.array) -> mx.array:
            """(R,) log-probs, from the states of all distinct tokens."""
            return row_sums(head(parts.head, parts.norm(token_rows(batch).scored(states, batch)), batch.targets), batch)

        return run_layers(batch, lambda batch: plan_batch(parts, batch, checkpoint), read)

    return forward


def fast_details(
    checkpoint: Callable[..., Any] | None = None, *, head: Any = heads.token_logps_and_squares
) -> Callable[[nn.Module, Batch], RowDetails]:
    """`fast_forward` with all that a modifier may ask."""

    def forward(model: nn.Module, batch: Batch) -> RowDetails:
        """The details of the batch's rows."""
        parts = known_parts(model)

        def read(batch: Batch, states: mx.array) -> RowDetails:
            """From the states of all distinct tokens."""
            logps, squares = head(parts.head, parts.norm(token_rows(batch).scored(states, batch)), batch.targets)
            return _details(logps, squares, batch)

        return run_layers(batch, lambda batch: plan_batch(parts, batch, checkpoint), read, _join_details)

    return forward


def plan_batch(parts: ModelParts, batch: Batch, checkpoint: Callable[..., Any] | None) -> LayerPlan:
    """A batch through the layers: packed where that saves enough, else as padded rows. It ends at (M, D), the states
    of `batch.rest` before the last norm."""
    prompts, rows = batch.prefix.shape, batch.rows.shape
    if can_pack(parts) and packing_is_worth_it(prompts, rows, len(batch.rest)):
        tokens = mx.concatenate([batch.prefix.reshape(-1), batch.rest])
        return packed_layers(parts, tokens, PackedLayout(batch), checkpoint)
    spread = spreader(batch.group, batch.per_prompt or None)
    padded = padded_layers(parts, batch.prefix, batch.suffix, spread, checkpoint)
    return padded._replace(leave=lambda *hs: token_rows(batch).to_tokens(padded.leave(*hs)))


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
    return RowDetails(row_sums(logps, batch), _shared(logps, batch), row_sums(squares, batch))


def _join_details(parts: Sequence[RowDetails], batch: Batch) -> RowDetails:
    rows, pairs = batch.length.shape[0], batch.chosen.shape[0]
    counts = (rows, pairs, rows)
    return RowDetails(*(join_columns(a, count) for a, count in zip(zip(*parts, strict=True), counts, strict=True)))


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
    return mx.where(batch.length[rows] == shorter, of_rows(row_sums(logps, batch), rows), part)


class ForwardFns(NamedTuple):
    """How a model is run: `train` under differentiation, `score` without. Both give the same numbers, to the bit."""

    train: Forward
    score: Forward


PLAIN_FORWARD = ForwardFns(plain_forward, plain_forward)
PLAIN_DETAILS = ForwardFns(plain_details, plain_details)  # type: ignore[arg-type]


def forward_fns(model: nn.Module, checkpoint: bool = False) -> ForwardFns:
    """The fast path where the model's parts are known, else the plain one, which knows no checkpointing."""
    if model_parts(model) is None:
        return PLAIN_FORWARD
    return ForwardFns(fast_forward(checkpointed if checkpoint else None), fast_forward(head=heads.score_logps))


def detailed_fns(fns: ForwardFns, checkpoint: bool = False) -> ForwardFns:
    """The same path through the model, giving `RowDetails`: for modifiers that ask more than summed log-probs."""
    if fns is PLAIN_FORWARD:
        return PLAIN_DETAILS
    train, score = fast_details(checkpointed if checkpoint else None), fast_details(head=heads.score_logps_and_squares)
    return ForwardFns(train, score)  # type: ignore[arg-type]


def score_pairs(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Pairs:
    """Everything an objective needs of a batch; each field (B,)."""
    found = (forward or forward_fns(model).train)(model, batch)
    rows = found if isinstance(found, RowDetails) else None
    logps: mx.array = rows.logps if rows else found
    chosen, rejected, length, extras = batch.chosen, batch.rejected, batch.length, batch.extras
    both = (
        of_rows(logps, chosen),
        of_rows(logps, rejected),
        batch.ref[chosen],
        batch.ref[rejected],
        length[chosen],
        length[rejected],
    )
    if rows is None:
        return Pairs(*both, *(extras or ()))
    squares = mx.stack([rows.squares[chosen], rows.squares[rejected]])
    return Pairs(*both, *(extras or ()), shared=rows.shared, ref_shared=batch.ref_shared, squares=squares)


@contextmanager
def float32_activations(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` computes in float32 with the weights it has, whatever their dtype: its embeddings give
    float32, and MLX promotes what they meet. Costs the embedding once more, and a copy of one weight at a time."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    tables = [module for module in model.modules() if isinstance(module, kinds)]
    stored = [{k: a for k, a in table.items() if k in ("weight", "scales", "biases")} for table in tables]
    try:
        for table, arrays in zip(tables, stored, strict=True):
            table.update({k: a.astype(mx.float32) for k, a in arrays.items() if mx.issubdtype(a.dtype, mx.floating)})
        yield
    finally:
        for table, arrays in zip(tables, stored, strict=True):
            table.update(arrays)


def rounding_tolerance(tokens: Any, measured: float = 0.0) -> Any:
    """How far sums of log-probs over so many tokens may be apart by rounding alone, nats.

    Four standard deviations of independent errors; `measured` is the error of one token where more is known than
    that activations are float32 (`TOKEN_ROUNDING`).
    """
    return 4 * max(measured, TOKEN_ROUNDING[this_machine().kind]) * np.sqrt(tokens)
