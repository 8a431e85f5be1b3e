"""Causal attention over short rows on a CPU: it keeps its softmax for the backward pass, which is cheaper than making
it again (`attention.chunked_attention`) as long as the square is small.

Shapes as in `attention`: B rows, H query heads, K key/value heads (G = H / K), L queries, T >= L keys, D head size;
query i is token T-L+i.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxdpo.lanes import with_gradient
from mlxdpo.model.exponential import LOG2E, exp2

QUERIES = 128  # at a time: the upper half of the square is hardly computed


def short_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    """q (B, H, L, D), k and v (B, K, T, D) -> (B, H, L, D), exact; scores and softmax in float32.

    Source of the gradient: arXiv 2205.14135 appendix B.2, with the softmax kept.
    """
    L, T = q.shape[2], k.shape[2]
    cuts = [(a, min(a + QUERIES, L)) for a in range(0, L, QUERIES)]
    parts = [_attend(q[:, :, a:b], k[:, :, : T - L + b], v[:, :, : T - L + b], scale) for a, b in cuts]
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """The last L of T tokens attend; K heads side by side, the G queries that share one in one matmul."""
    (B, H, L, D), (K, T) = q.shape, k.shape[1:3]
    # The largest a score may be: a minimum takes half the time of a selection.
    most = mx.where(mx.arange(T)[None] > mx.arange(T - L, T)[:, None], -mx.inf, mx.inf)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Output, softmax without its denominators, and one over these."""
        s = ((q * (scale * LOG2E)) @ k.swapaxes(-1, -2)).reshape(B, K, H // K, L, T)
        s = mx.minimum(s, most).reshape(B, K, -1, T)
        p = exp2(s - s.max(axis=-1, keepdims=True))
        share = 1 / p.sum(axis=-1, keepdims=True)
        return (p @ v) * share, p, share

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        """Gradients of queries, keys and values."""
        (q, k, v), (out, p, share) = primals, outputs
        ct = cotangents[0] * share  # p is not normalised
        ds = p * (ct @ v.swapaxes(-1, -2) - (ct * out).sum(axis=-1, keepdims=True))
        return (ds @ k) * scale, (ds.swapaxes(-1, -2) @ q) * scale, p.swapaxes(-1, -2) @ ct

    rows = q.astype(mx.float32).reshape(B, K, -1, D)
    out = with_gradient(forward, backward)(rows, k.astype(mx.float32), v.astype(mx.float32))[0]
    return out.reshape(B, H, L, v.shape[3]).astype(q.dtype)
