"""Rows that branch more than once: each distinct token once, equal to each row alone in value and in gradient."""

import mlx.core as mx
import numpy as np
import pytest
from gradients import apart, gradients, moved
from levels_of import at_level
from slow_cases import rest_slow
from tiny_models import tiny_model
from trajectories import judged_turns, row_by_row, whole_trajectories

from mlxdpo.config import LoraConfig, LossConfig
from mlxdpo.data import batch_shapes
from mlxdpo.data.batch_shapes import batch_size_of, plan_shapes
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples, row_digest
from mlxdpo.forward import packed
from mlxdpo.forward.choose_forward import detailed_fns, forward_fns
from mlxdpo.forward.levels import Level
from mlxdpo.forward.logprobs import plain_forward, score_pairs
from mlxdpo.losses import resolve
from mlxdpo.training.plan import planned_batch
from mlxdpo.training.reference import shared_rows
from mlxdpo.types import Example


def several(seed=0):
    """Judged turns of two trajectories, with two and with three answers each, a pair of whole ones, a plain pair."""
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(1, 300, n).astype(np.int32)  # noqa: E731
    plain = Example(ids(40), ids(5), ids(8), "plain")
    turns = [*judged_turns(draw, 33), *judged_turns(draw, 40, 2, alternatives=2)]
    return [*turns, *whole_trajectories(draw), plain]


def laid_out(examples, spare=0):
    return collate(examples, tuple(range(len(examples))), len(examples) + spare)


def weighted_rows(examples):
    """Row by row, a scalar in which every row counts differently."""
    weight = mx.array(np.random.default_rng(1).normal(size=2 * len(examples)).astype("f"))
    return lambda model: (row_by_row(model, examples) * weight).sum()


def weighted_pairs(examples, forward, batch):
    weight = mx.array(np.random.default_rng(1).normal(size=2 * len(examples)).astype("f")).reshape(-1, 2)

    def total(model):
        pairs = score_pairs(model, batch, forward)
        both = mx.stack([pairs.chosen, pairs.rejected], axis=1)[: len(examples)]
        return (both * weight).sum()

    return total


def trees_of(monkeypatch):
    """Counts the calls of attention over trees."""
    calls, attend = [], packed.tree_attention
    monkeypatch.setattr(packed, "tree_attention", lambda *a: calls.append(a[0].shape) or attend(*a))
    return calls


WAYS = {"fast": at_level(), "checkpoint": at_level(checkpoint=True), "plain": plain_forward}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", rest_slow(["llama", "gemma3_text", "gemma2", "qwen3"], ["llama", "gemma2"]))
def test_equals_each_row_alone(kind, way, monkeypatch):
    """Value and gradient; gemma3 with windows shorter than the rows, gemma2 in padded rows."""
    monkeypatch.setattr(batch_shapes, "tree_is_worth_it", lambda *shapes: True)
    calls = trees_of(monkeypatch)
    model, examples = moved(tiny_model(kind), LoraConfig(rank=4)), several()
    value, wanted = gradients(model, weighted_rows(examples))
    batch = laid_out(examples, spare=2)
    got_value, got = gradients(model, weighted_pairs(examples, WAYS[way], batch))
    assert batch.tree is not None and bool(calls) == (way != "plain" and kind != "gemma2")
    assert got_value == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("worth", [True, False], ids=["trees", "rows"])
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_equals_each_row_alone_with_a_macs_gradients(fake_mac, monkeypatch, worth, way):
    """Gradients of gathers as gathers, in trees and in rows that share tokens."""
    monkeypatch.setattr(batch_shapes, "tree_is_worth_it", lambda *shapes: worth)
    calls = trees_of(monkeypatch)
    model, examples = moved(tiny_model("llama"), LoraConfig(rank=4)), several(1)
    value, wanted = gradients(model, weighted_rows(examples))
    got_value, got = gradients(model, weighted_pairs(examples, WAYS[way], laid_out(examples)))
    assert bool(calls) == (worth and way == "fast")
    assert got_value == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_full_training_too(monkeypatch):
    monkeypatch.setattr(batch_shapes, "tree_is_worth_it", lambda *shapes: True)
    model, examples = moved(tiny_model("llama"), LoraConfig(method="full")), several(2)
    value, wanted = gradients(model, weighted_rows(examples))
    got_value, got = gradients(model, weighted_pairs(examples, at_level(), laid_out(examples)))
    assert got_value == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_each_distinct_token_stands_once_and_is_queried_once(monkeypatch):
    """Eight steps with two answers each: the tokens are those of the tree, not of its sixteen paths."""
    calls = trees_of(monkeypatch)
    monkeypatch.setattr(batch_shapes, "bucket", lambda n: n)
    turn, tool, prompt, steps = 6, 10, 32, 8
    examples = judged_turns(np.random.default_rng(0), prompt, steps, (turn, turn + 1), (tool, tool + 1))
    batch, model = laid_out(examples), tiny_model("llama")
    at_level()(model, batch)
    distinct = prompt + (steps - 1) * (turn + tool) + (turn - 1) + steps * (turn - 1)
    assert (
        len(batch.rest)
        == distinct - batch.prefix.shape[1]
        == batch_size_of(Examples.of(examples), range(8)).distinct - 31
    )
    assert {shape[2] for shape in calls} == {distinct - batch.prefix.shape[1]} and {shape[0] for shape in calls} == {1}
    assert sum(len(e.prompt) + len(side) for e in examples for side in (e.chosen, e.rejected)) > 5 * distinct
    assert batch.length.tolist() == [turn] * 16


def test_planned_shapes_hold_trees_and_change_no_number():
    draw = np.random.default_rng(4)
    examples = [pair for _ in range(6) for pair in judged_turns(draw, int(draw.integers(20, 60)), 3)] + several(5)
    stored, batches = Examples.of(examples), [tuple(range(3 * n, 3 * n + 3)) for n in range(6)]
    shapes, model = plan_shapes(stored, [*batches, (18, 19)], 3, 4), moved(tiny_model("llama"), LoraConfig(rank=4))
    assert any(shape.tree for shape in shapes) and not shapes[-1].tree
    for indices in [*batches, (18, 24, 25), (25,), (0, 24)]:
        batch = collate(stored, indices, 3, shapes=shapes)
        pairs = score_pairs(model, batch, at_level())
        some = [examples[i] for i in indices]
        want = np.array(row_by_row(model, some)).reshape(-1, 2)
        got = np.stack([np.array(pairs.chosen), np.array(pairs.rejected)], axis=1)[: len(some)]
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_only_scored_tokens_count_as_length():
    examples = several(6)
    pairs = score_pairs(tiny_model("llama"), laid_out(examples), at_level())
    assert list(zip(pairs.chosen_len.tolist(), pairs.rejected_len.tolist(), strict=True)) == [
        e.scored for e in examples
    ]
    assert Examples.of(examples).scored.tolist() == [list(e.scored) for e in examples]


def test_the_first_scored_tokens_of_both():
    """LD-DPO counts scored tokens, whatever stands between them."""
    model, examples = tiny_model("llama"), several(7)
    batch = laid_out(examples)
    found = detailed_fns(forward_fns(model)).score(model, batch)
    for i, e in enumerate(examples):
        sides = ((e.chosen, e.chosen_mask), (e.rejected, e.rejected_mask))
        masks = [np.ones(len(ids), bool) if mask is None else mask for ids, mask in sides]
        cut = [mask & (np.cumsum(mask) <= min(e.scored)) for mask in masks]
        same = Example(e.prompt, e.chosen, e.rejected, "", chosen_mask=cut[0], rejected_mask=cut[1])
        np.testing.assert_allclose(found.shared[:, i], row_by_row(model, [same]), atol=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "ipo"])
def test_losses_see_sums_and_lengths_of_scored_tokens(name):
    model, examples = tiny_model("llama"), several(8)
    loss, batch = resolve(LossConfig(name=name)), laid_out(examples)
    got = loss(score_pairs(model, batch, at_level()))
    want = [loss(score_pairs(model, collate([e], (0,), 1), plain_forward))[0].item() for e in examples]
    np.testing.assert_allclose(got[: len(want)], want, rtol=1e-4, atol=1e-5)


def test_a_plan_knows_the_shape_and_the_reference_the_rows():
    """The layout that memory is estimated from is the batch's; a row cut behind its first scored tokens has a name."""
    examples = judged_turns(np.random.default_rng(9), 40, 6) + several(9)
    stored = Examples.of(examples)
    for indices in ((0, 1, 2, 3, 4, 5), (6, 7, len(examples) - 1)):
        layout, batch = planned_batch(stored, indices, Level("packed")).layout, collate(stored, indices, len(indices))
        shape = (*batch.prefix.shape, *batch.rows.shape, len(batch.rest), len(batch.targets))
        assert layout[:6] == shape and layout.tree == (0 if batch.tree is None else batch.tree.order.shape[1])
        assert layout.attended == ((layout.prompts, layout.tree) if layout.tree else (layout.rows, layout.width))
    for example, (*_, chosen, rejected) in zip(examples, shared_rows(examples), strict=True):
        longer = "chosen" if example.scored[0] >= example.scored[1] else "rejected"
        ids, mask = getattr(example, longer), getattr(example, f"{longer}_mask")
        mask = np.ones(len(ids), bool) if mask is None else mask
        end = int(np.flatnonzero(mask)[min(example.scored) - 1]) + 1
        cut = row_digest(example.prompt, ids[:end], None if mask[:end].all() else mask[:end])
        assert cut == (chosen if longer == "chosen" else rejected).tobytes()
