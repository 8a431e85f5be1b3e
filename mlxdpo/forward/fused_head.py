"""The head, fused with the log-softmax: log-probs of the scored tokens without ever holding (T, V) for a whole batch.

For a frozen head, d log p(y) / dh = W[y] - sum_v p_v W_v does not depend on the loss, so one chunked pass gives each
log-prob and its gradient row; nothing of width V is kept and nothing is computed again in the backward pass. A
trainable head goes through the same chunks, computed again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.elementwise import exp
from mlxdpo.forward.layer_plan import checkpointed, with_gradient
from mlxdpo.machine.device import this_machine

LOGITS = 64 << 20  # bytes of float32 logits that are made at a time, about, whatever the vocabulary
PACKED_MAPS = (nn.QuantizedLinear, nn.QuantizedEmbedding)
MAPS = (nn.Linear, nn.Embedding, *PACKED_MAPS)
TILE = 64  # rows of a matmul's tile on Metal; what a last one does not fill is computed for nothing


Reader = Callable[[mx.array, mx.array], tuple[mx.array, ...]]
"""(logits, tokens) of some positions -> arrays with one entry for each position."""


class Head(NamedTuple):
    """A model's last linear map and what follows it: logits = cap * tanh(factor * (h W^T + b) / cap).

    `module` is read again at each call, so that its weights are the live ones. `find_head.find_head` finds it.
    """

    module: Callable[[], Any]
    softcap: float | None
    factor: float


def plain_map(module: Any) -> Any:
    """The linear map itself: an adapter, or a module around the head, keeps it under one of these names."""
    return next((module[name] for name in ("linear", "embedding") if isinstance(module.get(name), MAPS)), module)


def logits(head: Head, h: mx.array) -> mx.array:
    """(N, D) -> (N, V) float32, as the model itself gives them.

    A packed head multiplies in float32, which costs nothing: in bfloat16 its logits alone move a token's log-prob by
    hundredths of a nat. An unpacked one in 16 bits would need its weights copied to float32 for each chunk.
    """
    module = head.module()
    if isinstance(module, PACKED_MAPS):
        h = h.astype(mx.float32)
    raw = (module.as_linear if hasattr(module, "as_linear") else module)(h)
    z = raw * head.factor if head.factor != 1 else raw
    if head.softcap is not None:
        z = mx.tanh(z / head.softcap) * head.softcap
    return z.astype(mx.float32)


def is_frozen(head: Head) -> bool:
    """Whether the fused pass applies: nothing in the head is trained, and it is a plain or quantised linear map."""
    module = head.module()
    return isinstance(module, MAPS) and not module.trainable_parameters()


def chunk_of(vocabulary: int) -> int:
    """Positions whose logits are held at once: as many whole tiles of a GPU's matmul as come nearest to `LOGITS`."""
    return TILE * max(1, round(LOGITS / (4 * vocabulary * TILE)))


def _position_chunks(head: Head, h: mx.array) -> list[slice]:
    step = chunk_of(plain_map(head.module()).weight.shape[0])
    return [slice(i, i + step) for i in range(0, h.shape[0], step)]


def _each_chunk(head: Head, h: mx.array, y: mx.array, read: Reader) -> tuple[mx.array, ...]:
    """What `read` makes of the logits (n, V) and tokens (n,) of each chunk, put together."""
    parts: list[tuple[mx.array, ...]] = []
    for at in _position_chunks(head, h):
        states = h[at]
        if parts:  # one chunk after the other, and all of its arrays, or the logits of many are held at once
            (states,) = mx.depends([states], list(parts[-1]))
        parts.append(read(logits(head, states), y[at]))
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))


def token_logps(head: Head, h: mx.array, y: mx.array) -> mx.array:
    """(N, D) states and (N,) tokens -> (N,) log p(y), float32 nats."""
    if is_frozen(head):
        return _fused(head, lambda logps, rows, e, total: (logps, rows))(h, y)[0]
    module = head.module()
    # Inside a checkpoint, the tokens are an input like any other.
    logps = checkpointed(module, lambda hh, yy: _head_softmax(logits(head, hh), mx.stop_gradient(yy))[0])
    return mx.concatenate([logps(h[at], y[at]) for at in _position_chunks(head, h)])


def token_logps_and_squares(head: Head, h: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """`token_logps`, and (N,) log sum_v p_v^2 of the same positions, which has no gradient (WPO, arXiv 2406.11827)."""
    if is_frozen(head):
        logps, _, squares = _fused(head, lambda logps, rows, e, total: (logps, rows, _log_square(e, total)))(h, y)
        return logps, mx.stop_gradient(squares)
    states = mx.stop_gradient(h)
    return token_logps(head, h, y), mx.stop_gradient(score_logps_and_squares(head, states, y)[1])


def score_logps_and_squares(head: Head, h: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """`token_logps_and_squares` for who needs no gradient: one chunk after the other, nothing kept."""

    def read(z: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        """Of one chunk."""
        logps, e, total = _head_softmax(z, y)
        return logps, _log_square(e, total)

    logps, squares = _each_chunk(head, h, y, read)
    return logps, squares


def _log_square(e: mx.array, total: mx.array) -> mx.array:
    """log sum_v p_v^2, (N,), of p = e / total: between -log V (uniform) and 0 (certain)."""
    return mx.log(in_blocks(e * e).sum(axis=-1).sum(axis=-1)) - 2 * mx.log(total[:, 0])


def score_logps(head: Head, h: mx.array, y: mx.array) -> mx.array:
    """`token_logps` for who needs no gradient: one chunk after the other, nothing kept."""
    return _each_chunk(head, h, y, lambda z, y: _head_softmax(z, y)[:1])[0]


def _head_softmax(z: mx.array, y: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(N, V) logits -> log p(y) (N,), exp(z - max) (N, V) and its row sums (N, 1).

    Training and scoring share it to the operation: a policy that has not moved differs from its reference by nothing.
    """
    top = mx.stop_gradient(mx.max(z, axis=-1, keepdims=True))
    e = exp(z - top)
    total = in_blocks(e).sum(axis=-1).sum(axis=-1, keepdims=True)
    return (mx.take_along_axis(z, y[:, None], axis=-1) - top - mx.log(total))[:, 0], e, total


def target_squares(z: mx.array) -> mx.array:
    """(..., V) float32 logits -> (...) log sum_v p_v^2, without gradient."""
    z = mx.stop_gradient(z)
    return mx.logsumexp(mx.logsumexp(in_blocks(2 * z), axis=-1), axis=-1) - 2 * mx.logsumexp(
        mx.logsumexp(in_blocks(z), axis=-1), axis=-1
    )


def target_logps(z: mx.array, y: mx.array) -> mx.array:
    """(..., V) float32 logits and (...) tokens -> (...) log p(y), nats: the platform's fused kernel, or two sweeps."""
    if this_machine().kind != "cpu":
        return -mx.fast.cross_entropy(z, y)
    at_y = mx.take_along_axis(z, y[..., None], axis=-1).squeeze(-1)
    return at_y - mx.logsumexp(mx.logsumexp(in_blocks(z), axis=-1), axis=-1)


def target_logps_and_squares(z: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """`target_logps`, and `target_squares` of the same positions."""
    return target_logps(z, y), target_squares(z)


def in_blocks(z: mx.array) -> mx.array:
    """(..., V) -> (..., blocks, V / blocks) with about sqrt(V) blocks, to be reduced in two sweeps.

    MLX's CPU adds a whole row up in one float32 sweep, which loses the small terms: at 150,000 words log-probs come out
    up to 5e-4 nats a token too high, always to one side, and 0.03 nats over an answer. Two short sweeps stay within
    1e-5 at the same cost. A vocabulary of prime size is one block, as MLX does it.
    """
    vocabulary = z.shape[-1]
    blocks = max(d for d in range(1, math.isqrt(vocabulary) + 1) if vocabulary % d == 0)
    return z.reshape(*z.shape[:-1], blocks, -1)


def _fused(head: Head, keep: Callable[..., tuple[mx.array, ...]]) -> Callable[..., tuple[mx.array, ...]]:
    """(h, y) -> log-probs (N,), their gradient rows (N, D), and what else `keep` takes of a chunk, without gradient.

    `keep` gets what `_logps_and_rows` gives. The rows are the log-probs' gradient.
    """

    def run(h: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        """One chunk of logits after the other."""
        return _each_chunk(head, h, y, lambda z, y: keep(*_logps_and_rows(head, z, y)))

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        """The rows times the cotangents of the log-probs."""
        h, y = primals
        return (outputs[1] * cotangents[0][:, None]).astype(h.dtype), mx.zeros_like(y)

    return with_gradient(run, backward)


def _logps_and_rows(head: Head, z: mx.array, y: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Log-probs, their gradient rows, and the softmax (`_head_softmax`) of (N, V) logits."""
    logp, e, total = _head_softmax(z, y)
    if head.softcap is None:
        # W[y] - (e W) / total: the one-hot part is a look-up, not a matmul.
        row = _weight_rows(head, y) - _times_weight(head, e) / total
        return logp, row * head.factor, e, total
    slope = 1 - (z / head.softcap) ** 2
    at = mx.take_along_axis(slope, y[:, None], axis=-1)
    row = _weight_rows(head, y) * at - _times_weight(head, e * slope) / total
    return logp, row * head.factor, e, total


def _times_weight(head: Head, p: mx.array) -> mx.array:
    """(N, V) @ W -> (N, D) float32, W plain or quantised."""
    module = head.module()
    if isinstance(module, PACKED_MAPS):
        arrays = p.astype(module.scales.dtype), module.weight, module.scales, module.get("biases")
        return mx.quantized_matmul(*arrays, transpose=False, **_packing(module)).astype(mx.float32)
    return (p.astype(module.weight.dtype) @ module.weight).astype(mx.float32)


def _weight_rows(head: Head, y: mx.array) -> mx.array:
    """W[y], (N, D) float32, W plain or quantised."""
    module = head.module()
    if isinstance(module, PACKED_MAPS):
        arrays = (module[name][y] for name in ("weight", "scales", "biases") if module.get(name) is not None)
        return mx.dequantize(*arrays, **_packing(module)).astype(mx.float32)
    return module.weight[y].astype(mx.float32)


def _packing(module: Any) -> dict[str, Any]:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
