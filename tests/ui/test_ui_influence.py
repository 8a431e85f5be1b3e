"""A click on a word of an answer: which pairs taught it, dropped or flipped from the page."""

import json
import os

import pytest
from tiny_desk import finished_run

from mlxdpo.cli import run as command_line
from mlxdpo.types import UserError
from mlxdpo.ui import jobs
from mlxdpo.ui.compare import influence
from mlxdpo.ui.compare.answers import Answer, Score, TokenPiece
from mlxdpo.ui.compare.columns import Column, Exchange
from mlxdpo.ui.compare.tab import Chat
from mlxdpo.ui.data import audit


def chat_of(*pieces: str, **changes) -> Chat:
    text = "".join(pieces)
    score = Score(tuple(TokenPiece(piece, 0.1, -1.0) for piece in pieces), 0.0, 0.0, 0.0, None)
    exchange = Exchange("Name a fruit.", Answer("after", (1,), tuple(range(len(pieces))), text, "stop"), score)
    columns = tuple(Column(name, "", (exchange, exchange)) for name in ("Before tuning", "After tuning", "At step-1"))
    return Chat(**{"run": "one", "columns": columns} | changes)


def test_a_token_is_its_word_and_which_occurrence_of_it():
    chat = chat_of("An", " app", "le", ", an", " apple", "\n")
    asked = influence.asked_word(chat, "1,0,4")
    assert asked == ("one", "Name a fruit.", "An apple, an apple\n", "apple", 2)
    assert influence.asked_word(chat, "0,0,1")[3:] == ("app", 1)


@pytest.mark.parametrize(
    ("place", "changes", "words"),
    [
        ("1,0,5", {}, "only space"),
        ("1,0,6", {}, "has changed"),
        ("2,0,0", {}, "third column"),
        ("1,1,0", {}, "first answer of a chat"),
        ("1,0,0", {"system": "Be brief."}, "without a system prompt"),
        ("1,0", {}, "names no word"),
        ("1,0,-1", {}, "names no word"),
        ("1,0,0", {"columns": ()}, "has changed"),
    ],
)
def test_other_places_are_refused_in_a_sentence(place, changes, words):
    with pytest.raises(UserError, match=words):
        influence.asked_word(chat_of("An", " app", "le", ", an", " apple", "\n", **changes), place)


@pytest.fixture
def started(tmp_path, cache, monkeypatch):
    """A run with a started question, its command, and the command's file; no process was made."""
    path = finished_run(tmp_path).path
    commands = []

    class Process:
        pid = os.getpid()
        wait = staticmethod(lambda: 0)

    monkeypatch.setattr(jobs.subprocess, "Popen", lambda words, **about: commands.append(words) or Process())
    asked = influence.AskedWord("one", "--which fruit?", "a b a", "a", 2)
    return path, influence.start_influence(path, asked), commands[0][4:]


def test_the_pairs_found_are_listed_decided_and_written(started):
    path, out, command = started
    assert "Pairs that taught" in influence.influence_html(path, out, "a"), "what the process says so far"
    assert command_line(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    page = influence.influence_html(path, out, "a")
    assert rows[0]["influence"] > 0 and f'data-row="{rows[0]["where"]}"' in page and 'data-act="flip"' in page
    first, last = rows[0]["where"], rows[-1]["where"]
    influence.decide_pair(path, out, first, "drop")
    influence.decide_pair(path, out, last, "flip")
    data = influence.training_file(path)
    assert data is not None
    before = data.read_text().splitlines()
    assert influence.influence_html(path, out, "a").count('aria-pressed="true"') == 2
    target, dropped, flipped = audit.write_audited(data)
    after = target.read_text().splitlines()
    assert (dropped, flipped) == (1, 1) and len(after) == len(before) - 1 and data.read_text().splitlines() == before
    flipped_row = json.loads(before[int(last.rsplit(":", 1)[1]) - 1])
    assert flipped_row | {"chosen": flipped_row["rejected"], "rejected": flipped_row["chosen"]} in map(
        json.loads, after
    )
    for where, act in ((first, "keep"), ("pairs.jsonl:9999", "drop"), (first, "burn")):
        with pytest.raises(UserError, match="no such pair"):
            influence.decide_pair(path, out, where, act)


def test_a_prompt_that_begins_with_dashes_and_a_second_occurrence_reach_the_command(started):
    path, out, command = started
    assert command == [
        "influence",
        "--completion=a b a",
        "--part=a",
        "--occurrence=2",
        f"--out={out}",
        "--",
        str(path),
        "--which fruit?",
    ]
    with pytest.raises(UserError, match="NUL"):
        influence.start_influence(path, influence.AskedWord("one", "a\0", "b", "b", 1))


def test_a_damaged_list_is_an_alert(started):
    path, out, _ = started
    out.write_text('{"where": "pairs.jsonl:1"}\n')
    with pytest.raises(UserError, match="click the word again"):
        influence.influence_html(path, out, "a")
