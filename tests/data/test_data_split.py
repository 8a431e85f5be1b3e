"""The split by prompt: nothing lost, no prompt on both sides, and stable when rows are appended or reordered."""

import random

from hypothesis import given
from hypothesis import strategies as st

from mlxdpo.data.read import prompt_key, prompts_in_both, split_heldout
from mlxdpo.types import Message, Preference


def preferences(prompts):
    return [Preference(prompt, "Good.", f"Bad {n}.", f"x:{n}") for n, prompt in enumerate(prompts)]


PROMPTS = st.lists(st.text("ab \n", max_size=4), max_size=30)


@given(PROMPTS, st.floats(0, 0.99), st.integers(0, 9))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(prompts, fraction, seed):
    rows = preferences(prompts)
    train, heldout = split_heldout(rows, fraction, seed)
    assert sorted([*train, *heldout], key=lambda row: int(row.where[2:])) == rows
    assert prompts_in_both(train, heldout) == 0
    if len({prompt_key(row.prompt) for row in rows}) > 1 and fraction > 0:
        assert train and heldout
    elif rows:
        assert train and not heldout


@given(PROMPTS, st.randoms(use_true_random=False))
def test_order_does_not_matter(prompts, rng: random.Random):
    rows = preferences(prompts)
    shuffled = rng.sample(rows, len(rows))
    kept = {row.where for row in split_heldout(rows, 0.3, 0)[1]}
    assert {row.where for row in split_heldout(shuffled, 0.3, 0)[1]} == kept


def test_appended_rows_move_no_earlier_row():
    rows = preferences(f"prompt {n}" for n in range(400))
    before = {row.where for row in split_heldout(rows[:200], 0.1, 0)[1]}
    after = {row.where for row in split_heldout(rows, 0.1, 0)[1]}
    assert before == {where for where in after if int(where[2:]) < 200}


def test_the_fraction_is_of_prompts_and_the_seed_draws_another():
    """2,000 prompts at 0.1: standard deviation sqrt(2000 * 0.1 * 0.9) = 13.4, so 200 +- 60 is 4.5 of them."""
    rows = preferences(f"prompt {n}" for n in range(2000))
    sides = [{row.where for row in split_heldout(rows, 0.1, seed)[1]} for seed in (0, 1)]
    assert all(140 <= len(side) <= 260 for side in sides)
    assert len(sides[0] & sides[1]) <= 50  # 20 expected of independent draws


def test_same_words_are_the_same_prompt():
    assert prompt_key("Hi  there") == prompt_key("Hi there\n") == prompt_key((Message("user", "Hi there"),))
    assert prompt_key("Hi there") != prompt_key((Message("system", "Hi there"),))
    assert prompt_key("Hi there") != prompt_key("hi there")
    assert prompts_in_both(preferences(["a", "a", "b", "c"]), preferences(["a ", "c", "d"])) == 2
