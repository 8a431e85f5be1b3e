"""Files, rows and texts: what goes in comes out, is counted under a reason, or is refused in one sentence."""

import contextlib
import csv
import functools
import gzip
import io
import json
import random
import re

import pytest
from counting import SilentDrop, balanced, case, fuzzed
from hypothesis import strategies as st
from mutating import ODD_TEXTS, SEEDS, SPECIAL, dumped, mutate_bytes, mutate_value, mutated_rows, some_rows
from row_shapes import FIXTURES, SEVERAL
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.check import check_rows, finding_lines
from mlxdpo.data.encode import encode_all, encode_prompt
from mlxdpo.data.fields import printable
from mlxdpo.data.formats import FORMATS
from mlxdpo.data.read import read_preferences
from mlxdpo.types import Message, Preference, UnpairedExample

pytestmark = pytest.mark.fuzz


def as_table(rows, delimiter):
    """Rows as CSV, cells of JSON where they are no text."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerow(header)
    for row in rows:
        cells = (row.get(name, "") for name in header)
        table.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in rows[0]}), sink)
    return sink.getvalue()


WRITERS = {
    "jsonl": lambda rows: b"\n".join(map(dumped, rows)) + b"\n",
    "json": lambda rows: dumped(rows),
    "csv": lambda rows: as_table(rows, ","),
    "tsv": lambda rows: as_table(rows, "\t"),
    "parquet": as_parquet,
}
ENDINGS = [*WRITERS, "jsonl.gz", "csv.gz"]


def read(folder, ending, content, **options):
    """The rows of a file with this content; its report is checked to be whole."""
    file = folder / f"rows.{ending}"
    file.write_bytes(content)
    kept, report = read_preferences(DataConfig(path=str(file), on_bad_row="skip", **options))
    assert report.kept == len(kept) > 0
    if FORMATS[report.format].gather is None and report.format not in SEVERAL:
        balanced(report.read, report.kept, sum(report.refused.values()))
    if ending == "jsonl":
        balanced(sum(bool(line.strip()) for line in content.split(b"\n")), report.read, 0)
    return kept


@pytest.mark.parametrize("ending", ENDINGS)
@fuzzed(15, 400, seed=SEEDS)
def test_loaders(tmp_path, ending, seed):
    content = broken_file(random.Random(seed), ending)
    case(f"loaders: {ending}", lambda: read(tmp_path, ending, content))


def broken_file(rng, ending):
    """A file of real rows with accidents in its bytes, in what a compressed one holds, or in the rows themselves."""
    write, packed = WRITERS[ending.removesuffix(".gz")], ending.endswith(".gz")
    rows, act = some_rows(rng), rng.random()
    if act < 0.4:
        changed = [mutate_value(rng, row) for row in rows]
        with contextlib.suppress(Exception):  # Arrow and CSV have no form of some values: then the bytes are changed
            content = write(changed)
            return gzip.compress(content) if packed else content
    content = write(rows)
    if packed and act < 0.8:
        return gzip.compress(mutate_bytes(rng, content))
    return mutate_bytes(rng, gzip.compress(content) if packed else content)


@fuzzed(60, 2_000, seed=SEEDS, name=st.just("auto") | st.sampled_from(sorted(FORMATS)))
def test_formats(tmp_path, seed, name):
    rng = random.Random(seed)
    rows = mutated_rows(rng)
    case("formats", lambda: read(tmp_path, "jsonl", WRITERS["jsonl"](rows), format=name))


WORDS = ("Hi?", "Good.", "Bad.", "Yes?", "Go on.", "I think so.", "I doubt it.", "Be kind.", "Tea.", "cooking")
MARK = re.compile(r"M\d+x")
TOOL = {"type": "function", "function": {"name": "f", "description": "M90x", "parameters": {"M91x": {"type": "M92x"}}}}
BESIDE = {
    "system": ["M20x", "", None],
    "system_prompt": ["M21x", None],
    "history": [[["M22x", "M23x"]], [], "M24x"],
    "tools": [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], None],
    "images": [["M25x"], [], None],
    "chat_template_kwargs": [{"enable_thinking": False}, {"M26x": "M27x"}],
    "source": ["M28x"],
    "meta": [{"a": ["M29x"]}],
    "score_chosen": [1, "M30x"],
    "score_rejected": [0, 2],
    "prompt_id": ["M31x"],
    "messages": [[{"role": "user", "content": "M32x"}]],
    "question": ["M33x"],
    "input": ["M34x", {"extra": "M35x"}],
    "instruction": ["M36x"],
    "prompt": ["M37x", None],
}
CALL = {"id": "M40x", "type": "function", "function": {"name": "f", "arguments": {"a": "M41x"}}}
PICTURE = {"type": "image_url", "image_url": "M47x"}
TURN = {
    "tool_calls": [[CALL], json.dumps([CALL]), [{"name": "f", "arguments": '{"a": "M42x"}'}], None],
    "reasoning_content": ["M43x"],
    "name": ["M44x"],
    "content": [[{"type": "text", "text": "M45x"}, "M46x"], [PICTURE], None],
}


def planted(rng):
    """Rows of a shape with a mark in every text, some columns beside them, turns as other programs write them."""
    rows = json.dumps(rng.choice(list(FIXTURES.values())))
    for number, word in enumerate(WORDS):
        rows = rows.replace(word, f"{word} M{number}x")
    rows = json.loads(rows)
    for row in rows:
        for name in rng.sample(sorted(BESIDE), rng.choice([0, 0, 1, 2])):
            row.setdefault(name, rng.choice(BESIDE[name]))
        for turn in turns_in(row):
            if rng.random() < 0.2:
                name = rng.choice(sorted(TURN))
                turn[name] = rng.choice(TURN[name])
        for name in list(row):
            if rng.random() < 0.1:
                row[name] = json.dumps(row[name])
    return [mutate_value(rng, row) if rng.random() < 0.4 else row for row in rows]


def turns_in(value):
    """The turns of a value, wherever they stand."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) and {"role", "from"} & value.keys() else []
    return [*own, *(turn for part in inside for turn in turns_in(part))]


def marks_in(value):
    return set(MARK.findall(json.dumps(value, default=str)))


def said_by(item):
    texts = (item.prompt, *((item.chosen, item.rejected) if isinstance(item, Preference) else (item.completion,)))
    return [[text if isinstance(text, str) else [turn.as_dict() for turn in text] for text in texts], item.tools]


def arrived(tmp_path, rows):
    """Every mark of the rows stands in what was read of them or in a column that is listed, unless a row is refused."""
    (tmp_path / "rows.jsonl").write_bytes(WRITERS["jsonl"](rows))
    items, report = read_preferences(DataConfig(path=str(tmp_path / "rows.jsonl"), on_bad_row="skip"))
    if report.refused or reasons.UNJUDGED in report.changed:
        return items, report
    columns = [(name, value) for row in rows for name, value in row.items()]
    parts = [(f"{name}.{key}", v) for name, value in columns for key, v in each_key(value)]
    named = marks_in([value for name, value in [*columns, *parts] if printable(name) in report.unread])
    lost = marks_in([list(row.values()) for row in rows]) - named - marks_in([said_by(item) for item in items])
    if lost:
        raise SilentDrop(f"{report.format}: {lost} of {rows}; listed {report.lines()}")
    return items, report


def each_key(value):
    """The keys of an object, of the objects of a list, or of either as JSON text."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        value = json.loads(value)
    objects = value if isinstance(value, list) else [value]
    return [pair for one in objects if isinstance(one, dict) for pair in one.items()]


@fuzzed(150, 10_000, seed=SEEDS)
def test_no_text_of_a_row_is_lost(tmp_path, seed):
    rows = planted(random.Random(seed))
    case("marks planted in rows", lambda: arrived(tmp_path, rows))


@fuzzed(10, 200, seed=SEEDS)
def test_data_check(tmp_path, seed):
    rng = random.Random(seed)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(WRITERS["jsonl"](mutated_rows(rng)))

    def look():
        rows, report = read_preferences(DataConfig(path=str(file), on_bad_row="skip"))
        for line in finding_lines(check_rows(rows, report, file.name)):
            assert line.isprintable()

    case("data check", look)


ALPHABET = st.characters(exclude_categories=()) | st.sampled_from("aé漢👩‍\ufeff\u200d\u0301 \n")
TEXT = (
    st.text(ALPHABET, max_size=40)
    | st.sampled_from([*SPECIAL, *ODD_TEXTS])
    | st.lists(st.sampled_from([*SPECIAL, *ODD_TEXTS[:20], "Hi", " there"]), max_size=5).map("".join)
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
EXTRA = st.just({}) | st.fixed_dictionaries({"tool_calls": st.just([{"function": {"name": "f", "arguments": {}}}])})
TURNS = st.lists(st.builds(Message, ROLE, TEXT, EXTRA), min_size=1, max_size=4).map(tuple)
CHAT = st.builds(
    lambda prompt, a, b: Preference(prompt, (Message("assistant", a),), (Message("assistant", b),), "p:1"),
    TURNS, TEXT, TEXT,
)  # fmt: skip
PLAIN = st.builds(lambda p, a, b: Preference(p, a, b, "p:1"), TEXT, TEXT, TEXT)
ONE = st.builds(lambda p, a, up: UnpairedExample(p, a, up, "p:1"), TEXT, TEXT, st.booleans())
ROWS = st.lists(CHAT | PLAIN | ONE, min_size=1, max_size=3)
HOW = st.fixed_dictionaries(
    {
        "template": st.sampled_from(["auto", "chat", "plain"]),
        "eos": st.sampled_from(["score", "leave"]),
        "max_length": st.sampled_from([8, 32, 1024]),
        "on_long_prompt": st.sampled_from(["trim", "drop", "stop"]),
        "on_long_completion": st.sampled_from(["drop", "truncate", "stop"]),
        "thinking": st.booleans(),
    }
)


def encoded(tokenizer, rows, how):
    """Examples of `rows`; every row is one, or is counted."""
    data = DataConfig(on_bad_row="skip", **how)
    examples, report = encode_all(rows, tokenizer, data)
    balanced(len(rows), len(examples), sum(report.refused.values()))
    for example in examples:
        assert len(example.prompt) > 0 and len(example.chosen) > 0 and len(example.rejected) > 0
        assert len(example.prompt) + max(len(example.chosen), len(example.rejected)) <= data.max_length
    return examples


def encoder_case(target, tokenizer, rows, how):
    case(target, lambda: encoded(tokenizer, rows, how))
    case(f"{target}, prompt alone", lambda: encode_prompt(rows[0].prompt, tokenizer, DataConfig(**how)))


tiny = functools.cache(chatml_tokenizer)


@fuzzed(20, 300, rows=ROWS, how=HOW)
def test_encoder(rows, how):
    encoder_case("encoder: tiny", tiny(), rows, how)


@pytest.mark.tokenizers
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "llama2", "mistral"])
@fuzzed(10, 300, rows=ROWS, how=HOW)
def test_encoder_of_real_tokenizers(name, rows, how):
    from real_tokenizers import load

    encoder_case(f"encoder: {name}", load(name), rows, how)
