"""Plans of batches: nothing dropped, nothing twice, the same whatever the cut; collated rows say what is scored."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo.data.batching import bucket, collate, plan_epoch, plan_straight, row_length
from mlxdpo.types import Example

LENGTHS = st.lists(st.integers(2, 600), min_size=1, max_size=60)
SIZES = st.integers(1, 7)
IDS = st.lists(st.integers(1, 99), min_size=1, max_size=70).map(lambda ids: np.array(ids, np.int32))
EXAMPLES = st.lists(st.builds(Example, IDS, IDS, IDS, st.just("here")), min_size=1, max_size=5)


def flat(batches):
    return [i for batch in batches for i in batch]


@given(LENGTHS, SIZES, SIZES, st.integers(0, 2**40), st.integers(0, 9))
def test_every_pair_exactly_once_per_epoch(lengths, size, accumulate, seed, epoch):
    windows = plan_epoch(lengths, size, accumulate, seed, epoch).windows
    assert sorted(flat(batch for window in windows for batch in window)) == list(range(len(lengths)))
    assert sorted(flat(plan_straight(lengths, size))) == list(range(len(lengths)))
    assert all(len(flat(window)) == size * accumulate for window in windows[:-1])
    assert all(1 <= len(batch) <= size for window in windows for batch in window)
    assert all(len(window) <= accumulate for window in windows)


@given(LENGTHS, SIZES, SIZES, st.integers(0, 2**40), st.integers(0, 9))
def test_windows_depend_only_on_their_size_the_seed_and_the_epoch(lengths, size, accumulate, seed, epoch):
    def windows(size, accumulate, lengths=lengths):
        return [set(flat(window)) for window in plan_epoch(lengths, size, accumulate, seed, epoch).windows]

    cut = windows(size, accumulate)
    assert cut == windows(accumulate, size) == windows(size * accumulate, 1) == windows(1, size * accumulate)
    assert cut == windows(size, accumulate, lengths[::-1])  # lengths only order the pairs inside a window


@given(LENGTHS, SIZES, SIZES, st.integers(0, 99), st.integers(0, 9))
def test_plans_are_pure(lengths, size, accumulate, seed, epoch):
    np.random.seed(epoch)
    first = plan_epoch(tuple(lengths), size, accumulate, seed, epoch)
    np.random.seed(seed)
    assert plan_epoch(list(lengths), size, accumulate, seed, epoch) == first


def test_epochs_and_seeds_shuffle_anew():
    orders = {
        tuple(flat(b for w in plan_epoch([5] * 40, 4, 1, seed, epoch).windows for b in w))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len(orders) == 4


def test_a_plan_is_the_same_on_every_machine():
    # Written down once: a plan that changes breaks the resume of every run begun before.
    assert plan_epoch([9, 3, 7, 5, 8, 2, 6], 2, 2, seed=3, epoch=1).windows == (
        ((1, 2), (4, 0)),
        ((5, 3), (6,)),
    )


@given(LENGTHS, SIZES)
def test_straight_plans_begin_with_the_longest_and_group_by_length(lengths, size):
    spans = [[lengths[i] for i in batch] for batch in plan_straight(lengths, size)]
    assert max(spans[0]) == max(lengths)
    assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(spans))


@given(st.integers(1, 10**6))
def test_bucket_rounds_up_monotonically_and_wastes_at_most_a_quarter(length):
    assert bucket(length + 1) >= bucket(length) >= length and bucket(bucket(length)) == bucket(length)
    assert bucket(length) - length < max(32, length / 4)


def test_few_shapes_occur():
    assert sorted({bucket(length) for length in range(1, 257)}) == list(range(32, 257, 32))
    assert len({bucket(length) for length in range(1, 4097)}) <= 8 + 4 * 4
    assert [bucket(length) for length in (1, 32, 33, 256, 257, 1024, 1025)] == [32, 32, 64, 256, 320, 1024, 1280]


@given(EXAMPLES, st.integers(0, 3))
def test_collate_scores_exactly_the_completions(examples, spare):
    size, pairs = len(examples) + spare, tuple(range(len(examples)))
    batch = collate(examples, pairs, size)
    tokens, mask = np.array(batch.tokens), np.array(batch.mask)
    assert tokens.shape[0] == 2 * size and mask.shape == (2 * size, tokens.shape[1] - 1)
    assert tokens.shape[1] == bucket(max(row_length(e) for e in examples))
    for pair in range(size):
        example = examples[pair if pair < len(examples) else 0]
        for row, completion in ((batch.chosen[pair], example.chosen), (batch.rejected[pair], example.rejected)):
            row, end = row.item(), len(example.prompt) + len(completion)
            assert tokens[row, :end].tolist() == [*example.prompt, *completion]
            assert tokens[row, 1:][mask[row] == 1].tolist() == completion.tolist()  # position t predicts token t+1
            assert mask[row].sum() == len(completion) and not tokens[row, end:].any()


@given(EXAMPLES, st.integers(0, 3))
def test_filler_weighs_nothing_and_references_follow_their_rows(examples, spare):
    size, order = len(examples) + spare, tuple(reversed(range(len(examples))))
    ref = np.arange(2 * len(examples), dtype=np.float32).reshape(-1, 2)
    batch = collate(examples, order, size, ref)
    assert batch.weight.tolist() == [1.0] * len(examples) + [0.0] * spare
    own = [*order, *([order[0]] * spare)]
    assert batch.ref[batch.chosen].tolist() == ref[own, 0].tolist()
    assert batch.ref[batch.rejected].tolist() == ref[own, 1].tolist()
    assert collate(examples, order, size).ref.tolist() == [0.0] * 2 * size
    assert sorted([*batch.chosen.tolist(), *batch.rejected.tolist()]) == list(range(2 * size))


@pytest.mark.parametrize("longest", [31, 32, 33])
def test_a_row_that_fills_its_bucket_keeps_its_last_token(longest):
    example = Example(np.array([7], np.int32), np.arange(1, longest, dtype=np.int32), np.array([5], np.int32), "here")
    batch = collate([example], (0,), 1)
    assert batch.tokens.shape[1] == bucket(longest)
    assert batch.mask[0].sum().item() == longest - 1 and batch.mask[0][longest - 2].item() == 1
