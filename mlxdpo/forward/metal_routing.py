"""Which attention kernel MLX's Metal back end takes, as a pure function of shapes: read off the library of mlx 0.32.4.

Nothing here was run on Metal; the rule was read off the shipped `ScaledDotProductAttention::use_fallback`. It decides
where this project attends in chunks of its own, what a plan counts, and what the tests' Mac does.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

MaskKind = Literal["none", "causal", "array"]
VECTOR_QUERIES = 8  # at most so many queries take the vector kernel, which has no gradient
VECTOR_ROWS = 32  # queries times query heads per key head that it takes
VECTOR_DIMS = (64, 96, 128, 192, 256)
SCORE_DIMS = (64, 72, 80, 96, 128)
TRAIN_DIMS = (*SCORE_DIMS, 192, 256)
LONG = 2048  # tokens: from here on bfloat16 rows of head dimension 256 are scored fused
BACKWARD_BLOCK = 1024  # queries and keys at a time in the fused backward pass (MLX_SDPA_VJP_BLOCK)


def vector_kernel(head_dim: int, value_dim: int, queries: int, keys: int, groups: int) -> bool:
    """Whether a call is for the vector kernel: few queries, as while generating. `groups` are query heads per key head.

    It is fused, but gives no log-sum-exp: differentiated, without an array mask, MLX throws.
    """
    few = queries <= min(VECTOR_QUERIES, keys) and queries * groups <= VECTOR_ROWS
    return few and head_dim == value_dim and head_dim in VECTOR_DIMS


def is_fused(
    head_dim: int,
    value_dim: int,
    queries: int,
    keys: int,
    groups: int,
    dtype: mx.Dtype,
    mask: MaskKind,
    training: bool,
) -> bool:
    """Whether Metal computes attention without storing its scores, for all GPUs before M5 and macOS 14 to 26.

    `training` says that a gradient follows: then array masks store the (queries, keys) squares, and `vector_kernel`
    calls throw. Scored, head dimensions 192 and 256 take the unfused way (256 in bfloat16 only below 2,048 tokens).
    Source: the routing table of mlx 0.32.4.
    """
    if head_dim != value_dim or (training and mask == "array"):
        return False
    if queries <= VECTOR_QUERIES:
        return vector_kernel(head_dim, value_dim, queries, keys, groups) and not training
    if training:
        return head_dim in TRAIN_DIMS
    long = head_dim == 256 and dtype == mx.bfloat16 and queries == keys >= LONG
    return head_dim in SCORE_DIMS or long


def throws(head_dim: int, value_dim: int, queries: int, keys: int, groups: int, mask: MaskKind) -> bool:
    """Whether Metal refuses to differentiate a call: "the vector kernels do not produce a logsumexp"."""
    return mask != "array" and vector_kernel(head_dim, value_dim, queries, keys, groups)
