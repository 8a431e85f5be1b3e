"""The gated delta rule in chunks: value, state and gradient are those of mlx-lm's loop over tokens."""

import mlx.core as mx
import numpy as np
import pytest
from gradients import apart, gradients, moved, ragged, weighted
from mlx_lm.models import bailing_hybrid, bailing_moe_linear, gated_delta
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.forward import gated_delta as ours
from mlxdpo.forward.gated_delta import chunked_gated_delta
from mlxdpo.forward.logprobs import plain_forward
from mlxdpo.forward.patch_mlx_lm import patched

NAMES = ("q", "k", "v", "g", "beta", "state")


def inputs(tokens, channels, *, rows=2, heads=(2, 4), dk=8, dv=12, decay=(0.0, 3.0), alike=False, strong=False, seed=0):
    """q, k, v, g, beta and a start state, as a layer makes them: keys of length 1, queries of length dk^-0.5."""
    draw = np.random.default_rng(seed)
    hk, hv = heads
    k = draw.normal(size=(rows, tokens, hk, dk))
    k = k[:, :1] + 0.02 * k if alike else k
    q = draw.normal(size=(rows, tokens, hk, dk))
    k, q = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (k, q))
    g = np.exp(-draw.uniform(*decay, size=(rows, tokens, hv, dk)[: 4 if channels else 3]))
    beta = (2 if strong else 1) / (1 + np.exp(-draw.normal(1, 1.5, size=(rows, tokens, hv))))
    v, state = draw.normal(size=(rows, tokens, hv, dv)), draw.normal(size=(rows, hv, dv, dk))
    return [mx.array(a.astype(np.float32)) for a in (q * dk**-0.5, k, v, g, beta, state)]


def outcome(rule, arrays, mask=None):
    """y, state and the gradients of a sum that weighs every number of both differently. d/dg is taken by log g."""
    *rest, beta, state = arrays
    draw = np.random.default_rng(9)
    weights = [mx.array(draw.normal(size=s).astype(np.float32)) for s in (arrays[2].shape, state.shape)]
    if mask is not None:
        weights[0] = weights[0] * mask[..., None, None]

    def total(q, k, v, log, beta, state):
        y, after = rule(q, k, v, mx.exp(log), beta, state, mask)
        return (y * weights[0]).sum() + (after * weights[1]).sum(), y * (weights[0] != 0), after

    (_, y, after), found = mx.value_and_grad(total, argnums=tuple(range(6)))(*rest[:3], mx.log(rest[3]), beta, state)
    return [np.array(a.astype(mx.float32)) for a in (y, after, *found)]


def same(arrays, mask=None, tolerance=5e-6):
    got, want = outcome(chunked_gated_delta, arrays, mask), outcome(gated_delta.gated_delta_ops, arrays, mask)
    # Where everything is forgotten the gradient by log g is e^-20 of the others, and its rounding is one of theirs.
    least = 1e-2 * np.linalg.norm(want[-2])
    gaps = {
        name: np.linalg.norm(a - b) / max(np.linalg.norm(b), least)
        for name, a, b in zip(("y", "after", *NAMES), got, want, strict=True)
    }
    assert max(gaps.values()) <= tolerance, gaps


@pytest.mark.parametrize("channels", [False, True], ids=["by head", "by channel"])
class TestEqualsTheLoop:
    @pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 17, 63, 64, 65, 100, 150])
    def test_every_length(self, tokens, channels):
        same(inputs(tokens, channels, rows=1 if tokens > 20 else 2))

    @pytest.mark.parametrize("seed", range(4))
    def test_lengths_at_random_with_small_segments(self, seed, channels, monkeypatch):
        monkeypatch.setattr(ours, "CHUNK", 2**seed)
        monkeypatch.setattr(ours, "SEGMENT", 24)
        same(inputs(int(np.random.default_rng(seed).integers(25, 90)), channels, rows=1, seed=seed))

    @pytest.mark.parametrize("decay", [(0.0, 0.02), (0.0, 0.0)], ids=["slow", "none"])
    def test_keys_all_alike(self, decay, channels):
        same(inputs(130, channels, rows=1, decay=decay, alike=True), tolerance=2e-5)

    def test_writes_that_overshoot(self, channels):
        same(inputs(70, channels, rows=1, decay=(0.0, 0.1), strong=True), tolerance=2e-5)

    def test_decay_to_nothing(self, channels):
        same(inputs(70, channels, rows=1, decay=(15.0, 30.0)), tolerance=3e-5)

    def test_a_mask_leaves_tokens_out(self, channels):
        mask = mx.array(np.arange(70)[None] < np.array([[70], [33]]))
        same(inputs(70, channels), mask)

    def test_a_decay_of_0_forgets_everything(self, channels):
        arrays = inputs(40, channels)
        arrays[3][:, 20] = 0.0
        got, want = chunked_gated_delta(*arrays), gated_delta.gated_delta_ops(*arrays)
        assert all(apart(np.array(a), np.array(b)) < 1e-5 for a, b in zip(got, want, strict=True))
        found = mx.grad(lambda *x: chunked_gated_delta(*x)[0].sum(), argnums=(0, 1, 2, 3, 4, 5))(*arrays)
        assert all(np.isfinite(np.array(a)).all() for a in found)

    def test_bfloat16_is_rounded_where_the_loop_rounds(self, channels):
        arrays = inputs(70, channels, rows=1)
        arrays[:3] = [a.astype(mx.bfloat16) for a in arrays[:3]]
        y, state = chunked_gated_delta(*arrays)
        wanted, after = gated_delta.gated_delta_ops(*arrays)
        assert y.dtype == wanted.dtype == mx.bfloat16 and state.dtype == after.dtype == mx.float32
        assert apart(np.array(state), np.array(after)) < 1e-6
        same(arrays, tolerance=8e-3)  # gradients in bfloat16 have 8 bits

    def test_a_row_in_two_pieces_is_the_row(self, channels):
        arrays = inputs(90, channels)
        whole, end = chunked_gated_delta(*arrays)
        first, state = chunked_gated_delta(*(a[:, :37] for a in arrays[:5]), arrays[5])
        second, state = chunked_gated_delta(*(a[:, 37:] for a in arrays[:5]), state)
        pieces = mx.concatenate([first, second], axis=1)
        assert mx.allclose(whole, pieces, atol=2e-6) and mx.allclose(end, state, atol=2e-6)


def test_without_a_start_state_it_is_0():
    arrays = inputs(20, False)[:5]
    for got, want in zip(chunked_gated_delta(*arrays), gated_delta.gated_delta_ops(*arrays), strict=True):
        assert mx.allclose(got, want, atol=2e-6)


def test_memory_does_not_grow_by_a_state_a_token():
    peaks = {}
    for rule in (gated_delta.gated_delta_ops, chunked_gated_delta):
        arrays = inputs(256, False, rows=1, heads=(1, 1), dk=64, dv=64)
        mx.eval(arrays)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda *x, rule=rule: rule(*x)[0].sum(), argnums=(0, 1, 2, 3, 4, 5))(*arrays))
        peaks[rule] = mx.get_peak_memory() - before
    assert peaks[chunked_gated_delta] * 6 < peaks[gated_delta.gated_delta_ops], peaks


def test_a_constant_decay_is_mlx_lms_own_chunks():
    draw = np.random.default_rng(0)
    q, k, v = (mx.array(draw.normal(size=(2, 3, 150, 8)).astype(np.float32)) for _ in range(3))
    h, g = mx.array(draw.normal(size=(2, 3, 8, 8)).astype(np.float32)), mx.array([-0.8, -0.1, -0.004])
    weight = mx.array(draw.normal(size=v.shape).astype(np.float32))
    found = []
    for file in (bailing_moe_linear, bailing_hybrid):

        def total(q, k, v, h, file=file):
            y, after = file.recurrent_gla(q=q, k=k, v=v, g=g, scale=0.3, h=h)
            return (y * weight).sum() + after.sum(), y, after

        found.append(mx.value_and_grad(total, argnums=(0, 1, 2, 3))(q, k, v, h))
    (loop, of_loop), (chunks, of_chunks) = found
    for got, want in zip((*chunks[1:], *of_chunks), (*loop[1:], *of_loop), strict=True):
        assert apart(np.array(got), np.array(want)) < 2e-6


@pytest.mark.parametrize("kind", ["qwen3_5", "kimi_linear"])
def test_a_model_of_such_layers_takes_the_chunks_and_is_the_same_model(kind, monkeypatch):
    model = moved(tiny_model(kind), LoraConfig(rank=4))
    batch = ragged(prompts=(20, 9), completions=((9, 30, 2), (1, 25, 12)))
    theirs = gated_delta.gated_delta_ops
    used = []

    def counted(*arrays):
        used.append(arrays[0].shape)
        return chunked_gated_delta(*arrays)

    monkeypatch.setattr("mlxdpo.forward.patch_mlx_lm.OURS", _with("gated_delta_ops", counted))
    value, gradient = gradients(model, weighted(plain_forward, batch))
    assert used and gated_delta.gated_delta_ops is theirs
    monkeypatch.setattr("mlxdpo.forward.patch_mlx_lm.OURS", _with("gated_delta_ops", theirs))
    wanted, of_loop = gradients(model, weighted(plain_forward, batch))
    assert value == pytest.approx(wanted, abs=1e-4) and apart(gradient, of_loop) < 5e-5


def _with(name, function):
    from mlxdpo.forward import patch_mlx_lm

    return tuple(function if n == name else f for n, f in zip(patch_mlx_lm.NAMES, patch_mlx_lm.OURS, strict=True))


def test_the_names_are_put_back_after_an_exception():
    theirs = gated_delta.gated_delta_ops, bailing_moe_linear.recurrent_gla
    with pytest.raises(KeyError), patched([]):
        assert gated_delta.gated_delta_ops is chunked_gated_delta
        raise KeyError
    assert (gated_delta.gated_delta_ops, bailing_moe_linear.recurrent_gla) == theirs
