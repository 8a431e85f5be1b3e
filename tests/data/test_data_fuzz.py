"""Whatever rows or bytes a file holds: sound preferences, or one printable sentence, and nothing else."""

import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from row_shapes import FIXTURES, SEVERAL

from mlxdpo.config import DataConfig
from mlxdpo.data.formats import FORMATS
from mlxdpo.data.read import read_preferences
from mlxdpo.types import Preference, UnpairedExample, UserError


@pytest.fixture
def read(tmp_path):
    """Write rows (objects, or raw lines) to pairs.jsonl and read them."""

    def reader(rows, **options):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return read_preferences(DataConfig(path=str(tmp_path / "pairs.jsonl"), **options))

    return reader


NAMES = st.sampled_from(sorted({name for shape in FORMATS.values() for name in shape.columns} | {"tools", "x"}))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("aé\ud800 \n:H", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NEAR = st.builds(
    lambda name, changes: {**FIXTURES[name][0], **changes},
    st.sampled_from(sorted(FIXTURES)),
    st.dictionaries(NAMES, JSON, max_size=2),
)
TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "tool", "x"]),
        st.sampled_from(["", "a", "b", None]),
    ),
    max_size=4,
)
CHATS = st.fixed_dictionaries({"chosen": TURNS, "rejected": TURNS})
ALIKE = st.sampled_from(sorted(FIXTURES)).flatmap(  # rows of one shape, most of them sound
    lambda name: st.lists(
        st.builds(
            lambda number, changes: {**FIXTURES[name][-1], "x": number, **changes},
            st.integers(0, 2),
            st.just({}) | st.dictionaries(st.sampled_from(sorted(FORMATS[name].columns)), JSON, max_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
ANYTHING = ALIKE | st.lists(
    NEAR | CHATS | JSON | st.dictionaries(NAMES | st.text(max_size=3), JSON, max_size=4), max_size=6
)
NAME = st.just("auto") | st.sampled_from(sorted(FORMATS))
FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FUZZ
@given(rows=ANYTHING, name=NAME, policy=st.sampled_from(["stop", "skip"]))
def test_random_rows_raise_nothing_but_one_printable_sentence(read, rows, name, policy):
    try:
        kept, report = read(rows, format=name, on_bad_row=policy)
    except UserError as error:
        assert str(error).encode() and "\n" not in str(error)
        return
    event(f"kept rows of {report.format}")
    assert report.kept == len(kept) > 0
    for row in kept:
        _sound(row)
    if FORMATS[report.format].gather is None and report.format not in SEVERAL:
        assert report.read == report.kept + sum(report.refused.values())


def _sound(row):
    sides = (row.completion,) if isinstance(row, UnpairedExample) else (row.chosen, row.rejected)
    if isinstance(row, Preference):
        assert row.chosen != row.rejected
    for side in sides:
        assert isinstance(side, str) == isinstance(row.prompt, str)
        if isinstance(side, str):
            assert side.strip() and row.prompt.strip()
        else:
            assert [turn.role for turn in side] == ["assistant"]
            assert row.prompt[-1].role != "assistant"


@FUZZ
@given(content=st.binary(max_size=200), ending=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"]))
def test_random_bytes_raise_nothing_but_one_printable_sentence(tmp_path, content, ending):
    (tmp_path / f"a.{ending}").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_preferences(DataConfig(path=str(tmp_path / f"a.{ending}"), on_bad_row="skip"))
    assert str(caught.value).encode() and "\n" not in str(caught.value)
