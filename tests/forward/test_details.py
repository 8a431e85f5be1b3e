"""What modifiers ask of a model beside summed log-probs: beginnings of completions, and how concentrated it is."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from levels_of import details_at
from mlx.utils import tree_flatten
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig, LossConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import row_digest
from mlxdpo.forward.choose_forward import PLAIN_FORWARD, detailed_fns, forward_fns
from mlxdpo.forward.logprobs import next_token_logps, plain_details, score_pairs
from mlxdpo.losses import resolve
from mlxdpo.model.adapters import attach_lora
from mlxdpo.training.reference import shared_rows, with_reference
from mlxdpo.training.step import make_scorer
from mlxdpo.types import Example, Extras

KINDS = ["llama", "gemma2", "qwen3"]  # tied; capped; a head of its own


def moved(kind, method="lora"):
    model = attach_lora(tiny_model(kind), LoraConfig(method=method, rank=2, scale=1.0))
    mx.random.seed(3)
    arrays = tree_flatten(model.trainable_parameters())
    model.load_weights([(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in arrays], strict=False)
    return model


def examples(count=5, seed=2):
    """The third and fourth pair share a prompt and their chosen completion, which so is cut at two lengths."""
    draw = np.random.default_rng(seed)
    ids = lambda low=2, high=12: draw.integers(1, 300, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    rows = [Example(ids(), ids(), ids(), f"row {i}", Extras(weight=float(i))) for i in range(count)]
    shared = Example(rows[2].prompt, np.arange(5, 14).astype(np.int32), ids(3, 4), "2")
    return [*rows[:2], shared, Example(rows[2].prompt, shared.chosen, ids(6, 7), "3"), *rows[4:]]


def by_hand(model, example, side):
    """Float64 log-probs of a completion's tokens, and log sum_v p_v^2 before each, from the model's own logits."""
    completion = getattr(example, side)
    tokens = mx.array(np.concatenate([example.prompt, completion]))[None]
    logits = np.array(model(tokens[:, :-1]).astype(mx.float32), np.float64)[0, len(example.prompt) - 1 :]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logp[np.arange(len(completion)), completion], np.logaddexp.reduce(2 * logp, axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_details_of_every_way_are_those_by_hand(kind):
    model, pairs = moved(kind), examples()
    batch = collate(pairs, tuple(range(len(pairs))), len(pairs) + 2)
    ways = [plain_details, details_at(), details_at(checkpoint=True), detailed_fns(forward_fns(model)).score]
    for way in ways:
        found = score_pairs(model, batch, way)
        for side, name in enumerate(("chosen", "rejected")):
            for i, example in enumerate(pairs):
                logps, squares = by_hand(model, example, name)
                shorter = min(len(example.chosen), len(example.rejected))
                assert found.shared[side, i].item() == pytest.approx(logps[:shorter].sum(), abs=2e-4)
                assert getattr(found, name)[i].item() == pytest.approx(logps.sum(), abs=2e-4)
                assert found.squares[side, i].item() == pytest.approx(squares.sum(), abs=2e-4)
    whole = found.chosen_len <= found.rejected_len
    assert mx.where(whole, found.shared[0] == found.chosen, True).all().item()  # to the bit
    assert next_token_logps(model, mx.array([[1, 2, 3]])).shape == (1, 2)


def test_a_uniform_model_is_as_concentrated_as_its_vocabulary_is_large():
    model = tiny_model()
    model.model.norm.weight = mx.zeros_like(model.model.norm.weight)
    pairs = examples()
    found = score_pairs(model, collate(pairs, (0, 1), 2), detailed_fns(forward_fns(model)).score)
    assert found.squares[0].tolist() == pytest.approx([-math.log(300) * len(e.chosen) for e in pairs[:2]], rel=1e-5)
    # Each token is exactly as likely as the policy's own are on average: WPO's weight is 1.
    weighed, plain = (resolve(LossConfig(wpo=wpo))(found).tolist() for wpo in (True, False))
    assert weighed == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("knobs", [{"ld_alpha": 0.3}, {"wpo": True}, {"ld_alpha": 0.0, "wpo": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_model_equal_finite_differences(kind, knobs):
    """WPO's weights are held still: only what has a gradient may move."""
    model, pairs, loss = moved(kind), examples(), resolve(LossConfig(beta=0.2, **knobs))
    draw = np.random.default_rng(0)
    ref = draw.normal(-30, 3, (len(pairs), 4)).astype("f")
    batch = collate(pairs, tuple(range(len(pairs))), len(pairs), ref)
    frozen = score_pairs(model, batch, plain_details).squares

    def total(model, way, still=None):
        found = score_pairs(model, batch, way)
        if still is not None:
            weights = resolve(LossConfig(beta=0.2, **knobs | {"wpo": False}))(found)
            return (weights * still).sum()
        return loss(found).sum()

    _, got = nn.value_and_grad(model, lambda m: total(m, details_at()))(model)
    base = score_pairs(model, batch, plain_details)
    w = mx.exp((base.chosen - frozen[0]) / base.chosen_len + (base.rejected - frozen[1]) / base.rejected_len)
    still = w if knobs.get("wpo") else mx.ones(len(pairs))
    _, wanted = nn.value_and_grad(model, lambda m: total(m, plain_details, still))(model)
    got, wanted = dict(tree_flatten(got)), dict(tree_flatten(wanted))
    for name in wanted:
        scale = mx.abs(wanted[name]).max().item()
        assert mx.abs(got[name] - wanted[name]).max().item() < 2e-4 * scale, name
    start = dict(tree_flatten(model.trainable_parameters()))
    direction = {n: mx.array(draw.normal(size=a.shape).astype("f")) for n, a in start.items()}
    values = []
    for sign in (1, -1):
        model.load_weights([(n, a + sign * 1e-3 * direction[n]) for n, a in start.items()], strict=False)
        values.append(total(model, plain_details, still).item())
    slope = sum((got[n] * direction[n]).sum().item() for n in start)
    size = math.sqrt(sum((g * g).sum().item() for g in got.values()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=0.03, abs=0.03 * size)


def test_full_fine_tuning_has_squares_too():
    model = attach_lora(tiny_model("qwen3"), LoraConfig(method="full"))
    pairs = examples()
    batch = collate(pairs, (0, 1), 2)
    plain, fast = (score_pairs(model, batch, way) for way in (plain_details, details_at()))
    assert np.array(fast.squares) == pytest.approx(np.array(plain.squares), abs=1e-3)


def test_the_reference_of_beginnings_is_kept_under_the_rows_that_end_there(cache):
    model, pairs = tiny_model(), examples()
    rows, batches = shared_rows(pairs), [(0, 1), (2, 3), (4,)]
    assert rows.shape == (5, 4, 16)
    for i, e in enumerate(pairs):
        shorter = min(len(e.chosen), len(e.rejected))
        assert rows[i, 2].tobytes() == row_digest(e.prompt, e.chosen[:shorter])
        assert rows[i, 3].tobytes() == row_digest(e.prompt, e.rejected[:shorter])
    calls = []
    scorer = make_scorer(model, detailed_fns(forward_fns(model)).score)
    counted = lambda batch: calls.append(1) or scorer(batch)  # noqa: E731
    *_, (_, ref) = with_reference(pairs, counted, {"a": 1}, batches, 2, rows=rows)
    for i, e in enumerate(pairs):
        for side, name in enumerate(("chosen", "rejected")):
            logps, _ = by_hand(model, e, name)
            shorter = min(len(e.chosen), len(e.rejected))
            assert ref[i, side] == pytest.approx(logps.sum(), abs=2e-4)
            assert ref[i, 2 + side] == pytest.approx(logps[:shorter].sum(), abs=2e-4)
    assert len(calls) == 3
    *_, (_, again) = with_reference(pairs, counted, {"a": 1}, batches, 2, rows=rows)
    *_, (_, summed) = with_reference(pairs, counted, {"a": 1}, batches, 2)
    assert len(calls) == 3 and (again == ref).all() and (summed == ref[:, :2]).all()


def test_the_plain_way_has_details():
    assert detailed_fns(PLAIN_FORWARD).score is plain_details
