"""The normaliser over a vocabulary: within 1e-5 nats of float64 at real sizes, values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxdpo.forward import fused_head
from mlxdpo.forward.fused_head import in_blocks
from mlxdpo.forward.logprobs import next_token_logps

SIZES = [151936, 50257, 49152, 300, 7, 1]  # Qwen, GPT-2, SmolLM2, a tiny one, a prime, one word


def spread(rows, size):
    """Logits as models have them: one word well ahead, thousands that each add little."""
    logits = np.random.default_rng(0).normal(0, 3, (rows, size)).astype(np.float32)
    logits[:, 0] += 8
    return logits


def blocked_logsumexp(logits):
    return mx.logsumexp(mx.logsumexp(in_blocks(logits), axis=-1), axis=-1)


@pytest.mark.parametrize("size", SIZES)
def test_log_sum_exp_equals_float64(size):
    logits = spread(16, size)
    want = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    assert abs(np.array(blocked_logsumexp(mx.array(logits)), np.float64) - want).max() < 1e-5


@pytest.mark.parametrize("size", [49152, 300])
def test_gradient_is_the_softmax(size):
    logits = spread(4, size)
    want = np.exp(logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True))
    got = mx.grad(lambda x: blocked_logsumexp(x).sum())(mx.array(logits))
    assert abs(np.array(got) - want).max() < 1e-5


class Table(nn.Module):
    """A model whose logits depend on the current token alone."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.layers = mx.array(logits), []

    def __call__(self, tokens, cache=None):
        return self.logits[tokens]


def test_token_logps_have_no_bias_over_a_large_vocabulary():
    logits = spread(64, 49152)
    tokens = np.arange(64)[None]
    got = np.array(next_token_logps(Table(logits), mx.array(tokens)), np.float64)[0]
    wide = logits[:-1].astype(np.float64)
    want = wide[np.arange(63), tokens[0, 1:]] - np.logaddexp.reduce(wide, axis=-1)
    assert abs(got - want).max() < 1e-5 and abs((got - want).mean()) < 2e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_multiplies_in_float32(bits, tied):
    """Against its weights unpacked, for states in bfloat16: no rounding of the logits to 8 bits."""
    layer = (nn.Embedding if tied else nn.Linear)(*((500, 64) if tied else (64, 500)))
    layer.set_dtype(mx.bfloat16)
    module = layer.to_quantized(group_size=64, bits=bits)
    h = mx.random.normal((20, 64)).astype(mx.bfloat16)
    scales, biases = (module[name].astype(mx.float32) for name in ("scales", "biases"))
    weight = mx.dequantize(module.weight, scales, biases, group_size=64, bits=bits)
    want = h.astype(mx.float32) @ weight.T + (0 if tied else module.get("bias", 0))
    got = fused_head.logits(fused_head.Head(lambda: module, None, 1.0), h)
    assert got.dtype == mx.float32 and mx.allclose(got, want, rtol=1e-4, atol=1e-4).item()
