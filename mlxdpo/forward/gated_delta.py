"""The gated delta rule in chunks of tokens: equal in value and gradient to mlx-lm's loop over single tokens.

The recurrence (arXiv 2412.06464, equation 10), with S the (Dv, Dk) state of a head and g_t one decay a head or one a
key channel:

    S_t = S_{t-1} diag(g_t) + beta_t (v_t - S_{t-1} diag(g_t) k_t) k_t^T,    y_t = S_t q_t

Autograd over that loop keeps four states a token. Chunks keep none: with S_0 the state before a chunk of C tokens,
c_i = g_1 ... g_i and u_i = beta_i (v_i - S_{i-1} diag(g_i) k_i), C steps are matmuls (the WY form of arXiv 2406.06484,
section 3.2, with the decays of 2412.06464, section 3.3):

    (I + A) U = diag(beta) (V - (c K) S_0^T),    A_ij = beta_i <k_i c_i / c_j, k_j> for j < i
    Y   = (c Q) S_0^T + P U,                     P_ij = <q_i c_i / c_j, k_j> for j <= i
    S_C = S_0 diag(c_C) + U^T (K c_C / c_j)

All that does not need S_0 is computed for many chunks at once, and computed again in the backward pass. The quotients
c_i / c_j are exp(log c_i - log c_j), never a quotient of two numbers that may both be 0 in float32.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlxdpo.forward.layer_plan import with_gradient
from mlxdpo.forward.streams import pin_to_stream

CHUNK = 64  # tokens between two states
SEGMENT = 256  # tokens whose chunks are computed at once: what a layer needs for a moment grows with it
LEAST = 1e-30  # a decay below it is taken as it


def chunked_gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx-lm's `gated_delta_ops`, in chunks: the y (B, T, Hv, Dv) of T tokens, and the state after them.

    q, k   (B, T, Hk, Dk); Hv is a multiple of Hk, and neighbouring heads of v share one
    v      (B, T, Hv, Dv)
    g      (B, T, Hv) or (B, T, Hv, Dk), from 0 to 1
    beta   (B, T, Hv)
    state  (B, Hv, Dv, Dk) float32 before the first token; None is 0
    mask   (B, T) bool; a token that it leaves out changes no state, and its y means nothing

    It computes in float32 and gives y in q's dtype.
    """
    (B, T, Hk, Dk), (Hv, Dv) = k.shape, v.shape[-2:]
    if g.ndim == beta.ndim:
        g = g[..., None]
    if mask is not None:  # decay 1 and beta 0: nothing is forgotten, nothing written
        g, beta = mx.where(mask[..., None, None], g, 1), mx.where(mask[..., None], beta, 0)
    before = mx.zeros((B, Hv, Dv, Dk), mx.float32) if state is None else state.astype(mx.float32)
    after = before.reshape(B, Hk, Hv // Hk, 1, Dv, Dk)
    run, ys = mx.checkpoint(pin_to_stream(_segment)), []
    for parts in zip(*(mx.split(a, range(SEGMENT, T, SEGMENT), axis=1) for a in (q, k, v, g, beta)), strict=True):
        y, after = run(*parts, after)
        ys.append(y)
    y = mx.concatenate(ys, axis=1) if len(ys) > 1 else ys[0]
    return y, after.reshape(B, Hv, Dv, Dk)


def _segment(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The y of a few chunks, and the state (B, Hk, Hv / Hk, 1, Dv, Dk) after them."""
    dtype, shape = q.dtype, v.shape
    q, k, v, g, beta = (
        _chunks(a, k.shape[2], fill) for a, fill in ((q, 0), (k, 0), (v, 0), (g, 1), (beta[..., None], 0))
    )
    log = mx.cumsum(mx.log(mx.maximum(g, LEAST)), axis=-2)  # log c_i
    kk, qk = (_by_head if log.shape[-1] == 1 else _by_channel)(q, k, log)
    grown, last = mx.exp(log), log[..., -1:, :]
    right = mx.concatenate([beta * v, beta * grown * k], axis=-1)
    free, bound = mx.split(_unit_lower_inverse(mx.tril(beta * kk, -1)) @ right, [shape[-1]], axis=-1)
    count, states, updates = v.shape[3], [], []
    in_turn = (mx.split(a, count, axis=3) for a in (free, bound, k * mx.exp(last - log), mx.exp(last)))
    for u, w, to_end, whole in zip(*in_turn, strict=True):  # the only sequence that is left
        states.append(state)
        updates.append(u - w @ state.swapaxes(-1, -2))
        state = state * whole + updates[-1].swapaxes(-1, -2) @ to_end
    before, update = (mx.concatenate(a, axis=3) for a in (states, updates))
    y = (grown * q) @ before.swapaxes(-1, -2) + qk @ update
    y = y.reshape(shape[0], shape[2], -1, shape[-1])[:, :, : shape[1]]
    return y.swapaxes(1, 2).astype(dtype), state


def _chunks(a: mx.array, heads: int, fill: float) -> mx.array:
    """(B, T, H, D) -> (B, heads, H / heads, n, C, D) float32; what fills the last chunk is `fill`."""
    B, T, H, D = a.shape
    count = math.ceil(T / CHUNK)
    size = 1 << (math.ceil(T / count) - 1).bit_length()  # a power of two, to be halved
    a = a.astype(mx.float32).swapaxes(1, 2)
    if rest := count * size - T:
        a = mx.concatenate([a, mx.full((B, H, rest, D), fill, mx.float32)], axis=2)
    return a.reshape(B, heads, H // heads, count, size, D)


def _by_head(q: mx.array, k: mx.array, log: mx.array) -> tuple[mx.array, mx.array]:
    """<k_i c_i / c_j, k_j> and <q_i c_i / c_j, k_j>, (..., C, C), 0 for j > i, with log c (..., C, 1)."""
    decay = mx.exp(mx.where(_triangle(q.shape[-2]), log - log.swapaxes(-1, -2), -mx.inf))
    right = k.swapaxes(-1, -2)
    return (k @ right) * decay, (q @ right) * decay


def _by_channel(q: mx.array, k: mx.array, log: mx.array) -> tuple[mx.array, mx.array]:
    """The same with log c (..., C, Dk).

    exp(log c_i - log c_j) has no factors that are safe over a whole chunk. So pairs of neighbours are joined, then
    pairs of those, and so on: where i and j meet, both are held against the last token of j's half and stay <= 1.
    """
    size, half = q.shape[-2], 1
    kk, qk = (mx.broadcast_to((a * k).sum(-1), log.shape[:-1])[..., None, None] for a in (k, q))
    while half < size:
        pairs = (size // (2 * half), 2, half)
        (_, qi), (kj, ki), (lj, li) = (_pair(a.reshape(*a.shape[:-2], *pairs, a.shape[-1])) for a in (q, k, log))
        end = lj[..., -1:, :]
        far, near = (kj * mx.exp(end - lj)).swapaxes(-1, -2), mx.exp(li - end)
        kk, qk = (
            _joined(*_pair(own.reshape(*log.shape[:-2], *pairs, half)), (a * near) @ far)
            for own, a in ((kk, ki), (qk, qi))
        )
        half *= 2
    return kk.squeeze(-3), qk.squeeze(-3)


def _pair(a: mx.array) -> list[mx.array]:
    """(..., 2, C, D) -> two (..., C, D)."""
    return [part.squeeze(-3) for part in mx.split(a, 2, axis=-3)]


def _joined(upper: mx.array, lower: mx.array, below: mx.array) -> mx.array:
    """[[upper, 0], [below, lower]], each (..., C, C)."""
    top = mx.concatenate([upper, mx.zeros_like(upper)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, lower], axis=-1)], axis=-2)


def _triangle(size: int) -> mx.array:
    return mx.tril(mx.ones((size, size), mx.bool_))


def _unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)^-1 of strictly lower A (..., C, C), C a power of two; nothing on the way is kept for its gradient."""

    def gradient(_: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
        """-T' dT T', of which A has the part below the diagonal."""
        turned = inverse.swapaxes(-1, -2)
        return mx.tril(-(turned @ cotangent @ turned), -1)

    return with_gradient(_inverse, gradient)(a)


def _inverse(a: mx.array) -> mx.array:
    """By halves, [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']]. Not the product of I + (-A)^(2^n): where keys are
    alike its powers grow like binomials, and cancel."""
    size = a.shape[-1]
    if size <= 2:
        return mx.eye(size) - a
    half = size // 2
    p, q = _pair(_inverse(mx.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)))
    return _joined(p, q, -(q @ a[..., half:, :half] @ p))
