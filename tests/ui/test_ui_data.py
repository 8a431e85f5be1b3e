"""The Data tab without a browser: search, the doctor, edits that never touch the original, a pair as it is scored."""

import gzip
import json
import re

import pytest
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow
from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.data import tab, view
from mlxdpo.ui.data.view import RowFilter

EVIL = "<script>alert(1)</script>"
ROWS = [
    {"prompt": "one", "chosen": "good answer", "rejected": "bad", "score": 3},
    {"prompt": "Two words", "chosen": "yes", "rejected": "no no no"},
    {"prompt": EVIL, "chosen": f"{EVIL} fine", "rejected": '"><img src=x onerror=alert(1)>'},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    # Spaces, a bad line and a last line without its end: all of it must survive an edit.
    path.write_text(f"{lines[0]}\n  {lines[1]}\n\nnot json\n{lines[2]}")
    return path


def test_browsing_keeps_the_files_own_numbers_and_its_bad_rows(file):
    book = view.open_book(file)
    assert book.shape is not None and book.shape.name == "text" and not book.more
    assert [view.number_of(where) for where, _ in book.rows] == [1, 2, 4, 5]
    assert isinstance(view.row_at(book, 4)[1], BadRow)
    assert view.columns_of(book) == ["prompt", "chosen", "rejected", "score"]
    with pytest.raises(UserError, match=r"pairs\.jsonl has no row 3; it has 4 rows"):
        view.row_at(book, 3)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (RowFilter(), [1, 2, 4, 5]),
        (RowFilter("WORDS"), [2]),
        (RowFilter("no", "rejected"), [2]),
        (RowFilter("no", "chosen"), []),
        (RowFilter(column="chosen", least=4, most=11), [1]),
        (RowFilter(column="chosen", most=3), [2]),
        (RowFilter("3", "score"), [1]),
    ],
)
def test_search(file, wanted, expected):
    book = view.open_book(file)
    assert [view.number_of(book.rows[at][0]) for at in view.matching_rows(book, wanted)] == expected


def test_pages(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(45)))
    book = view.open_book(path)
    found = view.matching_rows(book, RowFilter())
    shown = [re.findall(r'data-row="(\d+)"', view.rows_html(book, found, page)) for page in range(3)]
    assert [int(number) for page in shown for number in page] == list(range(1, 46))
    assert "Rows 41 to 45 of 45 found" in view.rows_html(book, found, 2)
    assert "No row matches" in view.rows_html(book, [], 0)


def test_a_script_in_a_data_file_stays_text(file):
    book = view.open_book(file)
    where, row = view.row_at(book, 5)
    pair, count = view.preference(book, where, row)
    seen = view.as_seen(pair, count, DataConfig(), chatml_tokenizer())
    for html in (view.rows_html(book, [0, 1, 2, 3], 0), seen, view.doctor(file)):
        assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in seen


def test_what_is_marked_is_what_is_scored(file):
    book = view.open_book(file)
    pair, count = view.preference(book, *view.row_at(book, 1))
    seen = view.as_seen(pair, count, DataConfig(), chatml_tokenizer())
    assert re.findall(r"<mark>(.*?)</mark>", seen) == ["good answer&lt;|im_end|&gt;", "bad&lt;|im_end|&gt;"]
    assert "one" in re.sub(r"<mark>.*?</mark>", "", seen)
    left_out = view.as_seen(pair, count, DataConfig(max_length=8), chatml_tokenizer())
    assert "would be skipped" in left_out and "left out 1 x" in left_out


def test_the_doctor_reads_the_whole_file_and_counts(file):
    found = view.doctor(file)
    assert "pairs.jsonl: 3 pairs from 4 rows" in found and "pairs.jsonl:4" in found


def test_an_edit_makes_a_new_file_and_changes_one_line(file):
    before = file.read_bytes()
    book = view.open_book(file)
    where, row = view.row_at(book, 2)
    assert view.fields_of(book, row) == [("prompt", "Two words"), ("chosen", "yes"), ("rejected", "no no no")]
    new = view.edited_row(book, where, row, ["Two words", "yes, “gladly”", "no no no"])
    saved = view.save_row(file, where, row, new)
    assert saved.name == "pairs.edited.jsonl" and file.read_bytes() == before
    old_lines, new_lines = before.split(b"\n"), saved.read_bytes().split(b"\n")
    assert json.loads(new_lines[1]) == ROWS[1] | {"chosen": "yes, “gladly”"}
    assert [line for n, line in enumerate(new_lines[:-1]) if n != 1] == [l for n, l in enumerate(old_lines) if n != 1]

    # The edited file is gone on with; the original edited again makes another.
    book = view.open_book(saved)
    where, row = view.row_at(book, 1)
    new = view.edited_row(book, where, row, ["one", "better", "bad", "3"])
    assert new["score"] == 3 and view.save_row(saved, where, row, new) == saved
    assert json.loads(saved.read_bytes().split(b"\n")[0])["chosen"] == "better"
    assert view.target_of(file).name == "pairs.edited-2.jsonl"


def test_what_changed_meanwhile_is_not_overwritten(file):
    book = view.open_book(file)
    where, row = view.row_at(book, 1)
    new = view.edited_row(book, where, row, ["one", "mine", "bad", "3"])
    file.write_text(file.read_text().replace("good answer", "theirs"))
    with pytest.raises(UserError, match="has changed since it was shown"):
        view.save_row(file, where, row, new)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["one", "bad", "bad", "3"], '"chosen" and "rejected" are the same'),
        (["one", "good", "bad", "{"], "score is no longer valid JSON"),
        (["one", "half \ud83d", "bad", "3"], "broken character"),
    ],
)
def test_an_edit_that_makes_no_pair_is_refused(file, texts, sentence):
    book = view.open_book(file)
    where, row = view.row_at(book, 1)
    with pytest.raises(UserError, match=re.escape(sentence)):
        view.edited_row(book, where, row, texts)


def test_messages_are_edited_as_json(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    answer = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    row = {"prompt": turns, "chosen": answer("hello"), "rejected": answer("no")}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row))
    book = view.open_book(path)
    texts = [text for _, text in view.fields_of(book, row)]
    assert view.edited_row(book, "m.jsonl:1", row, texts) == row
    texts[1] = texts[1].replace("hello", "good day")
    assert view.edited_row(book, "m.jsonl:1", row, texts)["chosen"] == answer("good day")


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz"])
def test_other_kinds_of_file_become_json_lines(tmp_path, kind):
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        path.write_text("prompt,chosen,rejected\nq,a,b\nq2,a2,b2\n")
    else:
        path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)))
    book = view.open_book(path)
    where, row = book.rows[1]
    new = view.edited_row(book, where, row, ["new", *[t for _, t in view.fields_of(book, row)][1:]])
    saved = view.save_row(path, where, row, new)
    assert saved.name == "pairs.edited.jsonl"
    assert [row["prompt"] for row in map(json.loads, saved.read_text().splitlines())][1] == "new"
    assert len(view.open_book(saved).rows) == len(book.rows)


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "runs/../../secret.jsonl", "", None])
def test_only_files_that_were_found_can_be_opened(tmp_path, monkeypatch, file, name):
    inside = tmp_path / "work"
    (inside / "runs").mkdir(parents=True)
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROWS[0]))
    file.rename(inside / "pairs.jsonl")
    monkeypatch.chdir(inside)
    assert choices.data_files(inside / "runs", inside) == ["pairs.jsonl"]
    assert tab._path(inside / "runs", "pairs.jsonl").name == "pairs.jsonl"
    with pytest.raises(UserError, match="there is no data file"):
        tab._path(inside / "runs", name)
