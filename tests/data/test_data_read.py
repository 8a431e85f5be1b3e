"""From files to preferences: detection, renaming, policy, counts, the split by prompt; nothing else than UserError."""

import json
import shlex

import pytest
from row_shapes import FIXTURES, turns

from mlxdpo.cli import run
from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.formats import FORMATS
from mlxdpo.data.read import (
    heldout_source,
    read_preferences,
    unpaired,
)
from mlxdpo.types import Message, Preference, UnpairedExample, UserError

PAIR = FIXTURES["text"][0]


def pair(n, **changed):
    return {"prompt": f"p{n}", "chosen": "Good.", "rejected": "Bad."} | changed


@pytest.fixture
def read(tmp_path):
    """Write rows (objects, or raw lines) to pairs.jsonl and read them."""

    def reader(rows, **options):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return read_preferences(DataConfig(path=str(tmp_path / "pairs.jsonl"), **options))

    return reader


def sentence(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_shape_is_read_from_a_file(read, name):
    rows, report = read(FIXTURES[name])
    assert (len(rows), report.read, report.kept, report.format) == (1, len(FIXTURES[name]), 1, name)
    assert not report.refused
    assert rows[0].where == "pairs.jsonl:1"


STOP = "; fix the row, or set data.on_bad_row to skip"


def test_the_first_bad_row_stops_with_its_line(read):
    said = sentence(read, [pair(1), pair(2, chosen=[1, 2]), pair(3)])
    assert said == f'pairs.jsonl:2: "chosen" is a list of numbers; expected text{STOP}'


def test_a_bad_first_row_is_judged_by_the_shape_of_the_later_ones(read):
    rows = [pair(1, chosen=True), b"{", pair(2)]
    assert sentence(read, rows) == f'pairs.jsonl:1: "chosen" is a Boolean; expected text{STOP}'
    kept, report = read(rows, on_bad_row="skip")
    assert [row.prompt for row in kept] == ["p2"]
    assert report.refused == {reasons.WRONG_TYPE: 1, reasons.MALFORMED: 1}


def test_a_later_row_of_another_shape_is_a_bad_row_not_a_new_detection(read):
    rows = [pair(1), FIXTURES["implicit"][0]]
    said = sentence(read, rows)
    assert said == f'pairs.jsonl:2: "prompt" is missing; the row has the columns chosen, rejected{STOP}'


def test_skipped_rows_are_counted_by_reason_with_the_first_as_example(read):
    dirty = [pair(2, chosen=""), pair(3, chosen=None), pair(4, rejected=" "), b'{"prompt": "\xff"}', [1], {"x": 1}]
    kept, report = read([pair(1), *dirty], on_bad_row="skip")
    assert (report.read, report.kept, len(kept)) == (7, 1, 1)
    assert report.refused == {
        reasons.EMPTY_COMPLETION: 2,
        reasons.WRONG_TYPE: 1,
        reasons.INVALID_UTF8: 1,
        reasons.NOT_OBJECT: 1,
        reasons.MISSING_COLUMN: 1,
    }
    assert report.first[reasons.EMPTY_COMPLETION] == 'pairs.jsonl:2: "chosen" is empty; expected a completion'


def test_rows_without_a_preference_never_stop_but_are_counted(read):
    rows = [
        pair(1),
        pair(1),
        pair(2, rejected="Good."),
        pair(3, score_chosen=1, score_rejected=1),
        pair(4, rejected="Worse."),
    ]
    kept, report = read(rows)
    assert [row.prompt for row in kept] == ["p1", "p4"]
    assert report.refused == {reasons.DUPLICATE: 1, reasons.IDENTICAL: 1, reasons.TIED: 1}
    assert report.first[reasons.DUPLICATE] == "pairs.jsonl:2: the same pair as in an earlier row"


def test_same_completions_for_another_prompt_or_other_tools_are_no_duplicates(read):
    kept, _ = read([pair(1), pair(2), pair(1, tools=[{"name": "f"}])])
    assert len(kept) == 3


def test_contradicting_labels_are_kept_and_counted(read):
    kept, report = read([pair(1), pair(1, chosen="Bad.", rejected="Good.")])
    assert len(kept) == 2 and report.changed == {reasons.CONTRADICTION: 1}
    assert report.first[reasons.CONTRADICTION] == "pairs.jsonl:2"
    opinion = FIXTURES["unpaired"][0]
    kept, report = read([opinion, opinion, opinion | {"label": False}])
    assert [row.desirable for row in kept] == [True, False]
    assert (report.refused, report.changed) == ({reasons.DUPLICATE: 1}, {reasons.CONTRADICTION: 1})


def test_ratings_are_paired_with_their_neighbours_of_the_same_prompt(read):
    def rated(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness}

    rows = [rated("a", "x", 1), rated("a", "y", 3), rated("b", "x", 2), rated("b", "y", 2), rated("c", "x", 1)]
    kept, report = read(rows, on_bad_row="skip")
    assert [(row.chosen[0].content, row.rejected[0].content, row.where) for row in kept] == [
        ("y", "x", "pairs.jsonl:1")
    ]
    assert (report.read, report.refused) == (5, {reasons.TIED: 2, reasons.LONE: 1})


def test_columns_are_renamed_even_swapped(read):
    rows = [{"q": "Hi?", "chosen": "Bad.", "rejected": "Good.", "note": 1}]
    columns = {"prompt": "q", "chosen": "rejected", "rejected": "chosen"}
    [row], report = read(rows, columns=columns)
    assert (row.prompt, row.chosen, row.rejected, row.columns) == ("Hi?", "Good.", "Bad.", {"note": 1})
    assert report.format == "text"
    said = sentence(read, [{"x": 1}], columns={"prompt": "q"})
    start = 'pairs.jsonl:1: "q" (from data.columns) is missing; the row has the columns x; '
    assert said == start + "no readable row among the first 1"


def test_messages_in_json_text_are_messages(read):
    rows = [{k: json.dumps(v) for k, v in FIXTURES["implicit"][0].items()}]
    [row], report = read(rows)
    assert (report.format, row.prompt) == ("implicit", (Message("user", "Hi?"),))


def test_a_named_format_is_not_detected(read):
    rows = [{"prompt": "Other?"} | FIXTURES["implicit"][0]]
    assert sentence(read, rows) == (
        'pairs.jsonl:1: "prompt" is in none of the shared turns of "chosen" and "rejected"; '
        f"set data.format to implicit if the turns are right{STOP}"
    )
    [row], report = read(rows, format="implicit")
    assert (report.format, row.prompt) == ("implicit", (Message("user", "Hi?"),))
    said = sentence(read, rows, format="textt")
    assert said == "data.format 'textt' is not a known row shape; did you mean text?"


REMEDIES = [  # rows of other names, and what is said of them
    ({"question": "Hi?", "good": "a", "bad": "b"}, "prompt question", "chosen good", "rejected bad"),
    (
        {"id": 1, "the bad one": "b", "ask it": "Hi?", "good's": "a"},
        "prompt 'ask it'",
        "chosen " + shlex.quote("good's"),
        "rejected 'the bad one'",
    ),
    ({"x": "Hi?", "y": "a", "z": "b"}, "prompt x", "chosen y", "rejected z"),
    ({"Prompt": turns("Hi?"), "win": "a", "lose": "b"}, "prompt Prompt", "chosen win", "rejected lose"),
    ({"-q": "Hi?", "chosen": "a", "rejected": "b"}, "prompt=-q"),
]


@pytest.mark.parametrize(("row", "options"), [(row, options) for row, *options in REMEDIES])
def test_the_remedy_for_unknown_columns_is_a_command_that_works(tmp_path, capsys, row, options):
    file = tmp_path / "my pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    said = sentence(read_preferences, DataConfig(path=str(file)))
    named = " ".join(f"--data.columns.{option}" for option in options)
    command = f"mlxdpo data check '{file}' {named}" if len(str(file)) < 150 else f"mlxdpo data check FILE {named}"
    assert command in said
    assert run(shlex.split(command)[1:]) == 0
    assert "1 pair from 1 row" in capsys.readouterr().out


def test_what_cannot_be_named_as_a_pair_is_told_what_a_pair_needs(read):
    assert sentence(read, [{"q": "Hi?", "a": "Ho."}]) == (
        "pairs.jsonl:1: the columns q (text), a (text) match no known row shape; a pair needs a prompt, a chosen and a "
        "rejected answer; `mlxdpo data formats` lists all shapes"
    )


def test_a_misnamed_prompt_is_never_an_empty_prompt(read):
    assert "no known row shape" in sentence(read, [{"Prompt": "Hi?", "chosen": "a", "rejected": "b"}])


def test_no_usable_row_is_an_error(read, tmp_path):
    said = sentence(read, [pair(1, chosen=""), pair(2, chosen="")], on_bad_row="skip")
    assert said == (
        f"{tmp_path}/pairs.jsonl: none of its 2 rows can be used; "
        'the first says: pairs.jsonl:1: "chosen" is empty; expected a completion'
    )
    said = sentence(read, [b"{", b"}"], on_bad_row="skip")
    assert said.startswith("pairs.jsonl:1: not valid JSON (") and said.endswith("no readable row among the first 2")
    assert sentence(read, [b""]) == f"{tmp_path}/pairs.jsonl: holds no rows; expected at least one"


def test_path_and_split_default_to_the_configuration(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(pair(name)))
    data = DataConfig(path=str(tmp_path))
    assert read_preferences(data)[0][0].prompt == "ptrain"
    assert read_preferences(data, split="test")[0][0].prompt == "ptest"
    assert read_preferences(data, str(tmp_path / "test.jsonl"))[0][0].prompt == "ptest"


def test_where_the_heldout_pairs_are(tmp_path):
    (tmp_path / "held").mkdir()
    held, folder = str(tmp_path / "held"), str(tmp_path)
    assert heldout_source(DataConfig(path="o/n")) is None
    assert heldout_source(DataConfig(path="o/n", eval="test_prefs")) == ("o/n", "test_prefs")
    assert heldout_source(DataConfig(path=folder, eval="test")) == (folder, "test")
    assert heldout_source(DataConfig(path="o/n", eval=held)) == (held, "train")
    assert heldout_source(DataConfig(path="o/n", eval="gone.jsonl")) == ("gone.jsonl", "train")
    assert heldout_source(DataConfig(path="pairs.jsonl", eval="gone")) == ("gone", "train")


def test_pairs_as_opinions():
    row = Preference("Hi?", "Good.", "Bad.", "x:1", columns={"n": 1})
    assert unpaired([row]) == [
        UnpairedExample("Hi?", "Good.", True, "x:1", columns={"n": 1}),
        UnpairedExample("Hi?", "Bad.", False, "x:1", columns={"n": 1}),
    ]


def test_a_table_of_messages_and_answers(tmp_path):
    import csv

    rows = [
        {"prompt": "Hi?", "chosen": json.dumps(turns("Hi?", "Good.")), "rejected": json.dumps(turns("Hi?", "Bad."))},
    ]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    [row], report = read_preferences(DataConfig(path=str(tmp_path / "a.csv")))
    assert (report.format, row.chosen) == ("turns", (Message("assistant", "Good."),))
