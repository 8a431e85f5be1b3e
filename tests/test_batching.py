"""Plans of batches: nothing dropped, nothing twice, the same whatever the cut; collated rows say what is scored."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo.data.batching import bucket, collate, plan_epoch, plan_straight, shared_prefix
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
    assert bucket(length) - length < max(8, length / 4)


def test_few_shapes_occur():
    assert sorted({bucket(length) for length in range(1, 65)}) == list(range(8, 65, 8))
    assert len({bucket(length) for length in range(1, 4097)}) <= 8 + 4 * 6
    assert [bucket(length) for length in (1, 32, 33, 256, 257, 1024, 1025)] == [8, 32, 40, 256, 320, 1024, 1280]


def rows_of(batch):
    """Every row's full tokens and its scored targets, read back from a batch."""
    shared, width = batch.prefix.shape[1], batch.suffix.shape[1]
    full = np.concatenate([np.array(batch.prefix)[np.array(batch.group)], np.array(batch.suffix)], axis=1)
    scored = [[] for _ in full]
    targets, positions, owner = (np.array(a) for a in (batch.targets, batch.positions, batch.owner))
    for target, position, row in zip(
        *(a[np.array(batch.scored) == 1] for a in (targets, positions, owner)), strict=True
    ):
        assert position // width == row
        scored[row].append((shared + int(position) % width, int(target)))
    return full, scored


@given(EXAMPLES, st.integers(0, 3))
def test_collate_scores_exactly_the_completions(examples, spare):
    size, pairs = len(examples) + spare, tuple(range(len(examples)))
    batch = collate(examples, pairs, size)
    full, scored = rows_of(batch)
    assert len({(e.prompt.tobytes(), c.tobytes()) for e in examples for c in (e.chosen, e.rejected)}) == len(full)
    for pair in range(size):
        example = examples[pair if pair < len(examples) else 0]
        for row, completion in ((batch.chosen[pair], example.chosen), (batch.rejected[pair], example.rejected)):
            ids, row = [*example.prompt.tolist(), *completion.tolist()], row.item()
            assert full[row, : len(ids) - 1].tolist() == ids[:-1]
            # position t predicts token t+1, from the prompt's last token on
            assert scored[row] == [(t - 1, ids[t]) for t in range(len(example.prompt), len(ids))]
            assert batch.length[row].item() == len(completion)


@given(EXAMPLES)
def test_rows_of_a_prompt_are_adjacent_and_share_its_beginning(examples):
    batch = collate(examples, tuple(range(len(examples))), len(examples))
    group = np.array(batch.group)
    assert group.tolist() == sorted(group) and set(group) == set(range(batch.prefix.shape[0]))
    assert batch.per_prompt == (len(group) // (group.max() + 1) if len(set(np.bincount(group))) == 1 else 0)
    assert batch.prefix.shape[1] == shared_prefix(min(len(e.prompt) for e in examples))


def test_the_shared_prefix_leaves_each_row_a_token_of_the_prompt():
    assert [shared_prefix(n) for n in (1, 31, 32, 33, 64, 255, 256)] == [0, 0, 31, 31, 63, 223, 255]


def test_four_ranked_completions_are_four_rows_and_six_pairs():
    prompt, answers = np.arange(1, 40, dtype=np.int32), [np.full(n, n, np.int32) for n in (3, 4, 5, 6)]
    pairs = [Example(prompt, a, b, "here") for i, a in enumerate(answers) for b in answers[i + 1 :]]
    batch = collate(pairs, tuple(range(6)), 8)
    assert batch.suffix.shape[0] == 4 and batch.prefix.shape == (1, 31) and batch.per_prompt == 4
    assert batch.chosen.tolist() == [0, 0, 0, 1, 1, 2, 0, 0] and batch.rejected.tolist() == [1, 2, 3, 2, 3, 3, 1, 1]
    assert batch.weight.tolist() == [1] * 6 + [0] * 2


@given(EXAMPLES, st.integers(0, 3))
def test_filler_weighs_nothing_and_references_follow_their_rows(examples, spare):
    size, order = len(examples) + spare, tuple(reversed(range(len(examples))))
    names = {}
    for e in examples:
        for c in (e.chosen, e.rejected):
            names.setdefault((e.prompt.tobytes(), c.tobytes()), float(len(names)))
    ref = np.array([[names[e.prompt.tobytes(), c.tobytes()] for c in (e.chosen, e.rejected)] for e in examples], "f")
    batch = collate(examples, order, size, ref)
    assert batch.weight.tolist() == [1.0] * len(examples) + [0.0] * spare
    own = [*order, *([order[0]] * spare)]
    assert batch.ref[batch.chosen].tolist() == ref[own, 0].tolist()
    assert batch.ref[batch.rejected].tolist() == ref[own, 1].tolist()
    assert not collate(examples, order, size).ref.any()


@pytest.mark.parametrize("longest", [31, 32, 33])
def test_a_row_that_fills_its_bucket_keeps_its_last_token(longest):
    example = Example(np.array([7], np.int32), np.arange(1, longest, dtype=np.int32), np.array([5], np.int32), "here")
    batch = collate([example], (0,), 1)
    assert batch.suffix.shape[1] == bucket(longest - 1)  # the last token is a target only
    assert rows_of(batch)[1][0][-1] == (longest - 2, longest - 1)
