"""What a stage takes of a data set: imitated once, judged once, and beside each judged answer one of another prompt."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import base_tokenizer, chatml_tokenizer

from mlxdpo.config import DataConfig
from mlxdpo.data.dataset import encode_split, read_split
from mlxdpo.data.read import stream_rows
from mlxdpo.data.report import Report
from mlxdpo.data.transforms import DEMONSTRATIONS, END, PAIRS, REWARDED, THUMBS, balance, mismatched, thumbs_with_kl
from mlxdpo.types import Example, Extras, UnpairedExample, UserError

pytestmark = pytest.mark.usefixtures("cache")
RANKED = {"prompt": "q", "completions": ["best", "good", "bad"], "scores": [3, 2, 1]}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(file), eval_fraction=0.0)


def taken(data, take):
    rows, report = stream_rows(data, take.rows)
    return list(rows), report


def encoded(data, take, tokenizer=None, seed=0):
    tokenizer = tokenizer or base_tokenizer()
    return encode_split(read_split(data, seed, take), data, tokenizer, frozenset({tokenizer.eos_token_id}))


def test_a_completion_chosen_in_several_pairs_is_imitated_once(tmp_path):
    rows, report = taken(write(tmp_path / "d.jsonl", [RANKED]), DEMONSTRATIONS)
    assert [(row.prompt, row.completion) for row in rows] == [("q", "best"), ("q", "good")]
    assert (report.read, report.kept, report.refused) == (1, 2, {"duplicate of an earlier row": 1})


def test_a_thumb_down_is_not_imitated_and_counted(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 2 == 0} for n in range(4)]
    kept, report = taken(write(tmp_path / "d.jsonl", rows), DEMONSTRATIONS)
    assert [row.prompt for row in kept] == ["q0", "q2"] and report.refused == {"thumb down": 2}


def test_every_assistant_turn_of_a_conversation_is_imitated_given_what_came_before(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    data = write(tmp_path / "d.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    rows, _ = taken(data, DEMONSTRATIONS)
    assert [(tuple(m.content for m in row.prompt), row.completion[0].content) for row in rows] == [
        (("s", "a"), "b"),
        (("s", "a", "b", "c"), "d"),
    ]


def test_a_demonstration_is_one_row_with_the_prompt_masked(tmp_path):
    """The second completion is the first: one distinct row, whose scored tokens are the completion and its end."""
    data = write(tmp_path / "d.jsonl", [{"prompt": "the user", "completion": "red"}])
    tokenizer = chatml_tokenizer()
    [example] = encoded(data, DEMONSTRATIONS, tokenizer).train
    assert np.array_equal(example.chosen, example.rejected)
    assert tokenizer.decode(example.chosen) == "red<|im_end|>"
    assert tokenizer.decode(example.prompt).endswith("<|im_start|>assistant\n")


def test_pairs_are_two_opinions_and_a_middle_rank_is_both(tmp_path):
    rows, report = taken(write(tmp_path / "d.jsonl", [RANKED]), THUMBS)
    assert {(row.completion, row.desirable) for row in rows} == {
        ("best", True),
        ("good", True),
        ("good", False),
        ("bad", False),
    }
    assert report.changed == {"label that contradicts an earlier row": 1}
    assert report.refused == {"duplicate of an earlier row": 2}


def test_pairs_and_single_answers_are_not_taken_for_each_other(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match=r"d.jsonl:1: a single answer; pairs of two answers are needed \(stage sft"):
        taken(data, PAIRS)


def test_the_same_file_is_kept_apart_for_each_take(tmp_path):
    rows = [{"prompt": f"q{n}:", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    data = write(tmp_path / "d.jsonl", rows)
    sizes = {take.name: len(encoded(data, take).train) for take in (PAIRS, DEMONSTRATIONS, THUMBS, thumbs_with_kl(0))}
    assert sizes == {"pairs": 6, "demonstrations": 6, "thumbs": 12, "thumbs-0": 12}
    pairs, rewarded = encoded(data, PAIRS).train, encoded(data, REWARDED).train
    for plain, longer in zip(pairs, rewarded, strict=True):
        for side in ("chosen", "rejected"):
            assert np.array_equal(np.append(getattr(plain, side), END), getattr(longer, side))
    again = encoded(data, thumbs_with_kl(0)).train
    assert (
        again.digest == encoded(data, thumbs_with_kl(0)).train.digest != encoded(data, thumbs_with_kl(1)).train.digest
    )
    assert [e.extras.desirable for e in again] == [1.0, 0.0] * 6
    assert all(not np.array_equal(e.chosen, e.rejected) for e in again)


def test_prompts_of_opinions_are_held_out_whole(tmp_path):
    rows = [{"prompt": f"q{n % 20}:", "completion": f"answer {n}", "label": n % 3 == 0} for n in range(60)]
    data = write(tmp_path / "d.jsonl", rows).model_copy(update={"eval_fraction": 0.3})
    made = encoded(data, thumbs_with_kl(0))
    prompts = [{e.prompt.tobytes() for e in part} for part in (made.train, made.heldout)]
    assert len(made.train) + len(made.heldout) == 60 and prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def examples_of(prompts):
    ids = lambda *numbers: np.array(numbers, np.int32)  # noqa: E731
    return [
        Example(ids(p + 1), ids(10 + i), ids(10 + i), f"row {i}", Extras(desirable=float(i % 2)))
        for i, p in enumerate(prompts)
    ]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 3))
def test_the_other_completion_is_always_of_another_prompt(prompts, seed):
    """And it is a completion of the data, a function of data and seed, while everything else stays as it was."""
    examples, data = examples_of(prompts), DataConfig()
    if len(set(prompts)) == 1:
        with pytest.raises(UserError, match="row 0: all rows have the same prompt"):
            list(mismatched(examples, data, Report(), seed=seed))
        return
    made, again = (list(mismatched(examples, data, Report(), seed=seed)) for _ in range(2))
    for example, laid, same in zip(examples, made, again, strict=True):
        at = int(laid.rejected[0]) - 10
        assert not np.array_equal(examples[at].prompt, laid.prompt)
        assert laid.prompt is example.prompt and laid.chosen is example.chosen and laid.extras == example.extras
        assert np.array_equal(laid.rejected, same.rejected)


def test_a_lone_held_out_prompt_borrows_from_training():
    examples, others = examples_of([0, 0]), examples_of([0, 3])
    made = list(mismatched(examples, DataConfig(), Report(), others, seed=0))
    assert [int(e.rejected[0]) for e in made] == [11, 11]


def test_where_prompts_differ_every_completion_serves_once():
    """A rotation of a shuffled order, as TRL rotates a batch: the KL term sees each completion exactly once."""
    made = list(mismatched(examples_of(range(30)), DataConfig(), Report(), seed=0))
    assert sorted(int(e.rejected[0]) for e in made) == list(range(10, 40))


def test_a_completion_too_long_behind_its_new_prompt_is_cut_and_counted():
    ids = lambda n: np.arange(1, n + 1, dtype=np.int32)  # noqa: E731
    examples = [Example(ids(6), ids(1), ids(1), "a"), Example(ids(2), ids(6), ids(6), "b")]
    report = Report()
    made = list(mismatched(examples, DataConfig(max_length=8), report, seed=0))
    assert [len(e.rejected) for e in made] == [2, 1]
    assert report.changed == {"completion of another prompt (for the KL term) cut to fit": 1}


@pytest.mark.parametrize(
    ("ups", "downs", "weights", "said"),
    [
        (6, 5, (1, 1), "6 thumbs up and 5 down; with .* they weigh 1.20 to 1$"),
        (4, 8, (1, 1), "they weigh 0.50 to 1; .* 1 to 1.5, as with loss.desirable_weight 2$"),
        (9, 3, (1, 1), "they weigh 3.00 to 1; .* as with loss.undesirable_weight 2$"),
        (9, 3, (1, 2), "they weigh 1.50 to 1$"),
        (3, 0, (1, 1), "3 thumbs up and 0 down: KTO needs both kinds"),
    ],
)
def test_the_balance_of_thumbs(ups, downs, weights, said):
    """By hand: 1 * 6 / (1 * 5) = 1.2; 4/8 = 0.5, doubled it is 1; 9/3 = 3, halved it is 1.5."""
    assert re.search(said, balance(np.array([1.0] * ups + [0.0] * downs), *weights))


def test_opinions_without_a_kl_term_hold_their_completion_twice(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"prompt": "q:", "completion": "a", "label": False}])
    [example] = encoded(data, THUMBS).train
    assert np.array_equal(example.chosen, example.rejected) and example.extras.desirable == 0.0
    assert isinstance(taken(data, THUMBS)[0][0], UnpairedExample)
