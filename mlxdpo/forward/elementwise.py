"""Powers of two where a model needs exponentials: on a Linux CPU MLX's exp takes three times as long as its pow.

A third of a training step there is exponentials: attention's softmax, SwiGLU, the softmax over the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlxdpo.forward.layer_plan import with_gradient
from mlxdpo.machine.device import this_machine

LOG2E = math.log2(math.e)
SMALLEST = -100.0


def exp2(x: mx.array) -> mx.array:
    """2 ** x, and 2 ** -100 for anything below: nothing beside the 1 of a row's largest weight.

    Without that floor pow takes five times as long wherever its result underflows, as most of a sharp softmax does.
    """
    x = mx.maximum(x, SMALLEST)
    return mx.power(2.0, x) if this_machine().kind == "cpu" else mx.exp(x * (1 / LOG2E))


def exp(x: mx.array) -> mx.array:
    """e ** x for x <= 0, within float32's rounding; see `exp2` for what is below -69."""
    return mx.power(2.0, mx.maximum(x * LOG2E, SMALLEST)) if this_machine().kind == "cpu" else mx.exp(x)


def stable_sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e ** -x). Without a floor: far from 0 it is 0 or 1, and too rarely met for a slow pow to matter."""
    if this_machine().kind != "cpu":
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(2.0, x * -LOG2E))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x (arXiv 2002.05202 eq. 5, without its two matmuls), any shape.

    Its gradient is written by hand and keeps its two inputs, where differentiating step by step keeps four arrays.
    """
    return with_gradient(_swiglu, _swiglu_gradient)(gate, x)


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * stable_sigmoid(gate) * x


def _swiglu_gradient(primals: Any, cotangent: Any, _: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    s = stable_sigmoid(gate)  # again: keeping it costs a tenth more memory and gains a hundredth of a step
    slope = cotangent * s
    return slope * x * (1 + gate * (1 - s)), slope * gate
