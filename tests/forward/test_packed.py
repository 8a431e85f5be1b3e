"""Distinct tokens without padding against full rows and full logits: exact, for tiny models of all kinds."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compilers import compiling
from gradients import RECURRENT, apart, gradients, moved, ragged, weighted
from levels_of import at_level, level_of
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_models import SHAPES, tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.forward import levels, packed, patch_mlx_lm
from mlxdpo.forward.logprobs import plain_forward

PACKED = sorted(set(SHAPES) - {"gemma2"} - RECURRENT)  # attention written out, and states: they stay with padded rows
BOTH_WAYS = [(kind, bool(i % 2) != late) for late in (False, True) for i, kind in enumerate(PACKED)]


@pytest.fixture
def always(monkeypatch):
    """Counts the layers that were run so with the batch; the few tokens of a trace are not counted."""
    runs, attend = [], packed.PackedMask.attend

    def counting(self, queries, *rest):
        if len(self.layout.offset) != len(packed_trace.offset):
            runs.append(1)
        return attend(self, queries, *rest)

    packed_trace = packed.PackedLayout(levels.probe_batch(level_of(tiny_model("llama")).head))
    monkeypatch.setattr(packed.PackedMask, "attend", counting)
    return runs


@pytest.mark.parametrize(("kind", "checkpoint"), rest_slow(BOTH_WAYS, BOTH_WAYS[: len(PACKED)]))
def test_equals_full_rows_and_full_logits(kind, checkpoint, always):
    model, batch = moved(tiny_model(kind), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    assert not always
    fast, got = gradients(model, weighted(at_level(checkpoint=checkpoint), batch))
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
    fast, got = gradients(model, weighted(at_level(), batch))
    assert always and fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("method", ["dora", "full"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_dora_and_full(method, checkpoint, always):
    model, batch = moved(tiny_model("qwen3"), LoraConfig(method=method, rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    fast, got = gradients(model, weighted(at_level(checkpoint=checkpoint), batch))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_padded_rows_give_the_same():
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    for level in ("prefix", "head"):
        fast, got = gradients(model, weighted(at_level(level), batch))
        assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_bucketed_equals_unpadded(always, monkeypatch):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(at_level(), batch))
    monkeypatch.setattr("mlxdpo.data.batch_shapes.bucket", lambda n: n)
    exact = ragged()
    assert len(exact.rest) < len(batch.rest) and exact.rows.shape[1] < batch.rows.shape[1]
    fast, got = gradients(model, weighted(at_level(), exact))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_long_rows_attend_in_chunks(always, monkeypatch):
    monkeypatch.setattr(patch_mlx_lm, "SHORT", 8)
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    value, wanted = gradients(model, weighted(plain_forward, batch))
    used, chunked = [], patch_mlx_lm.chunked_attention
    monkeypatch.setattr(patch_mlx_lm, "chunked_attention", lambda *a, **k: used.append(1) or chunked(*a, **k))
    fast, got = gradients(model, weighted(at_level(), batch))
    assert used and fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_an_attention_that_is_written_out_is_not_packed():
    level = level_of(tiny_model("gemma2"))
    assert level.name == "prefix" and level.why == "its attention is written out in its own file"
    model, batch = moved(tiny_model("gemma2"), LoraConfig(rank=4)), ragged()
    (value, wanted), (fast, got) = (gradients(model, weighted(f, batch)) for f in (plain_forward, at_level()))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_names_are_put_back(always):
    model, batch = tiny_model("llama"), ragged()
    before = patch_mlx_lm.attention_files(model)[0].scaled_dot_product_attention
    gradients(moved(model, LoraConfig(rank=4)), weighted(at_level(checkpoint=True), batch))
    assert patch_mlx_lm.attention_files(model)[0].scaled_dot_product_attention is before


@compiling
def test_compiled_equals_eager(always):
    model, batch = moved(tiny_model("llama"), LoraConfig(rank=4)), ragged()
    step = nn.value_and_grad(model, weighted(at_level(), batch))
    (value, tree), (other, compiled) = step(model), mx.compile(lambda: step(model), inputs=[model.state])()
    wanted, got = (np.concatenate([np.array(g).ravel() for _, g in tree_flatten(t)]) for t in (tree, compiled))
    assert other.item() == pytest.approx(value.item(), rel=1e-6) and apart(got, wanted) < 1e-5
