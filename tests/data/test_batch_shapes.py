"""Shapes of batches: few where asked for, wasting little, the same numbers in any of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levels_of import at_level
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.data.batch_shapes import (
    BatchShape,
    batch_shapes_for,
    batch_size_of,
    choose_shape,
    cut_points,
    plan_shapes,
    shape_for,
)
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import outline, plan_epoch, plan_straight
from mlxdpo.forward.logprobs import plain_forward
from mlxdpo.model.adapters import attach_lora
from mlxdpo.types import Example


def real_lengths(count, seed, ranked=1):
    """Pairs whose lengths spread as those of real text; `ranked` answers more than two a prompt."""
    draw = np.random.default_rng(seed)

    def ids(mean):
        return draw.integers(1, 300, int(np.clip(draw.lognormal(np.log(mean), 0.7), 1, 400))).astype(np.int32)

    pairs = []
    for number in range(count):
        prompt, answers = ids(60), [ids(40) for _ in range(1 + ranked)]
        pairs += [Example(prompt, a, b, str(number)) for a, b in itertools.combinations(answers, 2) if len(a) != len(b)]
    return Examples.of(pairs)


def epochs(examples, size, count):
    pairs = outline(examples, "prompt")
    for epoch in range(count):
        yield [batch for window in plan_epoch(pairs, size, 2, 0, epoch).windows for batch in window]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9), st.data())
def test_no_rows_are_narrower_than_metals_attention_can_differentiate(lengths, data):
    """Two hundred small data sets of short answers, with planned shapes and without."""
    size, limit = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    draw = np.random.default_rng(0)
    ids = [[draw.integers(1, 300, n).astype(np.int32) for n in row] for row in lengths]
    examples = Examples.of([Example(*row, where=str(i)) for i, row in enumerate(ids)])
    batches = plan_straight(outline(examples, "prompt"), size)
    for shapes in ((), plan_shapes(examples, batches, size, limit)):
        for indices in batches:
            batch = collate(examples, indices, size, shapes=shapes)
            assert batch.suffix.shape[1] >= 16 and (batch.prefix.shape[1] == 0 or batch.prefix.shape[1] >= 16)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 6), st.integers(2, 12))
def test_every_batch_of_every_epoch_has_one_of_a_few_shapes(seed, ranked, size, limit):
    examples = real_lengths(30, seed, ranked)
    first, *later = epochs(examples, size, 4)
    frames = plan_shapes(examples, first, size, limit)
    assert len(frames) <= limit
    for indices in itertools.chain(first, *later, plan_straight(outline(examples, "prompt"), size)):
        need = batch_size_of(examples, indices)
        frame = choose_shape(need, frames, size)
        assert frame in frames and frame.holds(need)


def shapes_of(batch):
    tree = 0 if batch.tree is None else batch.tree.order.shape[1]
    return (*batch.prefix.shape, *batch.rows.shape, len(batch.rest), len(batch.targets), len(batch.weight), tree)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 3))
def test_the_batch_has_the_shape_of_its_frame(seed, ranked):
    examples = real_lengths(12, seed, ranked)
    (first,) = epochs(examples, 3, 1)
    for frames, indices in itertools.product(((), plan_shapes(examples, first, 3, 3)), first):
        frame = choose_shape(batch_size_of(examples, indices), frames, 3)
        batch = collate(examples, indices, 3, shapes=frames)
        assert shapes_of(batch) == tuple(frame)
        assert batch.place.shape == batch.home.shape == (frame.rest,) and batch.group.shape == (frame.rows,)


def test_a_frame_changes_no_number():
    examples, model = real_lengths(8, 1, 2), tiny_model("llama")
    attach_lora(model, LoraConfig(rank=4), 0)
    (batches,) = epochs(examples, 3, 1)
    frames = plan_shapes(examples, batches, 3, 2)
    for indices in batches:
        alone, framed = collate(examples, indices, 3), collate(examples, indices, 3, shapes=frames)
        for forward in (plain_forward, at_level()):
            want, got = (np.array(forward(model, b))[np.array(b.chosen)] for b in (alone, framed))
            count = min(len(want), len(got))
            np.testing.assert_allclose(got[:count], want[:count], rtol=1e-6, atol=1e-4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 5))
def test_cuts_waste_as_little_as_any(sizes, count):
    sizes = np.sort(sizes)

    def waste(ends):
        return sum((b - a) * sizes[b - 1] - sizes[a:b].sum() for a, b in itertools.pairwise([0, *ends]))

    ends = cut_points(sizes, count)
    assert ends == sorted(set(ends)) and ends[-1] == len(sizes) and len(ends) <= count
    ways = ([*inner, len(sizes)] for k in range(count) for inner in itertools.combinations(range(1, len(sizes)), k))
    assert waste(ends) == min(map(waste, ways))


def test_many_sizes_are_cut_at_evenly_spread_places():
    ends = cut_points(np.sort(np.random.default_rng(0).integers(1, 2000, 5000)), 8)
    assert len(ends) == 8 and ends[-1] == 5000


def test_pairs_that_contradict_each_other_fit_too():
    """Every ordered pair of a prompt's answers: more pairs than two of its rows are chosen in."""
    prompt, answers = np.arange(1, 9, dtype=np.int32), [np.full(n, n, np.int32) for n in (3, 4, 5, 6, 7, 8)]
    examples = Examples.of([Example(prompt, a, b, "") for a, b in itertools.permutations(answers, 2)])
    (batches,) = epochs(examples, 3, 1)
    assert batches == [tuple(range(30))]
    alone = plan_shapes(examples, [(0,)], 3, 2)  # as if the first epoch had held only small batches
    assert choose_shape(batch_size_of(examples, batches[0]), alone, 3).pairs >= 30


def test_a_few_frames_waste_little():
    examples = real_lengths(600, 3)
    (batches,) = epochs(examples, 4, 1)
    needs = [batch_size_of(examples, indices) for indices in batches]
    frames = plan_shapes(examples, batches, 4, 24)
    computed = sum(choose_shape(need, frames, 4).tokens for need in needs)
    assert computed < 1.08 * sum(shape_for([need], 4).tokens for need in needs)


def test_nothing_is_compiled_on_a_cpu(monkeypatch):
    examples = real_lengths(9, 0)
    (batches,) = epochs(examples, 3, 1)
    monkeypatch.setattr("mlxdpo.data.batch_shapes.most_traces", lambda: None)
    assert batch_shapes_for(examples, batches, 3) == ()
    monkeypatch.setattr("mlxdpo.data.batch_shapes.most_traces", lambda: 4)
    assert 1 < len(batch_shapes_for(examples, batches, 3)) <= 4 and batch_shapes_for(Examples.of([]), [], 3) == ()


def test_a_batch_that_no_frame_holds_is_an_error():
    examples = real_lengths(3, 0)
    with pytest.raises(ValueError, match="no shape holds a batch of BatchSize"):
        choose_shape(batch_size_of(examples, (0, 1, 2)), [BatchShape(1, 0, 2, 8, 8, 8, 1)], 3)
