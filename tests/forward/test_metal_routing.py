"""The routing rule against the table that was read off the shipped library, and the tests' Mac against the rule."""

import mlx.core as mx
import pytest

from mlxdpo.forward.metal_routing import LONG, is_fused, throws

D = {"fused": (64, 96, 128, 72, 80), "wide": (192, 256), "other": (32, 48, 100, 112, 120, 160)}


def call(head_dim, queries=128, keys=128, groups=3, dtype=mx.bfloat16, mask="causal", training=True, value_dim=None):
    return is_fused(head_dim, value_dim or head_dim, queries, keys, groups, dtype, mask, training)


@pytest.mark.parametrize("mask", ["causal", "none"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_the_table(dtype, mask):
    for training in (True, False):
        assert all(call(d, dtype=dtype, mask=mask, training=training) for d in D["fused"])
        assert not any(call(d, dtype=dtype, mask=mask, training=training) for d in D["other"])
        assert not call(128, value_dim=64, training=training)
    assert all(call(d, dtype=dtype, mask=mask) for d in D["wide"])
    assert not any(call(d, dtype=dtype, mask=mask, training=False) for d in D["wide"])
    long = {d: call(d, LONG, LONG, dtype=dtype, mask=mask, training=False) for d in D["wide"]}
    assert long == {192: False, 256: dtype == mx.bfloat16}
    assert not call(256, 16, LONG, dtype=dtype, mask=mask, training=False)


def test_array_masks_are_fused_where_no_gradient_follows():
    for head_dim in D["fused"]:
        assert call(head_dim, mask="array", training=False) and not call(head_dim, mask="array")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_few_queries_are_fused_without_a_gradient_and_throw_with_one(head_dim):
    for queries in range(1, 9):
        for groups in (1, 3, 4, 8, 16):
            vector = queries * groups <= 32
            sizes = (head_dim, head_dim, queries, 40, groups)
            assert is_fused(*sizes, mx.bfloat16, "causal", training=False) is vector
            assert throws(*sizes, "causal") is vector and not throws(*sizes, "array")
            assert not is_fused(*sizes, mx.bfloat16, "causal", training=True)
    assert not throws(head_dim, head_dim, 9, 40, 1, "causal") and not throws(head_dim, head_dim, 8, 7, 1, "causal")


@pytest.mark.parametrize(("width", "error"), [(1, True), (8, True), (9, False), (16, False)])
def test_the_made_up_mac_raises_where_metal_does(fake_mac, width, error):
    q, k = mx.random.normal((1, 4, width, 64)), mx.random.normal((1, 2, 20, 64))

    def loss(q, k):
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask="causal").sum()

    mx.eval(loss(q, k))
    gradient = mx.grad(loss, argnums=(0, 1))
    if error:
        with pytest.raises(RuntimeError, match="do not produce a logsumexp"):
            gradient(q, k)
    else:
        mx.eval(gradient(q, k))
        assert fake_mac["gradient"] == 1


def test_the_made_up_mac_has_no_gradient_for_sinks(fake_mac):
    q, k, sinks = mx.random.normal((1, 4, 16, 64)), mx.random.normal((1, 2, 20, 64)), mx.zeros(4)

    def loss(q):
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask="causal", sinks=sinks).sum()

    mx.eval(loss(q))
    with pytest.raises(RuntimeError, match="NYI: attention sinks"):
        mx.grad(loss)(q)
