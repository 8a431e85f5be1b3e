"""A Mac for the tests, on MLX's CPU back end: kind, memory, default dtype, and attention routed as Metal routes it.

`pytest --mac` runs the suite on it. Attention follows `metal_routing`'s table and raises where Metal raises: in the
backward pass of a call for the vector kernel, and of one with attention sinks. The tiny models' head dimension of 8
stands for 64. Compiled functions run as they are: MLX's CPU back end compiles with a C++ compiler, seconds a kernel.
"""

from __future__ import annotations

from collections import Counter

import mlx.core as mx

from mlxdpo.forward import metal_routing
from mlxdpo.machine import device
from mlxdpo.machine.device import Machine

MAC = Machine("metal", "Apple M2 Pro (made up by the tests)", 11 << 30, "Darwin 24.6.0 arm64")
TINY_HEAD = 8  # head dimension of the tiny models
NO_LOGSUMEXP = (
    "[ScaledDotProductAttention] the vector kernels do not produce a logsumexp; the VJP path requires the "
    "full-attention kernel"
)
NO_SINKS = "[ScaledDotProductAttention] NYI: attention sinks"
LIMITS = ("set_cache_limit", "set_memory_limit", "set_wired_limit", "clear_cache")

calls: Counter[str] = Counter()
"""How often each of MLX's memory functions, and each kind of attention, was called."""
_attention = mx.fast.scaled_dot_product_attention


def routed_attention(q, k, v, *, scale, mask=None, sinks=None, stream=None):
    """`mx.fast.scaled_dot_product_attention`, which raises in its backward pass where Metal's does."""
    array = isinstance(mask, mx.array)
    sizes = q.shape[3], v.shape[3], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    kind = "array" if array else mask or "none"
    calls["fused" if metal_routing.is_fused(*sizes, q.dtype, kind, training=False) else "unfused"] += 1
    extra = {} if sinks is None else {"sinks": sinks}

    def attend(q, k, v, mask=mask):
        return _attention(q, k, v, scale=scale, mask=mask, **extra)

    def backward(primals, cotangent, _):
        if sinks is not None:
            raise RuntimeError(NO_SINKS)
        if metal_routing.throws(*sizes, kind):
            raise RuntimeError(NO_LOGSUMEXP)
        calls["gradient"] += 1
        return tuple(mx.vjp(attend, list(primals), [cotangent])[1])

    run = mx.custom_function(attend)
    run.vjp(backward)
    # A mask of numbers has a gradient: latent attention adds scores by it.
    return run(q, k, v, mask) if array and mx.issubdtype(mask.dtype, mx.floating) else run(q, k, v)


def _counted(name):
    def count(*args):
        calls[name] += 1
        return args[0] if args else None

    return count


def install(patch=setattr):
    """Make this process's machine a Mac; `patch` is `monkeypatch.setattr` for one test, `setattr` for all of them."""
    patch(device, "_detect_machine", lambda: MAC)
    patch(mx.fast, "scaled_dot_product_attention", routed_attention)
    for name in ("VECTOR_DIMS", "SCORE_DIMS", "TRAIN_DIMS"):
        patch(metal_routing, name, (TINY_HEAD, *getattr(metal_routing, name)))
    for name in LIMITS:
        patch(mx, name, _counted(name))
    patch(mx, "compile", lambda function, **options: function)
