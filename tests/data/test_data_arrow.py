"""The same rows give the same tokens from every kind of file, though Arrow gives the objects of all rows one type."""

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from mlxdpo.config import DataConfig
from mlxdpo.data import sources
from mlxdpo.data.encode import encode_all
from mlxdpo.data.read import read_preferences
from mlxdpo.data.sources import read_rows
from mlxdpo.types import UserError


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()


ALL_OF_IT = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template=ALL_OF_IT, eos="<|im_end|>")

# What a key may hold. Arrow gives a key one type and one place among the others: keys stand in alphabetical order.
WORD = st.sampled_from(["Oslo", "x y", "é", "", '"q"'])
VALUES = {
    "at": st.fixed_dictionaries({}, optional={"lat": st.integers(-9, 9), "lon": st.integers(-9, 9), "name": WORD}),
    "city": WORD,
    "exact": st.booleans(),
    "n": st.integers(-(2**40), 2**40),
    "points": st.lists(st.fixed_dictionaries({}, optional={"x": st.integers(0, 9), "y": WORD}), max_size=2),
    "tags": st.lists(WORD, max_size=3),
}
SCHEMAS = {
    "at": st.just({"properties": {"lat": {"type": "integer"}}, "type": "object"}),
    "city": st.sampled_from([{"type": "string"}, {"description": "d", "type": "string"}, {"enum": ["Oslo"]}]),
    "exact": st.just({"type": "boolean"}),
    "n": st.sampled_from([{"type": "integer"}, {"maximum": 9, "minimum": 0, "type": "integer"}]),
    "points": st.just({"items": {"properties": {"x": {"type": "integer"}}, "type": "object"}, "type": "array"}),
    "tags": st.just({"items": {"type": "string"}, "type": "array"}),
}


def row_with(call_arguments, properties):
    """One row: a tool with these properties, called with these arguments."""
    call = {"function": {"arguments": call_arguments, "name": "every"}, "type": "function"}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"description": "d", "name": "every", "parameters": {"properties": properties, "type": "object"}}
    return {
        "prompt": [{"role": "user", "content": "Every?"}, turn, {"role": "tool", "content": "1"}],
        "chosen": [turn],
        "rejected": [{"role": "assistant", "content": "No idea."}],
        "tools": [{"function": tool, "type": "function"}],
    }


# Parquet cannot write an object type without keys, so the first row has them all.
EVERY_KEY = row_with(
    {"at": {"lat": 1, "lon": 2, "name": "n"}, "city": "c", "exact": True, "n": 1, "points": [{"x": 1, "y": "y"}]}
    | {"tags": ["t"]},
    {
        "at": {"properties": {"lat": {"type": "integer"}}, "type": "object"},
        "city": {"description": "d", "enum": ["Oslo"], "type": "string"},
        "exact": {"type": "boolean"},
        "n": {"maximum": 9, "minimum": 0, "type": "integer"},
        "points": {"items": {"properties": {"x": {"type": "integer"}}, "type": "object"}, "type": "array"},
        "tags": {"items": {"type": "string"}, "type": "array"},
    },
)


@st.composite
def tool_rows(draw):
    """A few rows of a conversation with tools; each has its own tools with their own arguments."""
    rows = []
    for number in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4).map(sorted))
        tool = {"description": "d", "name": f"f{number}"}
        tool["parameters"] = {"properties": {name: draw(SCHEMAS[name]) for name in names}, "type": "object"}
        said = {name: draw(VALUES[name]) for name in names if draw(st.booleans())}
        call = {"function": {"arguments": said, "name": tool["name"]}, "type": "function"}
        turn = {"role": "assistant", "content": draw(WORD), "tool_calls": [call]}
        asked = [{"role": "user", "content": f"{draw(WORD)} {number}?"}]
        if draw(st.booleans()):
            reason = {"reasoning_content": "Hm."} if draw(st.booleans()) else {}
            asked += [turn | reason, {"role": "tool", "content": draw(WORD)}]
        row = {"prompt": asked, "chosen": [turn], "rejected": [{"role": "assistant", "content": "No idea."}]}
        rows.append(row | {"tools": [{"function": tool, "type": "function"}]} if draw(st.booleans()) else row)
    return json.loads(json.dumps([EVERY_KEY, *rows], sort_keys=True))


def as_jsonl(rows, folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def as_arguments_in_text(rows, folder):
    """As OpenAI writes calls, and tools as a column of JSON text."""
    changed = json.loads(json.dumps(rows))
    for row in changed:
        row["tools"] = json.dumps(row["tools"]) if "tools" in row else None
        for turn in [*row["prompt"], *row["chosen"]]:
            for call in turn.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return as_jsonl(changed, folder)


def as_parquet(rows, folder):
    pq.write_table(pa.Table.from_pylist(whole(rows)), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_jsonl_of_arrow(rows, folder):
    """As `to_json` of a loaded dataset: the nulls stand in the file."""
    return as_jsonl(pa.Table.from_pylist(rows).to_pylist(), folder)


def whole(rows):
    """Rows that have all columns: the first one's are the table's."""
    return [{"tools": None} | row for row in rows]


def dataset(rows, json_columns):
    from datasets import Dataset

    mixed = {"on_mixed_types": "use_json"} if json_columns else {}
    return Dataset.from_list(whole(rows), **mixed)


def as_json_columns(rows, folder):
    """As datasets 4.7 and later write objects of several types: text of the Arrow type `arrow.json`."""
    dataset(rows, True).to_parquet(folder / "json.parquet")
    return folder / "json.parquet"


def as_saved(rows, folder):
    dataset(rows, False).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(rows, folder):
    from datasets import DatasetDict

    DatasetDict(train=dataset(rows, True), test=dataset(rows[:1], False)).save_to_disk(folder / "splits")
    return folder / "splits"


def as_hub_layout(rows, folder):
    """A repository's folders: a configuration, a split, shards."""
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(whole(rows)), folder / "data" / "train-00000-of-00001.parquet")
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"never read")
    return folder


ROUTES = [as_arguments_in_text, as_parquet, as_json_columns, as_saved, as_saved_splits, as_hub_layout]


def tokens(path, **options):
    """The token ids of a source, and how its rows were counted."""
    data = DataConfig(path=str(path), **options)
    rows, report = read_preferences(data)
    examples, encoded = encode_all(rows, TOKENIZER, data)
    assert not report.unread and not encoded.refused
    return [[ids.tolist() for ids in (e.prompt, e.chosen, e.rejected)] for e in examples]


def same_everywhere(rows, routes):
    with tempfile.TemporaryDirectory() as place:
        expected = tokens(as_jsonl(rows, Path(place)))
        assert len(expected) == len(rows)
        for route in routes:
            folder = Path(place, route.__name__)
            folder.mkdir()
            assert tokens(route(rows, folder)) == expected, route.__name__


@settings(
    max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(rows=tool_rows())
def test_every_route_gives_the_same_tokens(rows):
    same_everywhere(rows, ROUTES)


@settings(
    max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(rows=tool_rows())
def test_parquet_and_json_text_give_the_same_tokens(rows):
    same_everywhere(rows, [as_arguments_in_text, as_parquet])


PARTS_OF_A_ROW = {  # a mark for each, as it is printed
    "system": "be kind",
    "tools": "city to look at",
    "calls": "Oslo",
    "reasoning": "they want Oslo",
    "parts": "in two parts",
}


def row_of_all_parts():
    """One row in which every part of a conversation says something of its own."""
    row = row_with({"city": "Oslo"}, {"city": {"description": "city to look at", "type": "string"}})
    turn = {**row["chosen"][0], "reasoning_content": "they want Oslo"}
    parts = [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in two parts?"}]
    return row | {"system": "be kind", "prompt": [{"role": "user", "content": parts}], "chosen": [turn]}


@pytest.mark.parametrize("route", [as_jsonl, *ROUTES])
def test_every_part_of_a_row_arrives_by_every_route(route, tmp_path):
    rows = [row_of_all_parts(), row_of_all_parts() | {"system": None, "rejected": TWO_TOOLS[1]["chosen"]}]
    (tmp_path / "plain").mkdir()
    found = tokens(route(rows, tmp_path))
    assert found == tokens(as_jsonl(rows, tmp_path / "plain"))
    text = TOKENIZER.decode([*found[0][0], *found[0][1]])
    assert {name: mark for name, mark in PARTS_OF_A_ROW.items() if text.count(mark) < 1} == {}
    assert text.count("be kind") == text.count("they want Oslo") == text.count("in two parts") == 1


def test_the_hub_gives_the_same_tokens(tmp_path, monkeypatch):
    rows = TWO_TOOLS
    for json_columns in (False, True):
        loaded = dataset(rows, json_columns).to_iterable_dataset()
        monkeypatch.setattr(sources, "_load_hub", lambda path, split, loaded=loaded: loaded)
        assert tokens("org/name") == tokens(as_jsonl(rows, tmp_path))


TWO_TOOLS = [
    row_with({"city": "Oslo"}, {"city": {"type": "string"}}),
    row_with({"a": 2, "b": 2}, {"a": {"type": "number"}, "b": {"type": "number", "default": 1}}),
    row_with({}, {}),
]


def test_json_lines_written_from_arrow_lose_the_nulls_of_other_tools(tmp_path):
    (tmp_path / "own").mkdir()
    assert tokens(as_jsonl_of_arrow(TWO_TOOLS, tmp_path)) == tokens(as_jsonl(TWO_TOOLS, tmp_path / "own"))


def test_a_null_that_json_states_is_kept(tmp_path):
    row = row_with({"a": None}, {"a": {"default": None, "enum": [None, 1]}})
    [pair], _ = read_preferences(DataConfig(path=str(as_jsonl([row], tmp_path))))
    assert pair.tools[0]["function"]["parameters"]["properties"] == {"a": {"default": None, "enum": [None, 1]}}
    assert pair.chosen[0].extra["tool_calls"][0]["function"]["arguments"] == {"a": None}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (pa.struct([("a", pa.int64()), ("b", pa.int64())]), {"a": 1}, {"a": 1}),
        (pa.list_(pa.struct([("a", pa.int64()), ("b", pa.int64())])), [{"b": 2}, None], [{"b": 2}, None]),
        (pa.large_list(pa.struct([("a", pa.int64())])), [{}], [{}]),
        (pa.list_(pa.int64()), [1, None], [1, None]),
        (pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.int64())])), [("k", {"a": 1})], {"k": {"a": 1}}),
        (
            pa.struct([("deep", pa.list_(pa.struct([("x", pa.int64()), ("y", pa.int64())])))]),
            {"deep": [{"y": 1}]},
            None,
        ),
        (pa.json_(), '{"a": null}', {"a": None}),
        (pa.dictionary(pa.int8(), pa.string()), "word", "word"),
    ],
)
def test_each_arrow_type_comes_back_as_it_was_written(tmp_path, kind, value, expected):
    is_json = kind == pa.json_()
    column = pa.ExtensionArray.from_storage(kind, pa.array([value])) if is_json else pa.array([value], kind)
    pq.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
    [(_, row)] = read_rows(str(tmp_path / "a.parquet"))
    assert row == {"c": value if expected is None else expected}


def test_a_json_column_that_holds_none_is_a_bad_row(tmp_path):
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "{"]))
    pq.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
    (_, good), (where, bad) = read_rows(str(tmp_path / "a.parquet"))
    assert good == {"c": {"a": 1}} and where == "a.parquet:row 2" and "cannot be read" in bad.sentence


def test_arrow_files_of_both_forms(tmp_path):
    table = pa.table({"prompt": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("file", "stream"):
        found = list(read_rows(str(tmp_path / f"{name}.arrow")))
        assert found == [(f"{name}.arrow:row 1", {"prompt": "a"}), (f"{name}.arrow:row 2", {"prompt": "b"})]
    for content in (b"", b"ARROW1", b"nothing of the kind"):
        (tmp_path / "file.arrow").write_bytes(content)
        with pytest.raises(UserError, match=r"^file\.arrow: not a readable Arrow file \("):
            list(read_rows(str(tmp_path / "file.arrow")))


PAIRS = [{"prompt": f"p{n}", "chosen": "é 🙂", "rejected": "b"} for n in range(3)]


def zstd(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_compressed_files_and_damaged_ones(tmp_path, ending, pack):
    raw = as_jsonl(PAIRS, tmp_path).read_bytes()
    for kind, content in (("jsonl", raw), ("json", json.dumps(PAIRS).encode()), ("csv", b"prompt\np0\n")):
        file = tmp_path / f"a.{kind}.{ending}"
        file.write_bytes(pack(content))
        assert [row["prompt"] for _, row in read_rows(str(file))][:1] == ["p0"]
    for damaged in (b"none of it", pack(raw)[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r": cannot be read \(.*\); check the file$"):
            list(read_rows(str(file)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_files_as_windows_programs_write_them(tmp_path, encoding, kind):
    text = {"jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in PAIRS), "json": json.dumps(PAIRS)}
    text["csv"] = "prompt;chosen;rejected\r\n" + "".join(";".join(row.values()) + "\r\n" for row in PAIRS)
    mark = "\ufeff" if encoding.endswith("e") else ""
    (tmp_path / f"a.{kind}").write_bytes((mark + text[kind]).encode(encoding))
    assert [row for _, row in read_rows(str(tmp_path / f"a.{kind}"))] == PAIRS


def test_half_a_character_of_utf16_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \('utf-16"):
        list(read_rows(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("text", ["a;b\n1;2\n", "sep=;\na;b\n1;2\n", "a\tb\n1\t2\n", "a|b\n1|2\n", '"a,x,y";b\n1;2\n'])
def test_the_delimiter_is_the_one_that_splits_the_header(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    [(where, row)] = read_rows(str(tmp_path / "a.csv"))
    assert list(row.values()) == ["1", "2"] and where == f"a.csv:{2 + text.startswith('sep')}"
