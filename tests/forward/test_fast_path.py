"""Shared prefix, rows computed once, fused head and checkpointing against full rows and full logits: exact.

Every white-listed architecture is here because the tests iterate the white list.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gradients import apart, gradients, moved
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny_models import SHAPES, tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.forward import fused_head as head_module
from mlxdpo.forward import shared_prefix as prefix_module
from mlxdpo.forward.architectures import FAMILIES, model_parts
from mlxdpo.forward.fused_head import chunk_of, score_logps, token_logps
from mlxdpo.forward.layer_plan import checkpointed
from mlxdpo.forward.shared_prefix import hidden_states
from mlxdpo.forward.token_rows import spreader

V, G, K, P, S = 300, 2, 3, 31, 20
KINDS = sorted(FAMILIES)


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

    def fast(self, model, rows_per_prompt=K, checkpoint=None):
        """The same through the parts of the model."""
        trunk = model_parts(model)
        spread = spreader(self.group, rows_per_prompt)
        h = trunk.norm(hidden_states(trunk, self.prefix, self.suffix, spread, checkpoint))
        return (token_logps(trunk.head, h.reshape(-1, h.shape[-1]), self.targets) * self.weight).sum()


# Every family with rows in order and in any, with and without checkpointing; the four together for two of them.
PASSES = [
    *((kind, K, None) for kind in KINDS),
    *((kind, None, checkpointed) for kind in KINDS),
    *((kind, rows, None if rows is None else checkpointed) for kind in ("llama", "gemma2") for rows in (K, None)),
]


@pytest.mark.parametrize(("kind", "rows_per_prompt", "checkpoint"), PASSES)
def test_equals_full_rows_and_full_logits(kind, rows_per_prompt, checkpoint):
    model, rows = moved(tiny_model(kind), LoraConfig(rank=4)), Rows()
    value, wanted = gradients(model, rows.plain)
    fast, got = gradients(model, lambda m: rows.fast(m, rows_per_prompt, checkpoint))
    assert fast == pytest.approx(value, abs=1e-4 * abs(rows.weight).sum().item() ** 0.5)
    # Random gemma norms are near 2, not 1: logits of some hundreds, and rounding that much larger (4e-5 with the
    # AVX2 kernels of a BLAS, 6e-5 with its AVX-512 ones).
    assert apart(got, wanted) < (1e-4 if kind == "gemma" else 1e-5)


@pytest.mark.parametrize("method", ["dora", "full"])
@pytest.mark.parametrize("checkpoint", [None, checkpointed])
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
    head, h = model_parts(model).head, mx.random.normal((1100, 32))
    y = mx.random.randint(0, V, (1100,))
    assert np.abs(np.array(score_logps(head, h, y) - token_logps(head, h, y))).max() < 1e-5


def test_a_key_captured_as_a_constant_would_be_noticed(monkeypatch):
    """The peer's bug: keys that enter a checkpoint as a constant lose their gradient, and the loss does not show it."""

    def broken(trunk, layer, window, spread):
        def both(hp, hs):
            captured, before = prefix_module.Capture(), hp.shape[1]
            out = layer(hp, trunk.mask(before, 0, window), captured)
            captured.keys, captured.values = mx.stop_gradient(captured.keys), mx.stop_gradient(captured.values)
            return out, layer(hs, trunk.mask(hs.shape[1], before, window), prefix_module.Prefixed(captured, spread))

        return both

    model, rows = moved(tiny_model("llama"), LoraConfig(rank=4)), Rows()
    value, wanted = gradients(model, rows.plain)
    monkeypatch.setattr(prefix_module, "_prefix_layer", broken)
    fast, got = gradients(model, lambda m: rows.fast(m, K, checkpointed))
    assert fast == pytest.approx(value, rel=1e-5) and apart(got, wanted) > 1e-2


def test_an_architecture_off_the_list_is_left_alone():
    model = tiny_model("llama")
    assert model_parts(model) is not None and set(FAMILIES) == set(KINDS) <= set(SHAPES)
    assert model_parts(nn.Linear(2, 2)) is None
