"""Batched, padded, reordered rows score as each row does alone: values and gradients, on real architectures."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compilers import compiling
from levels_of import at_level
from mlx.utils import tree_flatten
from tiny_models import CONFIGS, tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.data.batching import collate, distinct_rows
from mlxdpo.forward import logprobs
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.logprobs import (
    completion_logps,
    float32_activations,
    next_token_logps,
    plain_forward,
    rounding_tolerance,
    score_pairs,
)
from mlxdpo.model.adapters import attach_lora
from mlxdpo.training.step import make_scorer
from mlxdpo.types import Example

KINDS = sorted(CONFIGS)
COUNT = 6


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """Adapters that do something, so that gradients pass through them."""
    built = attach_lora(tiny_model(request.param), LoraConfig(rank=3, scale=1.0))
    noise = {n: mx.random.normal(a.shape) * 0.2 for n, a in tree_flatten(built.trainable_parameters())}
    built.load_weights(list(noise.items()), strict=False)
    return built


@pytest.fixture(scope="module")
def examples():
    """Rows of 5 to 60 tokens: over the tiny models' sliding window of 16, in different buckets."""
    draw = np.random.default_rng(1)
    ids = lambda low, high: draw.integers(1, 300, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    return [Example(ids(2, 30), ids(3, 30), ids(3, 30), f"row {i}") for i in range(COUNT)]


def naive(model, prompt, completion):
    """log pi(y|x) of one unpadded row, token by token, from a full float64 log-softmax."""
    row = np.concatenate([prompt, completion])
    logits = np.array(model(mx.array(row)[None])[0].astype(mx.float32)).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return sum(logps[t - 1, row[t]] for t in range(len(prompt), len(row)))


def naive_differentiable(model, prompt, completion):
    row = mx.array(np.concatenate([prompt, completion]))
    logps = nn.log_softmax(model(row[None])[0].astype(mx.float32), axis=-1)
    return sum(logps[t - 1, row[t]] for t in range(len(prompt), len(row)))


def test_equals_the_naive_loop(model, examples):
    pairs = score_pairs(model, collate(examples, tuple(range(COUNT)), COUNT))
    for i, example in enumerate(examples):
        assert pairs.chosen[i].item() == pytest.approx(naive(model, example.prompt, example.chosen), abs=1e-4)
        assert pairs.rejected[i].item() == pytest.approx(naive(model, example.prompt, example.rejected), abs=1e-4)
    assert pairs.chosen_len.tolist() == [len(e.chosen) for e in examples]
    assert pairs.rejected_len.tolist() == [len(e.rejected) for e in examples]


def test_order_padding_and_batch_size_change_nothing(model, examples):
    alone = [score_pairs(model, collate(examples, (i,), 1), at_level()) for i in range(COUNT)]
    chosen, rejected = ([getattr(p, side).item() for p in alone] for side in ("chosen", "rejected"))
    order = (4, 2, 0, 5, 1, 3)
    for size in (COUNT, COUNT + 3):
        pairs = score_pairs(model, collate(examples, order, size))
        assert pairs.chosen[:COUNT].tolist() == pytest.approx([chosen[i] for i in order], abs=1e-4)
        assert pairs.rejected[:COUNT].tolist() == pytest.approx([rejected[i] for i in order], abs=1e-4)


def test_fast_and_plain_ways_and_full_rows_agree(model, examples):
    batch = collate(examples, tuple(range(COUNT)), COUNT + 2)
    rows, _ = distinct_rows(examples)
    width = max(len(row.prompt) + len(row.completion) for row in rows) + 9
    tokens, mask = np.full((len(rows), width), 299, np.int32), np.zeros((len(rows), width - 1), np.float32)
    for i, row in enumerate(rows):
        ids = np.concatenate([row.prompt, row.completion])
        tokens[i, : len(ids)], mask[i, len(row.prompt) - 1 : len(ids) - 1] = ids, 1
    wanted = completion_logps(model, mx.array(tokens), mx.array(mask)).tolist()
    for forward in (plain_forward, at_level(), at_level(checkpoint=True), forward_fns(model).score):
        assert forward(model, batch).tolist() == pytest.approx(wanted, abs=1e-4)
    assert (
        forward_fns(model).score(model, batch).tolist() == forward_fns(model).train(model, batch).tolist()
    )  # to the bit


def test_gradient_equals_the_naive_loops(model, examples):
    few, weights = examples[:3], (1.0, -0.5, 2.0)
    batch = collate(few, (0, 1, 2), 4)  # with a filler pair, which is not in the sum

    def batched(model):
        pairs = score_pairs(model, batch, at_level())
        return sum(w * (pairs.chosen[i] - pairs.rejected[i]) for i, w in enumerate(weights))

    def plain(model):
        sides = [
            (naive_differentiable(model, e.prompt, e.chosen), naive_differentiable(model, e.prompt, e.rejected))
            for e in few
        ]
        return sum(w * (c - r) for w, (c, r) in zip(weights, sides, strict=True))

    results = [nn.value_and_grad(model, f)(model) for f in (batched, plain)]
    assert results[0][0].item() == pytest.approx(results[1][0].item(), abs=1e-3)
    got, want = (dict(tree_flatten(gradients)) for _, gradients in results)
    assert got.keys() == want.keys()
    for name in want:
        scale = mx.abs(want[name]).max().item()
        assert scale > 0 and mx.abs(got[name] - want[name]).max().item() < 2e-4 * scale, name


def test_token_logps_are_a_distribution(model, examples):
    """Over all V continuations of a prompt the probabilities of the next token sum to one."""
    prompt = mx.array(examples[0].prompt)
    rows = mx.concatenate([mx.repeat(prompt[None], 300, 0), mx.arange(300, dtype=mx.int32)[:, None]], axis=1)
    assert mx.exp(next_token_logps(model, rows)[:, -1]).sum().item() == pytest.approx(1, abs=1e-5)


@compiling
def test_the_compiled_scorer_sees_weights_that_moved(examples, monkeypatch):
    monkeypatch.setattr("mlxdpo.training.step.compiled", mx.compile)
    model = attach_lora(tiny_model(), LoraConfig(rank=3, scale=1.0))
    scorer, batch = make_scorer(model), collate(examples, (0, 1), 2)
    before = scorer(batch)
    layer = model.layers[1].self_attn.v_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    after, plain = scorer(batch), score_pairs(model, batch, at_level())
    assert after.chosen.tolist() == pytest.approx(plain.chosen.tolist(), abs=1e-4)
    assert abs(after.chosen[0].item() - before.chosen[0].item()) > 0.1


def test_sixteen_bit_logits_are_summed_in_float32(examples):
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    for forward in (plain_forward, at_level()):
        pairs = score_pairs(model, collate(examples, (0, 1), 2), forward)
        assert pairs.chosen.dtype == mx.float32
    for i in range(2):
        assert pairs.chosen[i].item() == pytest.approx(naive(model, examples[i].prompt, examples[i].chosen), abs=0.3)


@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bit_weights_compute_in_float32_while_it_lasts(packed):
    """With the weights they have: the same as the model whose weights are those numbers in float32."""
    model, exact = tiny_model("qwen3", hidden_size=64, head_dim=16), tiny_model("qwen3", hidden_size=64, head_dim=16)
    if packed:
        nn.quantize(model, group_size=32, bits=8)
        nn.quantize(exact, group_size=32, bits=8)
    model.set_dtype(mx.bfloat16)
    exact.load_weights(
        [(n, a.astype(mx.float32) if a.dtype == mx.bfloat16 else a) for n, a in tree_flatten(model.parameters())]
    )
    ids, stored = mx.array([[3, 7, 1, 9]]), dict(tree_flatten(model.parameters()))
    assert model(ids).dtype == mx.bfloat16
    with pytest.raises(KeyError, match="inside"), float32_activations(model):
        logits = model(ids)
        assert logits.dtype == mx.float32 and mx.abs(logits - exact(ids)).max() < 1e-4
        raise KeyError("inside")
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == stored.keys() and all(after[n].dtype == a.dtype for n, a in stored.items())
    assert all(mx.array_equal(after[n], a) for n, a in stored.items())


@pytest.mark.parametrize(("kind", "each"), [("cpu", 5e-5), ("metal", 4e-3), ("cuda", 4e-3)])
def test_sums_may_differ_by_four_deviations_of_their_tokens_rounding(kind, each, monkeypatch):
    monkeypatch.setattr(logprobs, "this_machine", lambda: SimpleNamespace(kind=kind))
    assert rounding_tolerance(1) == pytest.approx(4 * each)
    assert rounding_tolerance(np.array([4, 100])) == pytest.approx([8 * each, 40 * each])
    assert rounding_tolerance(9, measured=0.5) == pytest.approx(6) and rounding_tolerance(9, each / 2) < 0.06
