"""Attention whose backward pass never holds a (queries, keys) square, for where MLX has no fused one.

MLX differentiates attention through all the scores at once on a CPU, and on a GPU too when the mask is an array
(sliding windows). Here forward and backward go in chunks of queries and recompute their scores against only the
keys those may see, so memory grows with the length, not with its square. The result is exact: the same sums,
in another order.

Shapes: B rows, H query heads, K key/value heads (H a multiple of K, G = H / K), L queries, T >= L keys, D head size.
Query i is token T-L+i: the last L of T tokens, which is what a prefix cache leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from mlxdpo.forward.elementwise import LOG2E, exp2
from mlxdpo.forward.layer_plan import with_gradient


class Branches(NamedTuple):
    """What the tokens of a tree see, in rows of them that stand depth first (`types.TokenTree`).

    until  (B, T) int32: key j is seen by the queries j <= i < until[j]
    place  (B, T) int32: how many tokens come before each on its way from the root, which is what a window counts
    """

    until: mx.array
    place: mx.array

    def visible(self, first: int, last: int, low: int, high: int, window: int | None) -> mx.array:
        """(B, 1, last - first, high - low) bool: which of the keys from `low` on the queries from `first` on see."""
        query, key = mx.arange(first, last)[:, None], mx.arange(low, high)
        seen = (key <= query) & (query < self.until[:, None, low:high])
        if window is not None:
            seen = seen & (self.place[:, first:last, None] - self.place[:, None, low:high] < window)
        return seen[:, None]


QUERIES = 128  # at a time: the upper half of the square is hardly computed


def short_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    """q (B, H, L, D), k and v (B, K, T, D) -> (B, H, L, D), exact; scores and softmax in float32.

    For short rows on a CPU: it keeps its softmax for the backward pass, which is cheaper than making it again
    (`chunked_attention`) as long as the square is small. Source of the gradient: arXiv 2205.14135 appendix B.2,
    with the softmax kept. K heads stand side by side, the queries that share one in one matmul.
    """
    (B, H, L, D), (K, T) = q.shape, k.shape[1:3]
    if L > QUERIES:
        ends = [(a, min(a + QUERIES, L)) for a in range(0, L, QUERIES)]
        parts = [(q[:, :, a:b], k[:, :, : T - L + b], v[:, :, : T - L + b]) for a, b in ends]
        return mx.concatenate([short_attention(*part, scale=scale) for part in parts], axis=2)
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


SCORE_BYTES = 32 << 20
SMALLEST_CHUNK, LARGEST_CHUNK = 64, 128


def chunked_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    branches: Branches | None = None,
) -> mx.array:
    """Causal attention, exact, linear in memory: q (B, H, L, D), k and v (B, K, T, D) -> (B, H, L, D).

    Query i sees keys max(0, T-L+i-window+1) .. T-L+i; in a tree of tokens those of them that `branches` say, and a
    window counts along its way from the root. Scores and softmax are float32 whatever the dtype of q; the result has
    q's dtype.
    `chunk` is the number of queries at a time, chosen from the shapes when None. The method is that of
    arXiv 2205.14135 (algorithms 1 and 4), chunked over queries only: a row's keys are met at once.
    Raises `ValueError` for shapes that are no such attention.
    """
    (B, H, L, D), (K, T) = q.shape, k.shape[1:3]
    if k.shape != (B, K, T, D) or v.shape[:3] != (B, K, T) or H % K or T < L:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: need H a multiple of K, and T >= L keys")
    if any(limit is not None and limit <= 0 for limit in (window, chunk)):
        raise ValueError(f"window {window}, chunk {chunk}: each must be positive")
    visible = min(T, window + LARGEST_CHUNK) if window else T
    rule = ScoreRule(float(scale), window, branches)
    return _chunked(rule, chunk or _queries_at_a_time(B * H, visible))(q, k, v)[0]


def _queries_at_a_time(heads: int, keys: int) -> int:
    """Queries at a time: a power of two whose scores fill about SCORE_BYTES, of which some eight are alive at once.

    Measured on a CPU, 9 heads, 1,024 to 8,192 tokens, BLAS on one thread: 64 is fastest, 32 and 128 within 8 %, 256 up
    to 17 % slower. With BLAS on every core of a busy machine its threads wait for each other at each matmul, so few
    and large ones are safer.
    """
    fits = SCORE_BYTES // (4 * heads * keys)
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << max(fits, 1).bit_length() - 1))


class ScoreRule(NamedTuple):
    """What a score is: its scale, the window in tokens or None, and the branches of a tree."""

    scale: float
    window: int | None
    branches: Branches | None = None

    def query_chunks(self, L: int, T: int, chunk: int) -> Iterator[Chunk]:
        """The queries in chunks, each with all keys that one of them may see."""
        for first in range(0, L, chunk):
            last = min(first + chunk, L)
            near = self.window if self.branches is None else None  # a tree's branches stand between what is near
            yield Chunk(first, last, max(0, T - L + first - near + 1) if near else 0, T - L + last)

    def visible(self, at: Chunk) -> mx.array:
        """(queries, keys) of one chunk: which keys each query sees, its last query being its last key; with branches
        (B, 1, 1, queries, keys)."""
        first = at.high - (at.last - at.first)
        if self.branches is not None:
            return self.branches.visible(first, at.high, at.low, at.high, self.window)[:, None]
        tokens, keys = mx.arange(first, at.high)[:, None], mx.arange(at.low, at.high)[None]
        return (keys <= tokens) & (keys > tokens - self.window) if self.window else keys <= tokens


class Chunk(NamedTuple):
    """Queries `first` .. `last` - 1 and the keys `low` .. `high` - 1 that any of them sees."""

    first: int
    last: int
    low: int
    high: int


def _chunk_scores(rule: ScoreRule, q: mx.array, k: mx.array) -> mx.array:
    """In units of log 2, so that `exp2` needs no factor."""
    return (q * (rule.scale * LOG2E)) @ k.swapaxes(-1, -2)


def _chunk_forward(rule: ScoreRule, at: Chunk, q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """One chunk's output (B, K, G, queries, D) and lse (B, K, G, queries, 1): log2 of the softmax's denominator."""
    rows, k, v = _chunk_rows(q, at), k[:, :, at.low : at.high], v[:, :, at.low : at.high]
    s = mx.where(rule.visible(at), _chunk_heads(_chunk_scores(rule, rows, k), q, at), -mx.inf)
    top = s.max(axis=-1, keepdims=True)
    p = exp2(s - top)
    total = p.sum(axis=-1, keepdims=True)
    return _chunk_heads(p.reshape(*rows.shape[:3], -1) @ v, q, at) / total, top + mx.log2(total)


def _chunk_backward(
    rule: ScoreRule, at: Chunk, q: mx.array, k: mx.array, v: mx.array, ct: mx.array, lse: mx.array, delta: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """One chunk's dq, and its share of dk and dv of the keys it sees, dq and dk still without `scale`.

    dS = P (dP - delta) with delta = sum(dO O): arXiv 2205.14135 algorithm 4.
    """
    rows, cts, k, v = _chunk_rows(q, at), _chunk_rows(ct, at), k[:, :, at.low : at.high], v[:, :, at.low : at.high]
    s = _chunk_scores(rule, rows, k)
    p = _chunk_heads(exp2(s - _chunk_rows(lse, at)), q, at)
    p = mx.where(rule.visible(at), p, 0.0).reshape(s.shape)
    ds = p * (cts @ v.swapaxes(-1, -2) - _chunk_rows(delta, at))
    return _chunk_heads(ds @ k, q, at), ds.swapaxes(-1, -2) @ rows, p.swapaxes(-1, -2) @ cts


def _chunked(rule: ScoreRule, chunk: int) -> Callable[..., Any]:
    """The custom function (q, k, v) -> (out, lse) with lse (B, K, G, L, 1). Only `out` has a gradient."""

    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Forward, one chunk of queries after the other."""
        shape, dtype = (*q.shape[:3], v.shape[3]), q.dtype
        q, k, v = _grouped_heads(q, k), k.astype(mx.float32), v.astype(mx.float32)
        outs, lses = [], []
        for at in rule.query_chunks(q.shape[3], k.shape[2], chunk):
            # One chunk after the other: without this chain the scheduler holds the scores of many at once.
            after = mx.depends([q], [outs[-1]])[0] if outs else q
            out, lse = _chunk_forward(rule, at, after, k, v)
            outs.append(out)
            lses.append(lse)
        return mx.concatenate(outs, axis=3).reshape(shape).astype(dtype), mx.concatenate(lses, axis=3)

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        """Gradients of q, k and v, in the same chunks."""
        q, k, v, out, ct = (a.astype(mx.float32) for a in (*primals, outputs[0], cotangents[0]))
        delta = _grouped_heads((ct * out).sum(axis=-1, keepdims=True), k)
        q, ct = _grouped_heads(q, k), _grouped_heads(ct, k)
        dqs, dk, dv = [], mx.zeros(k.shape), mx.zeros(v.shape)
        for at in rule.query_chunks(q.shape[3], k.shape[2], chunk):
            # dq is in the chain too: left for the end, it would keep every chunk's dS until then.
            after, ct = mx.depends([q, ct], [dqs[-1], dk, dv]) if dqs else (q, ct)
            dq, dk_here, dv_here = _chunk_backward(rule, at, after, k, v, ct, outputs[1], delta)
            dqs.append(dq)
            dk[:, :, at.low : at.high] += dk_here
            dv[:, :, at.low : at.high] += dv_here
        dq = mx.concatenate(dqs, axis=3).reshape(primals[0].shape)
        gradients = (dq * rule.scale, dk * rule.scale, dv)
        return tuple(g.astype(a.dtype) for g, a in zip(gradients, primals, strict=True))

    return with_gradient(attend, backward)


def _grouped_heads(a: mx.array, k: mx.array) -> mx.array:
    """(B, H, L, D) -> float32 (B, K, G, L, D): the G query heads that share a key head side by side."""
    B, H, L, D = a.shape
    return a.astype(mx.float32).reshape(B, k.shape[1], H // k.shape[1], L, D)


def _chunk_rows(a: mx.array, at: Chunk) -> mx.array:
    """(B, K, G, L, D) -> (B, K, G * queries, D) of one chunk: one large matmul per key head, not G small ones."""
    a = a[:, :, :, at.first : at.last]
    return a.reshape(*a.shape[:2], -1, a.shape[-1])


def _chunk_heads(a: mx.array, q: mx.array, at: Chunk) -> mx.array:
    """The inverse: (B, K, G * queries, N) -> (B, K, G, queries, N)."""
    return a.reshape(*q.shape[:3], at.last - at.first, a.shape[-1])
