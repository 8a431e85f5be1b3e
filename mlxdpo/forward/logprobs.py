"""A model meets a batch: log-probabilities of completions, in float32.

Two paths to the same numbers. The fast one computes each distinct token once and runs the head over scored positions
alone, at one of the levels of `levels.py`. The plain one asks the model for all logits of full rows, as generation runs
it. Right padding is harmless under a causal mask, and it keeps MLX's attention that takes less memory: array masks
leave it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.layer_checkpoint import checkpointed_layers
from mlxdpo.forward.layer_plan import join_columns
from mlxdpo.forward.levels import Level, read_parts, whole_rows
from mlxdpo.forward.shared_prefix import whole_logits
from mlxdpo.forward.streams import map_streams
from mlxdpo.forward.token_rows import of_rows, row_sums, token_rows
from mlxdpo.machine.device import this_machine
from mlxdpo.types import Batch, Pairs

# Rounding of a token's log-prob where activations are float32, nats: a GPU may multiply in TF32 (M5, CUDA).
TOKEN_ROUNDING = {"cpu": 5e-5, "metal": 4e-3, "cuda": 4e-3}


Forward = Callable[[nn.Module, Batch], Any]
"""(model, batch) -> (R,) summed completion log-probs, nats; or `RowDetails`, where a modifier asks for more."""


def next_token_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T-1) float32: log p(tokens[:, t+1] | tokens[:, :t+1]), nats."""
    # The CPU falls back to reducing in the logits' own dtype, so they are brought to float32 first.
    return heads.target_logps(whole_logits(model, tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def completion_logps(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """(R, T) token ids and (R, T-1) mask of scored targets -> (R,) summed log-probs of the completions, nats.

    Source: log pi(y|x) of arXiv 2305.18290 eq. 7, a sum over the completion's tokens. The
    simplest code for it: what the two paths below are checked against.
    """
    return (next_token_logps(model, tokens) * mask).sum(axis=-1)


def plain_forward(model: nn.Module, batch: Batch, checkpoint: bool = False, *, head: Any = heads.target_logps) -> Any:
    """(R,) log-probs from full rows and full logits: for any model that mlx-lm can run.

    `head` is `heads.target_logps_and_squares` for `RowDetails`: all that a modifier may ask.
    """

    def read(batch: Batch) -> Any:
        """From the logits of the scored positions."""
        return head(scored_logits(model, batch, checkpoint), batch.targets)

    return _sums_or_details(map_streams(read, batch.parts or (batch,)), batch)


plain_details = functools.partial(plain_forward, head=heads.target_logps_and_squares)


def scored_logits(model: nn.Module, batch: Batch, checkpoint: bool = False) -> mx.array:
    """(N, V) float32 logits of the scored positions, out of full rows."""
    with checkpointed_layers(model) if checkpoint else contextlib.nullcontext():
        logits = whole_logits(model, whole_rows(batch))[:, batch.prefix.shape[1] :]
    return token_rows(batch).scored_in_rows(logits, batch).astype(mx.float32)


def fast_forward(level: Level, checkpoint: bool = False, *, head: Any = heads.token_logps) -> Forward:
    """Distinct rows once, as `level` says, and only scored positions through the head.

    With `checkpoint` less is kept for the backward pass; `head` is `heads.score_logps` where none follows, and
    `heads.token_logps_and_squares` or `heads.score_logps_and_squares` for `RowDetails`.
    """

    def read(batch: Batch, states: mx.array) -> Any:
        """From what enters the head at all distinct tokens."""
        return head(level.head, token_rows(batch).scored(states, batch), batch.targets)

    return lambda model, batch: _sums_or_details(read_parts(model, level, batch, checkpoint, read), batch)


class RowDetails(NamedTuple):
    """What modifiers ask of a batch besides summed log-probs.

    logps    (R,) summed completion log-probs, nats
    shared   (2, B) those of the first min(|chosen|, |rejected|) tokens of each pair's two completions
    squares  (R,) sum over a completion's tokens of log sum_v p_v^2, without gradient
    """

    logps: mx.array
    shared: mx.array
    squares: mx.array


def _sums_or_details(parts: Sequence[Any], batch: Batch) -> Any:
    """(R,) sums of the log-probs of tokens, found part by part; `RowDetails` where squares come with them."""
    count = batch.targets.shape[0]
    if not isinstance(parts[0], tuple):
        return row_sums(join_columns(parts, count), batch)
    logps, squares = (join_columns(column, count) for column in zip(*parts, strict=True))
    return RowDetails(row_sums(logps, batch), _shared(logps, batch), row_sums(squares, batch))


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


def score_pairs(model: nn.Module, batch: Batch, forward: Forward = plain_forward) -> Pairs:
    """Everything an objective needs of a batch; each field (B,)."""
    found = forward(model, batch)
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
