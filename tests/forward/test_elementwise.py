"""SwiGLU: value and gradient are MLX's own."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxdpo.forward import elementwise
from mlxdpo.forward.elementwise import swiglu


@pytest.mark.parametrize("kind", ["cpu", "metal"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_value_and_gradient(kind, dtype, monkeypatch):
    monkeypatch.setattr(elementwise, "this_machine", lambda: SimpleNamespace(kind=kind))
    gate, x, ct = (mx.random.normal((7, 33), scale=3).astype(dtype) for _ in range(3))
    gate[0, :4] = mx.array([-200.0, -50.0, 0.0, 90.0]).astype(dtype)
    (want,), wanted = mx.vjp(lambda g, a: nn.silu(g) * a, [gate, x], [ct])
    (got,), gradients = mx.vjp(swiglu, [gate, x], [ct])
    rounding = 2e-6 if dtype == mx.float32 else 4e-2
    for one, other in zip([got, *gradients], [want, *wanted], strict=True):
        a, b = (np.array(v.astype(mx.float32)) for v in (one, other))
        assert one.dtype == dtype and np.abs(a - b).max() <= rounding * max(1, np.abs(b).max())
