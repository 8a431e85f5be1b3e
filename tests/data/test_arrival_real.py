"""Everything in a row reaches the tokens once, or is refused by name: real tokenizers with their own templates.

The words of a row are looked for in the decoded tokens. `pytest -m tokenizers -s` prints the table of docs/data.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_tokenizers import load

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode
from mlxdpo.data.report import Report
from mlxdpo.types import Message, Preference, UserError

pytestmark = pytest.mark.tokenizers

NAMES = ("qwen3", "llama3", "gemma3", "llama2", "mistral", "smollm2")
USER = (Message("user", "Where is Quito?"),)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "atlas",
            "description": "Looks up cities.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name."}},
                "required": ["town"],
            },
        },
    },
)
CALL = {"type": "function", "function": {"name": "atlas", "arguments": {"town": "Quito"}}}
AS_TEXT = {"type": "function", "function": {"name": "atlas", "arguments": '{"town":"Quito"}'}}
HISTORY = (*USER, Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "Ecuador, 2850 metres"))


def said(content, **extra):
    return (Message("assistant", content, extra),)


OTHER = said("Nobody knows.")
ROWS = {
    "system": (Preference((Message("system", "Be brief."), *USER), said("Ecuador."), OTHER, "r"), ["Be brief."]),
    "tools": (
        Preference(USER, said("Ecuador."), OTHER, "r", TOOLS),
        ['"atlas"', "Looks up cities.", '"town": {', "Its name."],
    ),
    "calls": (Preference(USER, said("", tool_calls=[CALL]), OTHER, "r"), ['{"town": "Quito"}', "atlas"]),
    "calls, arguments as text": (
        Preference(USER, said("", tool_calls=[AS_TEXT]), OTHER, "r"),
        ['{"town": "Quito"}', "atlas"],
    ),
    "tool turns": (Preference(HISTORY, said("High up."), OTHER, "r"), ['{"town": "Quito"}', "Ecuador, 2850 metres"]),
    "reasoning_content": (
        Preference(USER, said("Ecuador.", reasoning_content="Andes, north."), OTHER, "r"),
        ["Andes, north."],
    ),
    "reasoning in tags": (
        Preference(USER, said("<think>\nAndes, north.\n</think>\n\nEcuador."), OTHER, "r"),
        ["Andes, north."],
    ),
    "parts": (
        Preference(
            (Message("user", [{"type": "text", "text": "Where is "}, {"type": "text", "text": "Quito, then?"}]),),
            said([{"type": "text", "text": "In the north of "}, {"type": "text", "text": "Ecuador."}]),
            OTHER,
            "r",
        ),
        ["Where is Quito, then?", "In the north of Ecuador."],
    ),
}


def outcome(name, row, words, **settings):
    """What became of a row: "once", "refused: why", or "SILENT: what"."""
    tokenizer, report = load(name), Report()
    try:
        example = encode(row, tokenizer, DataConfig(thinking=True, **settings), report)
    except UserError as error:
        return f"refused: {error}"
    text = tokenizer.decode(np.concatenate([example.prompt, example.chosen]), skip_special_tokens=False)
    lost = [word for word in words if text.count(word) != 1]
    return f"SILENT: {lost}" if lost else "once"


def cell(found):
    short = {
        "does not print": "refused: not printed",
        "writes the": "refused: written as an answer",
        "has no chat template": "refused: no chat template",
        "chat template says": "refused by the template",
    }
    return next((words for part, words in short.items() if part in found), found)


def table(found):
    lines = ["| | " + " | ".join(NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    return [*lines, *(f"| {kind} | " + " | ".join(cell(found[kind, n]) for n in NAMES) + " |" for kind in ROWS)]


def test_every_part_arrives_once_or_is_refused_by_name():
    found = {(kind, name): outcome(name, *ROWS[kind]) for kind in ROWS for name in NAMES}
    print("", *table(found), sep="\n")
    assert {where: words for where, words in found.items() if words.startswith("SILENT")} == {}
    assert "\n".join(table(found)) in (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_what_is_refused_arrives_when_told():
    for name in NAMES:
        for kind in ("reasoning_content", "reasoning in tags"):
            kept = outcome(name, *ROWS[kind], reasoning="keep")
            assert kept == "once" or (name == "llama2" and "no chat template" in kept), (name, kind)
        folded = outcome(name, *ROWS["system"], system="fold")
        assert folded == "once" or (name == "llama2" and "no chat template" in folded), name


def test_arguments_as_text_and_as_an_object_are_the_same_tokens():
    tokenizer = load("qwen3")
    rows = [ROWS[kind][0] for kind in ("calls", "calls, arguments as text")]
    one, other = (encode(row, tokenizer, DataConfig(), Report()) for row in rows)
    assert one.chosen.tolist() == other.chosen.tolist()
