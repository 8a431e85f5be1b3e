"""Shared prefix, rows computed once, fused head and checkpointing against full rows and full logits: exact.

Tiny models of all kinds are here; every architecture of mlx-lm is in test_architectures.py.
"""

import gc
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gradients import apart, gradients, moved, ragged, rounding, weighted
from hypothesis import given
from hypothesis import strategies as st
from levels_of import at_level
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_models import SHAPES, tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.forward import fused_head as head_module
from mlxdpo.forward import shared_prefix as prefix_module
from mlxdpo.forward.find_head import NoFastWay, find_head
from mlxdpo.forward.fused_head import chunk_of, score_logps, token_logps
from mlxdpo.forward.layer_checkpoint import checkpointed_layers
from mlxdpo.forward.token_rows import spreader

V, G, K, P, S = 300, 2, 3, 31, 20
KINDS = sorted(SHAPES)


class Rows:
    """Random rows of G prompts with K completions each, and a weight for each token, so that none can hide."""

    def __init__(self, seed=0, shared=P):
        draw = np.random.default_rng(seed)
        self.prefix = mx.array(draw.integers(1, V, (G, shared)))
        self.suffix = mx.array(draw.integers(1, V, (G * K, S)))
        self.group = mx.repeat(mx.arange(G), K)
        self.full = mx.concatenate([self.prefix[self.group], self.suffix], axis=1)
        self.targets = mx.array(draw.integers(1, V, G * K * S))
        self.weight = mx.array(draw.normal(size=G * K * S).astype("f"))

    def plain(self, model):
        """Weighted log-probs from full rows and full logits."""
        z = model(self.full)[:, self.prefix.shape[1] :].astype(mx.float32).reshape(-1, V)
        return (
            (z - mx.logsumexp(z, -1, keepdims=True))[mx.arange(len(self.targets)), self.targets] * self.weight
        ).sum()

    def fast(self, model, rows_per_prompt=K, checkpoint=False):
        """The same with the prefix shared and a fused head."""
        head, spread = find_head(model), spreader(self.group, rows_per_prompt)
        with checkpointed_layers(model) if checkpoint else nullcontext():
            h = prefix_module.prefixed_states(model, head, self.prefix, self.suffix, spread)
        return (token_logps(head, h.reshape(-1, h.shape[-1]), self.targets) * self.weight).sum()


# Every family with rows in order and in any, with and without checkpointing; the four together for two of them.
PASSES = [
    *((kind, K, False) for kind in KINDS),
    *((kind, None, True) for kind in KINDS),
    *((kind, rows, rows is not None) for kind in ("llama", "gemma2") for rows in (K, None)),
]


@pytest.mark.parametrize(("kind", "rows_per_prompt", "checkpoint"), rest_slow(PASSES, PASSES[::2]))
def test_equals_full_rows_and_full_logits(kind, rows_per_prompt, checkpoint):
    model, rows = moved(tiny_model(kind), LoraConfig(rank=4)), Rows()
    value, wanted = gradients(model, rows.plain)
    fast, got = gradients(model, lambda m: rows.fast(m, rows_per_prompt, checkpoint))
    assert fast == pytest.approx(value, abs=1e-4 * abs(rows.weight).sum().item() ** 0.5)
    # Random gemma norms are near 2, not 1: logits of some hundreds, and rounding that much larger (4e-5 with the
    # AVX2 kernels of a BLAS, 6e-5 with its AVX-512 ones).
    assert apart(got, wanted) < (1e-4 if kind == "gemma" else rounding(kind))


@pytest.mark.parametrize("method", ["dora", "full"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_dora_and_trained_heads(method, checkpoint, tied):
    model = moved(tiny_model("llama", tie_word_embeddings=tied), LoraConfig(method=method, rank=4))
    rows = Rows()
    (value, wanted), (fast, got) = (gradients(model, f) for f in (rows.plain, lambda m: rows.fast(m, K, checkpoint)))
    assert fast == pytest.approx(value, rel=1e-5) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("head", ["lm_head", "model.embed_tokens"])
def test_an_adapter_on_the_head(head, method):
    plain = tiny_model("llama", tie_word_embeddings=head != "lm_head")
    model, rows = moved(plain, LoraConfig(method=method, rank=4, keys=[head])), Rows()
    (value, wanted), (fast, got) = (gradients(model, f) for f in (rows.plain, rows.fast))
    assert set(dict(tree_flatten(model.trainable_parameters()))) >= {f"{head}.lora_a", f"{head}.lora_b"}
    assert fast == pytest.approx(value, rel=1e-5) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_without_a_prefix(kind):
    model, rows = moved(tiny_model(kind), LoraConfig(rank=4)), Rows(shared=0)
    (value, wanted), (fast, got) = (gradients(model, f) for f in (rows.plain, rows.fast))
    assert fast == pytest.approx(value, rel=1e-5) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_quantised_head(tied):
    model = tiny_model("llama", tie_word_embeddings=tied, hidden_size=64, head_dim=16)
    nn.quantize(model, group_size=32, bits=4)
    moved(model, LoraConfig(rank=4))
    rows = Rows()
    (value, wanted), (fast, got) = (gradients(model, f) for f in (rows.plain, rows.fast))
    assert fast == pytest.approx(value, rel=1e-4) and apart(got, wanted) < 1e-4


def test_a_chunk_of_logits_is_as_large_whatever_the_vocabulary():
    sizes = [chunk_of(v) * v * 4 for v in (32_000, 49_152, 151_936, 262_144)]
    assert all(0.9 * head_module.LOGITS < size < 1.2 * head_module.LOGITS for size in sizes)
    assert chunk_of(10**8) == head_module.TILE


@given(st.integers(2, 10**7))
def test_a_chunk_is_made_of_whole_tiles(vocabulary):
    assert chunk_of(vocabulary) % 64 == 0 < chunk_of(vocabulary)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_chunks_change_nothing(method, monkeypatch):
    model, rows = moved(tiny_model("llama"), LoraConfig(method=method, rank=4)), Rows()
    value, wanted = gradients(model, rows.fast)
    monkeypatch.setattr(head_module, "LOGITS", 0)
    monkeypatch.setattr(head_module, "TILE", 32)
    assert chunk_of(V) == 32 < len(rows.targets)
    chunked, got = gradients(model, rows.fast)
    assert chunked == pytest.approx(value, rel=1e-5) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_scoring_alone_equals_training(kind):
    model = tiny_model(kind)
    head, h = find_head(model), mx.random.normal((1100, 32))
    y = mx.random.randint(0, V, (1100,))
    assert np.abs(np.array(score_logps(head, h, y) - token_logps(head, h, y))).max() < 1e-5


def test_a_key_captured_as_a_constant_would_be_noticed(monkeypatch):
    """A peer's bug: keys that enter a checkpoint as a constant lose their gradient, and the loss does not show it."""
    model, rows = moved(tiny_model("llama"), LoraConfig(rank=4)), Rows()
    value, wanted = gradients(model, rows.plain)
    spread = prefix_module._spread
    monkeypatch.setattr(prefix_module, "_spread", lambda tree, f: spread(tree, lambda a: mx.stop_gradient(f(a))))
    fast, got = gradients(model, lambda m: rows.fast(m, K, True))
    assert fast == pytest.approx(value, rel=1e-5) and apart(got, wanted) > 1e-2


@pytest.mark.parametrize(("kind", "cap", "factor"), [("gemma2", 3, 1), ("cohere", None, 0.5), ("granite", None, 0.25)])
def test_what_follows_the_head_is_read_off_the_model(kind, cap, factor):
    head = find_head(tiny_model(kind))
    assert (head.softcap, head.factor) == (cap and pytest.approx(cap), pytest.approx(factor, rel=1e-6))


def test_a_model_whose_logits_come_from_something_else_has_no_head(monkeypatch):
    model = tiny_model("llama")
    kind, call = type(model), type(model).__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs) ** 2)
    with pytest.raises(NoFastWay, match="not a scale and a soft cap"):
        find_head(model)


def test_two_arrays_that_are_one_keep_their_gradient_under_a_checkpoint():
    """MLX's own checkpoint drops the cotangent of an array that is returned twice."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.array([2.0])

        def __call__(self, x):
            y = x * x * self.weight
            return y, [y]

    model = nn.Module()
    model.layers = [Twice()]

    def total(model, checkpoint):
        with checkpointed_layers(model) if checkpoint else nullcontext():
            y, (again,) = model.layers[0](mx.array([3.0]))
        return (y + 5 * again).sum()

    wanted, got = (nn.value_and_grad(model, total)(model, on) for on in (False, True))
    assert got[0].item() == wanted[0].item() == 108
    assert got[1]["layers"][0]["weight"].item() == wanted[1]["layers"][0]["weight"].item() == 54


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("level", ["packed", "prefix", "head"])
def test_a_step_leaves_no_array_to_the_garbage_collector(level, checkpoint):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    way, sizes = at_level(level, checkpoint), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            gradients(model, weighted(way, batch))
            sizes.append(mx.get_active_memory())
    finally:
        gc.enable()
    assert sizes[2] == sizes[1]
