"""Rows come out of every kind of file with the place they stand at; what cannot be read says so in one sentence."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest

from mlxdpo.data import reasons, sources
from mlxdpo.data.report import BadRow
from mlxdpo.data.sources import is_hub_dataset, read_rows
from mlxdpo.types import UserError

ROWS = [{"prompt": f"p{n}", "chosen": f"good\n{n} é 🙂", "rejected": f"bad {n}"} for n in range(3)]


def write_jsonl(file: Path, rows=ROWS) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def rows_of(path, split="train"):
    return list(read_rows(str(path), split))


def sentence(path, split="train") -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, split)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".JSONL"])
def test_json_lines_under_any_ending(tmp_path, ending):
    file = tmp_path / f"pairs{ending}"
    text = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
    file.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    assert rows_of(file) == [(f"pairs{ending}:{1 + 2 * n}", row) for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_array_alone_or_in_an_object(tmp_path, wrap):
    (tmp_path / "pairs.json").write_text(json.dumps(wrap(ROWS), indent=1), "utf-8")
    assert rows_of(tmp_path / "pairs.json") == [(f"pairs.json:row {n}", row) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_tables_name_the_line_a_row_begins_at(tmp_path, ending, delimiter):
    file = tmp_path / f"pairs{ending}"
    opened = gzip.open if ending.endswith("gz") else open
    with opened(file, "wt", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, ROWS[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)
    assert rows_of(file) == [(f"pairs{ending}:{2 + 2 * n}", row) for n, row in enumerate(ROWS)]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"chosen": [{"role": "user", "content": "é"}], "score": 1.5}, {"chosen": [], "score": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert rows_of(tmp_path / "pairs.parquet") == [("pairs.parquet:row 1", rows[0]), ("pairs.parquet:row 2", rows[1])]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"fine", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"chosen": column}), tmp_path / "pairs.parquet")
    good, (where, bad) = rows_of(tmp_path / "pairs.parquet")
    assert good == ("pairs.parquet:row 1", {"chosen": "fine"})
    assert (where, bad.reason) == ("pairs.parquet:row 2", reasons.INVALID_UTF8)


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name, text in (("a.jsonl", json.dumps(ROWS[0])), ("a.json", json.dumps([ROWS[0]])), ("a.csv", "prompt\np0\n")):
        (tmp_path / name).write_text(text, "utf-8-sig")
        assert rows_of(tmp_path / name)[0][1]["prompt"] == "p0"


BAD_LINES = [
    (b'{"a": 1', reasons.MALFORMED, "not valid JSON (Expecting ',' delimiter at column 8)"),
    (b"[1, 2]", reasons.NOT_OBJECT, "the row is a list of numbers; expected an object of columns"),
    (b"null", reasons.NOT_OBJECT, "the row is null; expected an object of columns"),
    (b'{"a": "\xff"}', reasons.INVALID_UTF8, "the text is not UTF-8 (byte 0xff at position 8)"),
    (b"[" * 100_000, reasons.MALFORMED, "the JSON is nested too deeply to be a row"),
]


@pytest.mark.parametrize(("line", "reason", "said"), BAD_LINES)
def test_a_bad_line_comes_out_in_its_place_and_reading_goes_on(tmp_path, line, reason, said):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    first, (where, bad), last = rows_of(tmp_path / "a.jsonl")
    assert (first, last) == (("a.jsonl:1", {"n": 1}), ("a.jsonl:3", {"n": 3}))
    assert isinstance(bad, BadRow)
    assert (where, bad.reason, bad.sentence) == ("a.jsonl:2", reason, said)


def test_a_number_of_five_thousand_digits_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": ' + "9" * 5000 + "}\n")
    assert rows_of(tmp_path / "a.jsonl")[0][1].reason == reasons.MALFORMED


def test_a_table_row_with_the_wrong_number_of_cells(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen\nx\ny,z\n")
    (where, bad), good = rows_of(tmp_path / "a.csv")
    assert good == ("a.csv:3", {"prompt": "y", "chosen": "z"})
    assert (where, bad.sentence) == ("a.csv:2", "the row has 1 cells where the header has 2")


def test_a_folder_reads_its_files_in_order_and_only_the_split_asked_for(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"from": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    where = tmp_path.name
    both = [(f"{where}/a.jsonl:1", {"from": "a.jsonl"}), (f"{where}/b.jsonl:1", {"from": "b.jsonl"})]
    assert rows_of(tmp_path) == both
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "test-00000-of-00001.jsonl", [{"from": "test"}])
    assert rows_of(tmp_path) == both
    assert rows_of(tmp_path, "test") == [(f"{where}/data/test-00000-of-00001.jsonl:1", {"from": "test"})]
    write_jsonl(tmp_path / "train.jsonl", [{"from": "train"}])
    assert rows_of(tmp_path) == [(f"{where}/train.jsonl:1", {"from": "train"})]


KINDS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "no such file or folder; expected data such as pairs.jsonl or a Hub id org/name"
    for path in ("data/pairs.jsonl", "pairs", "a b/c", "a/b/c", "data/x.csv.gz", "x" * 5000, "nul\0byte"):
        assert sentence(path) == str(UserError(f"{path}: {expected}"))
    assert sentence("") == "no data given; set data.path to a file, a folder or a Hub dataset id"


def test_sources_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    assert sentence(tmp_path / "empty") == f"{tmp_path}/empty: no data files in this folder; expected {KINDS}"
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", ""), ("d.json", "[]"), ("e.csv", "a,b\n")):
        (tmp_path / name).write_text(content)
        assert sentence(tmp_path / name) == f"{tmp_path}/{name}: holds no rows; expected at least one"


def test_sources_that_are_something_else(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    assert sentence(tmp_path / "a.txt") == f"a.txt: unknown kind of file; expected {KINDS}"
    for content, found in (('{"a": 1}', "an object"), ("3", "a number")):
        (tmp_path / "a.json").write_text(content)
        wanted = "expected an array of rows or an object with one list of rows"
        assert sentence(tmp_path / "a.json") == f"a.json: the file is {found}; {wanted}"
    (tmp_path / "a.json").write_text('[{"a": 1},')
    said = "a.json: not valid JSON (Expecting value at column 11); expected an array of rows"
    assert sentence(tmp_path / "a.json") == said
    (tmp_path / "a.csv").write_text("a,b,a\n1,2,3\n")
    assert sentence(tmp_path / "a.csv") == "a.csv:1: two columns have the same name in a, b, a; rename one"
    write_jsonl(tmp_path / "test.jsonl")
    (tmp_path / "a.csv").unlink()
    (tmp_path / "a.json").unlink()
    assert sentence(tmp_path) == f'{tmp_path}: no files of the split "train"; the folder has test'


def test_damaged_files(tmp_path):
    whole = gzip.compress(json.dumps(ROWS[0]).encode() * 100)
    for content in (b"not gzip", whole[: len(whole) // 2]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        assert re.fullmatch(r".*a\.jsonl\.gz: cannot be read \(.+\); check the file", sentence(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert re.fullmatch(r"a\.parquet: not a readable Parquet file \(.+\)", sentence(tmp_path / "a.parquet"))


def test_what_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "now").mkdir(parents=True)
    for path in ("Anthropic/hh-rlhf", "nvidia/HelpSteer2:preference", "a/truthy-dpo-v0.1"):
        assert is_hub_dataset(path)
    for path in ("here/now", "pairs.jsonl", "data/pairs.jsonl", "./a", "/a/b", "a/b/c", "a", "", "a/b.parquet"):
        assert not is_hub_dataset(path)


def test_hub_rows_stream_and_the_part_may_be_a_folder(monkeypatch):
    import datasets

    calls = []

    def load(name, config=None, **options):
        calls.append((name, config, options.get("data_dir")))
        if config == "helpful-base":
            raise ValueError("BuilderConfig 'helpful-base' not found")
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of("o/n:helpful-base") == [(f"o/n:helpful-base:row {n}", row) for n, row in enumerate(ROWS, 1)]
    assert calls == [("o/n", "helpful-base", None), ("o/n", None, "helpful-base")]


HUB_ERRORS = [
    (
        ConnectionError("x"),
        "o/n: no such file here, and the Hub cannot be reached; give a local file or go online",
    ),
    (
        FileNotFoundError("x"),
        "o/n: neither a local file nor a dataset on the Hub; check the spelling, or log in if it is gated",
    ),
    (ValueError('Bad split:\n"train"'), 'o/n: cannot load the split "train" from the Hub (Bad split: "train")'),
]


@pytest.mark.parametrize(("error", "said"), HUB_ERRORS)
def test_hub_errors_are_one_sentence(monkeypatch, error, said):
    def fail(path, split):
        raise error

    monkeypatch.setattr(sources, "_load_hub", fail)
    assert sentence("o/n") == said
