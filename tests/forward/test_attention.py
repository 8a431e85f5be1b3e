"""Attention in chunks: the values and gradients of MLX's own, without the square; switched on and off by scope."""

import sys
import threading
from types import SimpleNamespace

import mlxdpo  # isort: skip  (before mlx: it puts the fast BLAS in front)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compilers import COMPILING, compiling
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import tiny_model

from mlxdpo.forward import patch_mlx_lm
from mlxdpo.forward.attention import chunked_attention, short_attention
from mlxdpo.forward.patch_mlx_lm import causal_window, chunked_attention_on, chunking_is_faster

assert mlxdpo


@st.composite
def cases(draw):
    K, L = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return {
        "B": draw(st.integers(1, 2)),
        "H": K * draw(st.integers(1, 3)),
        "K": K,
        "L": L,
        "T": L + draw(st.sampled_from([0, 0, 1, 7, 30])),
        "D": draw(st.sampled_from([1, 8, 20])),
        "V": draw(st.sampled_from([8, 12])),
        "window": draw(st.one_of(st.none(), st.integers(1, 60))),
        "chunk": draw(st.sampled_from([1, 5, 8, 16, 64, None])),
        "seed": draw(st.integers(0, 2**16)),
    }


def arrays(B, H, K, L, T, D, V, seed, dtype=np.float64, **_):
    rng = np.random.default_rng(seed)
    shapes = [(B, H, L, D), (B, K, T, D), (B, K, T, V), (B, H, L, V)]
    return [rng.normal(size=shape).astype(np.float32).astype(dtype) for shape in shapes]


def naive(q, k, v, ct, scale, window):
    """The whole square in float64, and its gradient by the textbook formulas: (out, dq, dk, dv)."""
    G, L, T = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)
    s = np.einsum("bhld,bhtd->bhlt", q, k) * scale
    token, key = np.arange(T - L, T)[:, None], np.arange(T)[None]
    s = np.where((key <= token) & (key > token - (window or T)), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("bhlv,bhtv->bhlt", ct, v)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale

    def shared(a):
        return a.reshape(a.shape[0], -1, G, *a.shape[2:]).sum(axis=2)

    dk, dv = np.einsum("bhlt,bhld->bhtd", ds, q), np.einsum("bhlt,bhlv->bhtv", p, ct)
    return p @ v, ds @ k, shared(dk), shared(dv)


def with_gradients(function, q, k, v, ct):
    out, gradients = mx.vjp(function, [q, k, v], [ct])
    return [out[0], *gradients]


def assert_close(got, want, relative, terms=1.0):
    """The largest difference, per array, against the largest value, or the size of the ``terms`` that cancel in it."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.array(a.astype(mx.float32)), np.array(b)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= relative * max(np.abs(b).max(), terms), name


@settings(max_examples=120)
@given(cases())
def test_values_and_gradients_are_those_of_the_whole_square(case):
    exact = arrays(**case)
    scale, how = case["D"] ** -0.5, {name: case[name] for name in ("window", "chunk")}
    inputs = [mx.array(a.astype(np.float32)) for a in exact]
    got = with_gradients(lambda q, k, v: chunked_attention(q, k, v, scale=scale, **how), *inputs)
    # The scores' gradient is a difference of products of the upstream gradient with values: they round first.
    products = np.abs(exact[3]).max() * np.abs(exact[2]).max() * case["V"] ** 0.5 * scale
    assert_close(got, naive(*exact, scale, case["window"]), 1e-6, max(products, 1))


@pytest.mark.parametrize("window", [None, 1, 37, 300, 5000])
@pytest.mark.parametrize(("L", "T"), [(300, 300), (129, 640), (1, 257)])
def test_same_as_mlx_own_attention(L, T, window):
    q, k, v, ct = (mx.array(a) for a in arrays(2, 6, 2, L, T, 32, 32, seed=L, dtype=np.float32))
    mask = "causal" if window is None else base.create_causal_mask(L, T - L, window_size=window)
    want = with_gradients(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask), q, k, v, ct
    )
    got = with_gradients(lambda q, k, v: chunked_attention(q, k, v, scale=0.2, window=window), q, k, v, ct)
    assert_close(got, want, 3e-6)


@given(cases(), st.sampled_from([3, 128]))
def test_short_rows_keep_their_softmax_and_give_the_same(case, queries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxdpo.forward.attention.QUERIES", queries)
        q, k, v, ct = map(mx.array, arrays(**case | {"V": case["D"]}, dtype=np.float32))
        want = with_gradients(lambda *a: chunked_attention(*a, scale=0.2), q, k, v, ct)
        assert_close(with_gradients(lambda *a: short_attention(*a, scale=0.2), q, k, v, ct), want, 3e-6)


def test_large_scores_overflow_nothing():
    """Scores of thousands, the largest of them where the mask hides them."""
    exact = arrays(1, 2, 1, 20, 20, 8, 8, seed=1)
    exact[0] *= 300
    exact[1] *= 30
    inputs = [mx.array(a.astype(np.float32)) for a in exact]
    got = with_gradients(lambda q, k, v: chunked_attention(q, k, v, scale=1.0, window=6, chunk=8), *inputs)
    assert all(mx.isfinite(a).all().item() for a in got)
    assert_close(got, naive(*exact, 1.0, 6), 2e-3)  # a score of 20,000 itself carries 1e-3 in float32


def test_half_precision_is_computed_in_float32():
    exact = arrays(1, 4, 2, 50, 64, 16, 16, seed=2)
    inputs = [mx.array(a.astype(np.float32)).astype(mx.bfloat16) for a in exact]
    got = with_gradients(lambda q, k, v: chunked_attention(q, k, v, scale=0.25, chunk=16), *inputs)
    assert {a.dtype for a in got} == {mx.bfloat16}
    rounded = [np.array(a.astype(mx.float32)).astype(np.float64) for a in inputs]
    assert_close(got, naive(*rounded, 0.25, None), 2**-7)  # one rounding of out, one of each gradient


@pytest.mark.parametrize(
    "shapes",
    [((1, 3, 4, 8), (1, 2, 4, 8)), ((1, 2, 4, 8), (1, 2, 3, 8)), ((2, 2, 4, 8), (1, 2, 4, 8))],
    ids=["three heads for two", "fewer keys than queries", "two rows for one"],
)
def test_other_shapes_are_refused(shapes):
    q, k = (mx.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="need H a multiple of K"):
        chunked_attention(q, k, k, scale=1.0)


def test_empty_window_is_refused():
    q = mx.zeros((1, 1, 4, 8))
    with pytest.raises(ValueError, match="must be positive"):
        chunked_attention(q, q, q, scale=1.0, window=0)


def peak(function, q, k, v):
    """Bytes above what is held before, of forward and backward."""
    gradient = mx.grad(lambda *a: function(*a).sum(), argnums=(0, 1, 2))
    mx.synchronize()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(q, k, v))
    return mx.get_peak_memory() - held


def test_memory_grows_with_the_length_not_with_its_square():
    peaks = {}
    for length in (1024, 2048, 4096):
        q, k, v = mx.random.normal((3, 1, 1, length, 16))
        mx.eval(q, k, v)
        peaks[length] = peak(lambda q, k, v: chunked_attention(q, k, v, scale=0.2, chunk=64), q, k, v)
    own = peak(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal"), q, k, v)
    assert own > 8 * peaks[4096]
    # A square would be 4; how far the scheduler is ahead of a busy core moves a peak by a tenth.
    assert peaks[4096] < 2.6 * peaks[2048] < 2.6**2 * peaks[1024]


@pytest.mark.parametrize(
    ("kind", "keys", "fused", "answer"),
    [
        ("cpu", 8192, False, True),
        ("cpu", 10, False, True),
        ("metal", patch_mlx_lm.UNFUSED_FROM, False, True),
        ("metal", patch_mlx_lm.UNFUSED_FROM - 1, False, False),
        ("metal", 8192, True, False),
        ("cuda", 8192, True, False),
        ("cuda", 8192, False, True),
    ],
)
def test_the_rule(kind, keys, fused, answer):
    assert chunking_is_faster(kind, keys, fused) is answer


@pytest.mark.parametrize(
    ("kind", "head_dim", "masked", "answer"),
    [
        ("cpu", 64, False, False),
        ("cuda", 64, False, True),
        ("cuda", 64, True, False),
        ("metal", 64, False, True),
        ("metal", 256, False, True),
        ("metal", 48, False, False),
        ("metal", 64, True, False),
    ],
)
def test_where_mlx_differentiates_without_its_scores(monkeypatch, kind, head_dim, masked, answer):
    monkeypatch.setattr(patch_mlx_lm, "this_machine", lambda: SimpleNamespace(kind=kind))
    q, k = mx.zeros((1, 4, 16, head_dim)), mx.zeros((1, 2, 32, head_dim))
    assert patch_mlx_lm.fused_here(q, k, k, masked) is answer


@pytest.mark.parametrize(("L", "offset", "window"), [(9, 0, 4), (9, 0, 1), (5, 7, 3), (1, 6, 2), (6, 2, 8)])
def test_a_window_is_read_from_its_mask(L, offset, window):
    mask = base.create_causal_mask(L, offset, window_size=window)
    assert causal_window(mask, L, L + offset) == window
    assert causal_window(mask[None, None], L, L + offset) == window


def test_a_rotating_cache_makes_windows_too():
    cache = RotatingKVCache(max_size=8)
    for _ in range(2):
        mask = cache.make_mask(20)
        keys, _ = cache.update_and_fetch(mx.zeros((1, 1, 20, 4)), mx.zeros((1, 1, 20, 4)))
        assert causal_window(mask, 20, keys.shape[2]) == 8


def test_other_masks_are_no_windows():
    causal = base.create_causal_mask(12)
    assert causal_window(causal, 12, 12) == 12
    one_bit = np.array(base.create_causal_mask(12, window_size=5))
    one_bit[3, 1] = False
    packed = mx.array(np.kron(np.eye(2), np.ones((6, 6))).astype(bool)) & causal
    others = [mx.array(one_bit), packed, mx.zeros((12, 12), mx.bool_), mx.where(causal, 0.0, -mx.inf), ~causal]
    others += [mx.stack([causal, causal])[:, None], base.create_causal_mask(12, left_padding=mx.array([2]))]
    assert [causal_window(mask, 12, 12) for mask in others] == [None] * len(others)
    assert causal_window(causal, 9, 16) is None


@pytest.fixture
def pays_at_once(monkeypatch):
    """Short rows take the chunks too, in chunks of 16; counts the calls that did."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return chunked_attention(*args, **options, chunk=16)

    monkeypatch.setattr(patch_mlx_lm, "UNFUSED_FROM", 2)
    monkeypatch.setattr(patch_mlx_lm, "SHORT", 0)
    monkeypatch.setattr(patch_mlx_lm, "chunked_attention", counted)
    return calls


def lora_model(kind):
    model = tiny_model(kind)
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    changed = [(n, mx.random.normal(a.shape) * 0.1) for n, a in tree_flatten(model.trainable_parameters())]
    model.load_weights(changed, strict=False)
    mx.eval(model.parameters())
    return model


def language_loss(model, tokens, cache=None):
    return nn.losses.cross_entropy(model(tokens[:, :-1], cache), tokens[:, 1:], reduction="mean")


def loss_and_gradients(model, tokens, loss=language_loss, wrap=lambda f: f):
    value, gradients = wrap(nn.value_and_grad(model, lambda tokens: loss(model, tokens)))(tokens)
    return {"loss": value, **dict(tree_flatten(gradients))}


# One unit in the last place of its random weights moves this model's gradients by 1.7e-5 of their largest.
TOLERANCE = {"gemma3_text": 4e-5}


def assert_same_training(kind, got, want):
    assert got.keys() == want.keys()
    for name, b in want.items():
        assert mx.abs(b).max().item() > 1e-6, f"{name} has no gradient to compare"
        assert (mx.abs(got[name] - b).max() / mx.abs(b).max()).item() < TOLERANCE.get(kind, 1e-5), name


WINDOWS = {"llama": [None] * 3, "qwen3": [None] * 3, "gemma3_text": [16, None, 16]}


@pytest.mark.parametrize("wrap", [lambda f: f, pytest.param(mx.compile, marks=COMPILING)], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", list(WINDOWS))
def test_whole_models_train_the_same(kind, wrap, pays_at_once):
    model, tokens = lora_model(kind), mx.random.randint(0, 300, (2, 72))
    want = loss_and_gradients(model, tokens)
    with chunked_attention_on(model, 71) as on:
        got = loss_and_gradients(model, tokens, wrap=wrap)
    assert on
    assert [call["window"] for call in pays_at_once] == WINDOWS[kind]
    assert_same_training(kind, got, want)


@compiling
@pytest.mark.parametrize("kind", list(WINDOWS))
def test_with_layers_under_checkpoint_in_a_compiled_step(kind, pays_at_once):
    """Each layer closes over its mask, as the trunk's own loop does; it is run again in the backward pass."""

    def loss(model, tokens):
        inner, h = model.model, model.model.embed_tokens(tokens[:, :-1])
        masks = [base.create_attention_mask(h, window_size=window) for window in WINDOWS[kind]]
        for layer, mask in zip(inner.layers, masks, strict=True):

            def run(parameters, h, layer=layer, mask=mask):
                kept = layer.trainable_parameters()
                layer.update(parameters)
                out = layer(h, mask, None)
                layer.update(kept)
                return out

            h = mx.checkpoint(run)(layer.trainable_parameters(), h)
        return nn.losses.cross_entropy(inner.embed_tokens.as_linear(inner.norm(h)), tokens[:, 1:], reduction="mean")

    model, tokens = lora_model(kind), mx.random.randint(0, 300, (2, 50))
    want = loss_and_gradients(model, tokens, loss)
    with chunked_attention_on(model, 49):
        got = loss_and_gradients(model, tokens, loss, mx.compile)
    assert len(pays_at_once) == 6
    assert_same_training(kind, got, want)


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_behind_a_prefix_cache(kind, pays_at_once):
    """T > L: gradients through a suffix whose prefix of 40 tokens is already in the cache."""
    model, tokens = lora_model(kind), mx.random.randint(0, 300, (2, 90))

    def loss(model, tokens):
        caches = [KVCache() for _ in model.layers]
        model(tokens[:, :40], caches)
        return language_loss(model, tokens[:, 40:], caches)

    want = loss_and_gradients(model, tokens, loss)
    with chunked_attention_on(model, 90):
        got = loss_and_gradients(model, tokens, loss)
    assert len(pays_at_once) == 6
    assert_same_training(kind, got, want)


def test_calls_that_are_something_else_go_to_mlx(pays_at_once, monkeypatch):
    own = []
    monkeypatch.setattr(base, "scaled_dot_product_attention", lambda *args: own.append(args))
    q = mx.zeros((1, 2, 4, 8))
    padded = base.create_causal_mask(4, left_padding=mx.array([1]))
    others = [(SimpleNamespace(bits=8), "causal", None), (None, "causal", mx.zeros(2)), (None, None, None)]
    others += [(None, padded, None), (None, mx.zeros((4, 4)), None)]
    for cache, mask, sinks in others:
        patch_mlx_lm.own_attention(q, q, q, cache, 0.5, mask, sinks)
    assert len(own) == len(others) and not pays_at_once
    for passed, (cache, mask, sinks) in zip(own, others, strict=True):
        assert all(a is b for a, b in zip(passed, (q, q, q, cache, 0.5, mask, sinks), strict=True))


def test_a_quantised_cache_gives_what_it_gave(pays_at_once):
    model, tokens = tiny_model(head_dim=32), mx.random.randint(0, 300, (1, 30))

    def logits():
        return model(tokens, [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers])

    want = logits()
    with chunked_attention_on(model, 30):
        # SwiGLU is computed in another order, and where that moves a key across a step of its 8 bits it shows.
        assert mx.allclose(logits(), want, atol=1e-3).item()
    assert not pays_at_once


def test_one_token_at_a_time_is_left_alone(pays_at_once):
    model, caches = tiny_model(), [KVCache() for _ in range(3)]
    with chunked_attention_on(model, 30):
        model(mx.array([[1, 2, 3]]), caches)
        assert len(pays_at_once) == 3
        model(mx.array([[4]]), caches)
    assert len(pays_at_once) == 3


def file_of(model):
    return sys.modules[type(model).__module__]


def test_the_scope(pays_at_once):
    own, model, other = base.scaled_dot_product_attention, tiny_model("llama"), tiny_model("qwen3")
    with pytest.raises(KeyError), chunked_attention_on(model, 30), chunked_attention_on(model, 30):
        assert file_of(model).scaled_dot_product_attention is patch_mlx_lm.own_attention
        assert file_of(other).scaled_dot_product_attention is own
        assert base.scaled_dot_product_attention is own
        raise KeyError
    assert file_of(model).scaled_dot_product_attention is own
    with chunked_attention_on(model, 30), chunked_attention_on(other, 30):
        pass
    assert file_of(model).scaled_dot_product_attention is own is file_of(other).scaled_dot_product_attention


def test_scopes_left_in_another_order_than_entered(pays_at_once):
    model = tiny_model()
    entered, leave = threading.Event(), threading.Event()

    def first():
        with chunked_attention_on(model, 30):
            entered.set()
            leave.wait(600)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(600)
    with chunked_attention_on(model, 30):
        leave.set()
        thread.join(600)
        assert file_of(model).scaled_dot_product_attention is patch_mlx_lm.own_attention
    assert file_of(model).scaled_dot_product_attention is base.scaled_dot_product_attention


def test_short_rows_and_files_without_the_name_are_not_switched(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(patch_mlx_lm, "this_machine", lambda: SimpleNamespace(kind="metal"))
        with chunked_attention_on(tiny_model("llama"), patch_mlx_lm.UNFUSED_FROM - 1) as on:
            assert not on
    with chunked_attention_on(tiny_model("gemma2"), 10**6) as on:  # it writes its attention out
        assert not on
    model = tiny_model("llama")
    monkeypatch.setattr(file_of(model), "scaled_dot_product_attention", len)  # somebody else's, left to them
    with chunked_attention_on(model, 10**6) as on:
        assert not on and file_of(model).scaled_dot_product_attention is len


def test_on_a_gpu_only_windows_are_switched(pays_at_once, fake_mac):
    model, tokens = tiny_model("gemma3_text"), mx.random.randint(0, 300, (1, 40))
    want = model(tokens)
    with chunked_attention_on(model, 40):
        got = model(tokens)
    assert [call["window"] for call in pays_at_once] == [16, 16]
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-4).item()


def test_a_wrapped_model_is_switched_where_its_layers_live():
    wrapper = nn.Module()
    wrapper.language_model = tiny_model("qwen3")
    assert patch_mlx_lm.attention_files(wrapper) == [file_of(wrapper.language_model)]
