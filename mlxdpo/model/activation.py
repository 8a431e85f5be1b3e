"""SwiGLU with its own gradient: it keeps its two inputs, where differentiating it step by step keeps four arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxdpo.lanes import with_gradient
from mlxdpo.model.exponential import sigmoid


def _product(gate: mx.array, x: mx.array) -> mx.array:
    return gate * sigmoid(gate) * x


def _backward(primals: Any, cotangent: Any, _: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    s = sigmoid(gate)  # again: keeping it costs a tenth more memory and gains a hundredth of a step
    slope = cotangent * s
    return slope * x * (1 + gate * (1 - s)), slope * gate


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x (arXiv 2002.05202 eq. 5, without its two matmuls), any shape."""
    return _run(gate, x)


_run = with_gradient(_product, _backward)
