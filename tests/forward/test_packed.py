"""Distinct tokens without padding against full rows and full logits: exact, for every white-listed architecture."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compilers import needs_compiler
from gradients import apart, gradients, moved, ragged, weighted
from mlx.utils import tree_flatten
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.forward import logprobs, packed, patch_mlx_lm
from mlxdpo.forward.architectures import FAMILIES, model_parts
from mlxdpo.forward.layer_plan import checkpointed
from mlxdpo.forward.logprobs import fast_forward, plain_forward

PACKED = sorted(set(FAMILIES) - {"gemma2"})  # writes its attention out, so it stays with padded rows


@pytest.fixture
def always(monkeypatch):
    """Pack whatever it saves, and count the layers that were run so."""
    runs, attend = [], packed.Packed.attend
    monkeypatch.setattr(logprobs, "packing_is_worth_it", lambda *shapes: True)
    monkeypatch.setattr(packed.Packed, "attend", lambda self, *a: runs.append(1) or attend(self, *a))
    return runs


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("checkpoint", [None, checkpointed])
def test_equals_full_rows_and_full_logits(kind, checkpoint, always):
    model, batch = moved(tiny_model(kind), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    assert not always
    fast, got = gradients(model, weighted(fast_forward(checkpoint), batch))
    assert len(always) == len(model.layers) * (2 if checkpoint else 1)
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4)
    assert apart(got, wanted) < (5e-5 if kind == "gemma" else 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [((5, 9), ((3, 4), (20, 1))), ((70, 41), ((9, 30, 2), (5, 6))), ((33,), ((2, 50),))],
    ids=["no shared prefix", "unequal numbers of rows", "one prompt"],
)
def test_every_layout(kind, prompts, completions, always):
    model, batch = moved(tiny_model(kind), LoraConfig(rank=4)), ragged(prompts, completions)
    value, wanted = gradients(model, weighted(plain_forward, batch))
    fast, got = gradients(model, weighted(fast_forward(), batch))
    assert always and fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("method", ["dora", "full"])
@pytest.mark.parametrize("checkpoint", [None, checkpointed])
def test_dora_and_full(method, checkpoint, always):
    model, batch = moved(tiny_model("qwen3"), LoraConfig(method=method, rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    fast, got = gradients(model, weighted(fast_forward(checkpoint), batch))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_padded_rows_give_the_same(monkeypatch):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    monkeypatch.setattr(logprobs, "packing_is_worth_it", lambda *shapes: False)
    fast, got = gradients(model, weighted(fast_forward(), batch))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_bucketed_equals_unpadded(always, monkeypatch):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(fast_forward(), batch))
    monkeypatch.setattr("mlxdpo.data.batch_shapes.bucket", lambda n: n)
    exact = ragged()
    assert len(exact.rest) < len(batch.rest) and exact.rows.shape[1] < batch.rows.shape[1]
    fast, got = gradients(model, weighted(fast_forward(), exact))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_long_rows_attend_in_chunks(always, monkeypatch):
    monkeypatch.setattr(patch_mlx_lm, "SHORT", 8)
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    used, chunked = [], patch_mlx_lm.chunked_attention
    monkeypatch.setattr(patch_mlx_lm, "chunked_attention", lambda *a, **k: used.append(1) or chunked(*a, **k))
    fast, got = gradients(model, weighted(fast_forward(), batch))
    assert used and fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_rows_of_one_length_are_left_as_they_are():
    assert not packed.packing_is_worth_it((2, 31), (4, 40), 160) and packed.packing_is_worth_it((2, 31), (4, 40), 120)


def test_an_attention_that_is_written_out_is_not_packed():
    assert not packed.can_pack(model_parts(tiny_model("gemma2")))
    model, batch = moved(tiny_model("gemma2"), LoraConfig(rank=4)), ragged()
    (value, wanted), (fast, got) = (gradients(model, weighted(f, batch)) for f in (plain_forward, fast_forward()))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_names_are_put_back(always):
    model, batch = tiny_model("llama"), ragged()
    before = patch_mlx_lm.attention_files(model)[0].scaled_dot_product_attention
    gradients(moved(model, LoraConfig(rank=4)), weighted(fast_forward(checkpointed), batch))
    assert patch_mlx_lm.attention_files(model)[0].scaled_dot_product_attention is before


@needs_compiler
def test_compiled_equals_eager(always):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    step = nn.value_and_grad(model, weighted(fast_forward(), batch))
    (value, tree), (other, compiled) = step(model), mx.compile(lambda: step(model), inputs=[model.state])()
    wanted, got = (np.concatenate([np.array(g).ravel() for _, g in tree_flatten(t)]) for t in (tree, compiled))
    assert other.item() == pytest.approx(value.item(), rel=1e-6) and apart(got, wanted) < 1e-5
