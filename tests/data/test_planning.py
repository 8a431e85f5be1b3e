"""Plans of batches: nothing dropped, nothing twice, the pairs of a prompt together, the same whatever the cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import alone, ranked

from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import outline, plan_epoch, plan_straight, steps_per_epoch
from mlxdpo.types import Example

SIZES, SEEDS, EPOCHS = st.integers(1, 7), st.integers(0, 2**40), st.integers(0, 9)
LENGTHS = st.lists(st.integers(2, 600), min_size=1, max_size=60)
PROMPTS = st.lists(st.tuples(st.integers(2, 600), st.integers(2, 6)), min_size=1, max_size=25)
OUTLINES = LENGTHS.map(alone) | PROMPTS.map(lambda prompts: ranked(*zip(*prompts, strict=True)))


def flat(batches):
    return [i for batch in batches for i in batch]


def rows_of(pairs, batch):
    return set(pairs.rows[list(batch)].ravel().tolist())


@given(OUTLINES, SIZES, SIZES, SEEDS, EPOCHS)
def test_every_pair_exactly_once_per_epoch_and_never_more_rows_than_fit(pairs, size, accumulate, seed, epoch):
    windows = plan_epoch(pairs, size, accumulate, seed, epoch).windows
    straight = plan_straight(pairs, size)
    assert sorted(flat(flat(windows))) == sorted(flat(straight)) == list(range(len(pairs.units)))
    assert all(0 < len(rows_of(pairs, batch)) <= 2 * size for batch in [*flat(windows), *straight])
    assert len(windows) == steps_per_epoch(pairs, size, accumulate)


@given(LENGTHS, SIZES, SIZES, SEEDS, EPOCHS)
def test_windows_of_single_pairs_are_full(lengths, size, accumulate, seed, epoch):
    windows = plan_epoch(alone(lengths), size, accumulate, seed, epoch).windows
    assert all(len(flat(window)) == size * accumulate for window in windows[:-1])
    assert all(1 <= len(batch) <= size for batch in flat(windows))
    assert all(len(window) <= accumulate for window in windows)


@given(OUTLINES, SIZES, SIZES, SEEDS, EPOCHS)
def test_the_pairs_of_a_prompt_are_in_one_window_and_in_one_batch_where_they_fit(pairs, size, accumulate, seed, epoch):
    windows = plan_epoch(pairs, size, accumulate, seed, epoch).windows
    straight = plan_straight(pairs, size)
    for unit in set(pairs.units.tolist()):
        members = set(np.flatnonzero(pairs.units == unit).tolist())
        assert sum(bool(members & set(flat(window))) for window in windows) == 1
        if len(rows_of(pairs, members)) <= 2 * size:
            for plan in (flat(windows), straight):
                assert sum(bool(members & set(batch)) for batch in plan) == 1


@given(PROMPTS, SIZES, SIZES, SEEDS)
def test_windows_hold_as_many_pairs_as_whole_prompts_allow(prompts, size, accumulate, seed):
    pairs, window = ranked(*zip(*prompts, strict=True)), size * accumulate
    most = min(np.bincount(pairs.units).max(), window)
    measure = np.minimum(np.bincount(pairs.units), window)
    windows = plan_epoch(pairs, size, accumulate, seed, 0).windows
    for taken in windows[:-3]:  # the last ones share what is left
        units = {int(pairs.units[i]) for i in flat(taken)}
        assert window - most <= sum(measure[u] for u in units) <= window + most


@given(OUTLINES, SIZES, SIZES, SEEDS, EPOCHS)
def test_windows_depend_only_on_their_size_the_seed_and_the_epoch(pairs, size, accumulate, seed, epoch):
    def windows(size, accumulate, pairs=pairs):
        return [set(flat(window)) for window in plan_epoch(pairs, size, accumulate, seed, epoch).windows]

    cut = windows(size, accumulate)
    assert cut == windows(accumulate, size) == windows(size * accumulate, 1) == windows(1, size * accumulate)
    # lengths only order the pairs inside a window
    assert cut == windows(size, accumulate, pairs._replace(lengths=pairs.lengths[::-1]))


@given(OUTLINES, SIZES, SIZES, st.integers(0, 99), EPOCHS)
def test_plans_are_pure(pairs, size, accumulate, seed, epoch):
    np.random.seed(epoch)
    first = plan_epoch(pairs, size, accumulate, seed, epoch)
    np.random.seed(seed)
    assert plan_epoch(pairs, size, accumulate, seed, epoch) == first


def test_epochs_and_seeds_shuffle_anew():
    orders = {
        tuple(flat(b for w in plan_epoch(alone([5] * 40), 4, 1, seed, epoch).windows for b in w))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len(orders) == 4


def test_shuffles_are_honest():
    """Every pair is as likely in the first window as any other, whatever its length."""
    pairs, first = alone(list(range(2, 42))), np.zeros(40)
    for seed in range(600):
        first[flat(plan_epoch(pairs, 4, 2, seed, 0).windows[0])] += 1
    assert first.sum() == 600 * 8 and abs(first - 120).max() < 5 * (600 * 0.2 * 0.8) ** 0.5


def test_a_plan_is_the_same_on_every_machine():
    # Written down once: a plan that changes breaks the resume of every run begun before.
    assert plan_epoch(alone([9, 3, 7, 5, 8, 2, 6]), 2, 2, seed=3, epoch=1).windows == (
        ((1, 2), (4, 0)),
        ((5, 3), (6,)),
    )
    assert plan_epoch(ranked([9, 3, 7], [3, 2, 3]), 2, 2, seed=3, epoch=1).windows == (((3,), (0, 1, 2)), ((4, 5, 6),))


@given(LENGTHS, SIZES)
def test_straight_plans_begin_with_the_longest_and_group_by_length(lengths, size):
    spans = [[lengths[i] for i in batch] for batch in plan_straight(alone(lengths), size)]
    assert max(spans[0]) == max(lengths)
    assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(spans))


def ids(*numbers):
    return np.array(numbers, np.int32)


def test_outlines_know_prompts_and_rows_by_their_tokens():
    pairs = [
        Example(ids(1, 2), ids(3), ids(4), "a"),
        Example(ids(1), ids(2, 3), ids(4), "b"),  # the same tokens as the first chosen row, cut elsewhere
        Example(ids(1, 2), ids(5), ids(3), "c"),
    ]
    grouped, single = outline(pairs, "prompt"), outline(pairs, "none")
    assert grouped.units.tolist() == [0, 1, 0] and single.units.tolist() == [0, 1, 2]
    assert grouped.rows.tolist() == single.rows.tolist() == [[0, 1], [2, 3], [4, 0]]
    assert grouped.lengths.tolist() == Examples.of(pairs).row_lengths.tolist() == [3, 3, 3]


def test_no_pairs_make_no_batches():
    nothing = outline([], "prompt")
    assert plan_straight(nothing, 4) == [] and plan_epoch(nothing, 4, 1, 0, 0).windows == ()


@pytest.mark.parametrize(("size", "batches"), [(1, 6), (2, 1)])
def test_a_prompt_with_four_completions_costs_four_rows_or_goes_pair_by_pair(size, batches):
    pairs = ranked([9], [4])
    assert len(plan_straight(pairs, size)) == batches
