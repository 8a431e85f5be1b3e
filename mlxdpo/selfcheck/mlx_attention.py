"""MLX's attention against the formula, at the sizes whose kernels training meets on a GPU: value and gradient."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np

from mlxdpo.machine.device import default_dtype
from mlxdpo.machine.errors import SHORT_ROWS
from mlxdpo.selfcheck.material import apart
from mlxdpo.selfcheck.registry import REPORT, Finding, self_check

HEAD_DIMS = (64, 128, 256)
QUERIES = (8, 16)
PREFIX = 24  # keys that all queries see: the fast path's queries continue a prefix
HEADS = 4, 2  # of queries and of keys
LIMITS = {mx.float32: 1e-4, mx.bfloat16: 2e-2}  # relative distance; bfloat16 keeps 8 bits of each number


def attention_apart(head_dim: int, queries: int) -> tuple[float, float | None]:
    """Relative distances of value and gradient from the formula in float32; None for a gradient that Metal refuses.

    Its kernel for up to 8 queries has none; `train` gives it no such rows.
    """
    draw = np.random.Generator(np.random.PCG64(head_dim + queries))
    shapes = [(1, HEADS[0], queries, head_dim), *[(1, HEADS[1], queries + PREFIX, head_dim)] * 2]
    dtype = default_dtype()
    inputs = [mx.array(draw.standard_normal(shape).astype(np.float32)).astype(dtype) for shape in shapes]
    cotangent = mx.array(draw.standard_normal(shapes[0]).astype(np.float32)).astype(dtype)
    exact = [array.astype(mx.float32) for array in (*inputs, cotangent)]
    value = apart(_flat([_mlx_attention(*inputs)]), _flat([_plain_attention(*exact[:3])]))
    try:
        gradient = _flat(mx.vjp(_mlx_attention, inputs, [cotangent])[1])
    except RuntimeError as error:
        if queries > 8 or SHORT_ROWS not in str(error):
            raise
        return value, None
    return value, apart(gradient, _flat(mx.vjp(_plain_attention, exact[:3], exact[3:])[1]))


def _mlx_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


def _plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q k^T / sqrt(D)) v over the keys up to each query's own place (arXiv 1706.03762, eq. 1)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (mx.repeat(array, groups, axis=1) for array in (k, v))
    scores = (q @ k.swapaxes(2, 3)) * q.shape[-1] ** -0.5
    later = mx.arange(k.shape[2])[None] > mx.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    return mx.softmax(mx.where(later, -mx.inf, scores), axis=-1) @ v


def _flat(arrays: list[mx.array]) -> np.ndarray:
    return np.concatenate([np.array(array.astype(mx.float32)).ravel() for array in arrays])


@self_check("attention = plain", REPORT)
def attention_is_plain() -> Finding:
    """Head dimensions 64, 128 and 256, 8 and 16 queries, grouped heads, in the number type of this machine."""
    found = [attention_apart(*sizes) for sizes in itertools.product(HEAD_DIMS, QUERIES)]
    refused = sum(gradient is None for _, gradient in found)
    value = np.max([value for value, _ in found])  # unlike max it lets a NaN through
    slope = np.max([gradient for _, gradient in found if gradient is not None])
    limit, name = LIMITS[default_dtype()], str(default_dtype()).removeprefix("mlx.core.")
    note = f"; no gradient for 8 queries ({refused} of {len(found)}), which train avoids" if refused else ""
    return Finding(
        value <= limit and slope <= limit, f"{name}: {value:.1g} off, gradient {slope:.1g}{note}", f"{limit:g}"
    )
