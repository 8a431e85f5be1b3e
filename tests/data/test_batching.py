"""Collated rows say what is scored, and only that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo.data.batch_shapes import bucket, row_width, shared_prefix
from mlxdpo.data.batching import collate
from mlxdpo.types import Example

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=70).map(lambda ids: np.array(ids, np.int32))
EXAMPLES = st.lists(st.builds(Example, IDS, IDS, IDS, st.just("here")), min_size=1, max_size=5)


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
    shared = batch.prefix.shape[1]
    full = np.concatenate([np.array(batch.prefix)[np.array(batch.group)], np.array(batch.suffix)], axis=1)
    scored = [[] for _ in full]
    targets, positions, owner = (np.array(a) for a in (batch.targets, batch.positions, batch.owner))
    for target, position, row in zip(
        *(a[np.array(batch.scored) == 1] for a in (targets, positions, owner)), strict=True
    ):
        scored[row].append((shared + batch.rows[row].tolist().index(position), int(target)))
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
def test_each_distinct_token_stands_once(examples):
    batch = collate(examples, tuple(range(len(examples))), len(examples))
    rows, home, place = (np.array(a) for a in (batch.rows, batch.home, batch.place))
    shared, used = batch.prefix.shape[1], []
    for pair, example in enumerate(examples):
        for row, completion in ((batch.chosen[pair], example.chosen), (batch.rejected[pair], example.rejected)):
            own = rows[row.item(), : len(example.prompt) - shared + len(completion) - 1].tolist()
            assert place[own].tolist() == list(range(shared, shared + len(own)))
            used += own
    prompts = {e.prompt.tobytes(): len(e.prompt) - shared for e in examples}
    completions = {(e.prompt.tobytes(), c.tobytes()): len(c) - 1 for e in examples for c in (e.chosen, e.rejected)}
    count = sum(prompts.values()) + sum(completions.values())
    assert sorted(set(used)) == list(range(count)) and len(batch.rest) == bucket(count)
    assert rows.ravel()[home[:count]].tolist() == list(range(count))


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


def test_more_pairs_than_the_batch_size_are_filled_to_a_bucket():
    prompt = np.arange(1, 9, dtype=np.int32)
    pairs = [Example(prompt, np.full(n + 1, n, np.int32), np.array([3], np.int32), "here") for n in range(5, 14)]
    batch = collate(pairs, tuple(range(9)), 4)
    assert batch.weight.tolist() == [1] * 9 + [0] * 7 and batch.suffix.shape[0] == 10


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
    assert batch.suffix.shape[1] == row_width(longest - 1)  # the last token is a target only
    assert rows_of(batch)[1][0][-1] == (longest - 2, longest - 1)
