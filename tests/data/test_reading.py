"""Reading and encoding many rows: it is seen how far they are, and they stop when asked."""

import json
import sys

import pytest
from tiny_models import write_model
from tiny_runs import finish, recipe, stop_after, write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.commands import terminal
from mlxdpo.commands.train import follow_training
from mlxdpo.config import DataConfig
from mlxdpo.data.dataset import Sofar, encode_split, encoding, pairs_folder, read_split, reading
from mlxdpo.data.transforms import PAIRS
from mlxdpo.types import Event

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def twos(monkeypatch):
    """Portions of two rows everywhere."""
    for name in ("dataset.PORTION", "encode.CHUNK", "examples.FLUSH"):
        monkeypatch.setattr(f"mlxdpo.data.{name}", 2)


def rows(file, count, first=0):
    lines = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(first, first + count)]
    file.write_text("".join(map("{}\n".format, map(json.dumps, lines))))
    return str(file)


def walked(steps):
    """What is told on the way, and what comes back in the end."""
    told = []
    while True:
        try:
            told.append(next(steps))
        except StopIteration as end:
            return told, end.value


def test_how_far_it_is_counts_rows_of_both_parts(tmp_path, twos):
    data = DataConfig(path=rows(tmp_path / "a.jsonl", 5), eval=rows(tmp_path / "b.jsonl", 3, first=10))
    tokenizer = chatml_tokenizer()
    told, split = walked(reading(data, 0, PAIRS))
    assert told == [Sofar("reading", n, None) for n in (2, 4, 7)]
    told, made = walked(encoding(split, data, tokenizer, frozenset()))
    assert told == [Sofar("encoding", n, 8) for n in (2, 4, 7)]
    assert (len(made.train), len(made.heldout)) == (5, 3)
    # What is kept is not read again, and says nothing.
    told, split = walked(reading(data, 0, PAIRS))
    assert told == [] and split.clean is None
    told, again = walked(encoding(split, data, tokenizer, frozenset()))
    assert told == [] and again.digest == made.digest


def test_portions_change_nothing(tmp_path, monkeypatch):
    data, tokenizer = DataConfig(path=rows(tmp_path / "a.jsonl", 9)), chatml_tokenizer()
    whole = encode_split(read_split(data, 0), data, tokenizer, frozenset())
    for folder in pairs_folder().iterdir():
        folder.rename(tmp_path / folder.name)
    for name in ("dataset.PORTION", "encode.CHUNK", "examples.FLUSH"):
        monkeypatch.setattr(f"mlxdpo.data.{name}", 2)
    assert encode_split(read_split(data, 0), data, tokenizer, frozenset()).digest == whole.digest


def test_closed_on_the_way_nothing_is_left(tmp_path, twos):
    data = DataConfig(path=rows(tmp_path / "a.jsonl", 9))
    steps = encoding(read_split(data, 0), data, chatml_tokenizer(), frozenset())
    next(steps)
    assert list(pairs_folder().glob(".draft-*"))
    steps.close()
    assert not list(pairs_folder().iterdir())


@pytest.mark.parametrize(("questions", "doing"), [(0, "reading"), (9, "encoding")])
def test_a_run_stops_on_the_way_and_the_same_command_starts_it(tmp_path, twos, questions, doing):
    write_model(tmp_path / "llama", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl", count=18)
    events = finish(recipe(tmp_path), stop=stop_after(questions))
    assert [event.kind for event in events[-2:]] == ["reading", "interrupted"]
    assert events[-2].values["doing"] == doing and len(events) == questions + 2
    assert not (tmp_path / "run").exists() and not (pairs_folder().exists() and list(pairs_folder().iterdir()))
    events = finish(recipe(tmp_path))
    assert "start" in [event.kind for event in events] and events[-1].kind == "done"


def test_stopped_before_there_is_a_run_the_terminal_says_so(tmp_path, monkeypatch, capsys):
    events = [Event("reading", 0, Sofar("encoding", 1000, 5000)._asdict()), Event("interrupted", 0, {})]
    monkeypatch.setattr(sys.modules["mlxdpo.training.run"], "train", lambda *args, **kw: iter(events))
    assert follow_training(recipe(tmp_path), None) == 130
    assert capsys.readouterr().out == "stopped; nothing was saved, start again\n"


def test_the_moving_line_names_what_is_done(monkeypatch):
    seen = []
    monkeypatch.setattr(terminal.Progress, "update", lambda self, task, **told: seen.append(told))
    sofar = [Sofar("reading", 2000, None), Sofar("encoding", 1000, 5000)]
    list(terminal.show_training(Event("reading", 0, at._asdict()) for at in sofar))
    assert seen == [
        {"description": "reading", "completed": 2000, "total": None},
        {"description": "encoding", "completed": 1000, "total": 5000},
    ]
