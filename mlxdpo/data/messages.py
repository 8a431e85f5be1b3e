"""Prompts and answers out of text, turns and transcripts: where the prompt ends and the one answer begins.

A prompt is never cut out of two texts by their common characters: shared openings of the answers would become
part of it. Conversations are split by whole turns, transcripts at their last Assistant: mark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxdpo.data import fields, reasons
from mlxdpo.data.report import BadRow
from mlxdpo.types import Message, Text

_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NEXT_MARK = re.compile(r"\n\n(Human|Assistant):")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def prompt_of_row(row: Mapping[str, Any], name: str) -> Text:
    """A prompt column: text, or turns with something said by a user."""
    if not isinstance(row[name], str):
        return prompt_turns(fields.messages(row, name))
    text = fields.checked_text(row, name)
    if not text.strip():
        raise BadRow(reasons.EMPTY_PROMPT, f'"{name}" is empty; expected the text to answer')
    return text


def prompt_turns(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns of a prompt, checked: a user says something, and the last word is not the assistant's."""
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise BadRow(reasons.EMPTY_PROMPT, "the prompt has no user turn with text; expected one to answer")
    if turns[-1].role == "assistant":
        raise BadRow(reasons.NOT_ONE_ANSWER, "the prompt ends with an assistant turn; expected a user or tool turn")
    return turns


def as_turns(prompt: Text) -> tuple[Message, ...]:
    """A prompt as turns: text becomes one user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def answer(row: Mapping[str, Any], name: str, prompt: Text) -> Text:
    """A completion column: text beside a text prompt, else one assistant turn, its repeated prompt taken off."""
    if isinstance(row[name], str) or not fields.is_messages(row[name]):
        text = fields.checked_text(row, name)
        if not text.strip():
            raise BadRow(reasons.EMPTY_COMPLETION, f'"{name}" is empty; expected a completion')
        return text if isinstance(prompt, str) else (Message("assistant", text),)
    turns, before = fields.messages(row, name), as_turns(prompt)
    return one_answer(turns[len(before) :] if turns[: len(before)] == before else turns, name)


def one_answer(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Exactly one assistant turn that says something or calls a tool."""
    if [turn.role for turn in turns] != ["assistant"]:
        roles = ", ".join(turn.role for turn in turns) or "no turn"
        raise BadRow(reasons.NOT_ONE_ANSWER, f'"{name}" holds {roles} after the prompt; expected one assistant turn')
    if not turns[0].content.strip() and not turns[0].extra.get("tool_calls"):
        raise BadRow(reasons.EMPTY_COMPLETION, f'the assistant turn of "{name}" is empty; expected a completion')
    return turns


def split_last_turns(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], Text, Text]:
    """Two conversations as prompt, chosen, rejected: the shared leading turns, then one assistant turn each."""
    chosen, rejected = fields.messages(row, "chosen"), fields.messages(row, "rejected")
    if chosen == rejected:
        raise BadRow(reasons.IDENTICAL, '"chosen" and "rejected" are the same')
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not len(chosen) == len(rejected) == shared + 1:
        raise BadRow(
            reasons.DIVERGED,
            f'"chosen" ({len(chosen)} turns) and "rejected" ({len(rejected)}) part at turn {shared + 1}; '
            "expected them to differ in the last turn only",
        )
    answers = one_answer(chosen[shared:], "chosen"), one_answer(rejected[shared:], "rejected")
    return prompt_turns(chosen[:shared]), *answers


def split_transcripts(row: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Two Human:/Assistant: transcripts as prompt turns and one assistant turn each."""
    chosen, rejected = fields.checked_text(row, "chosen"), fields.checked_text(row, "rejected")
    marks = list(_MARK.finditer(chosen))
    if len(marks) < 2 or marks[-1][1] != "Assistant":
        raise BadRow(reasons.NOT_ONE_ANSWER, '"chosen" does not end with an Assistant: turn')
    end = marks[-1].end()
    if chosen[:end] != rejected[:end] or _NEXT_MARK.search(rejected, end):
        raise BadRow(
            reasons.DIVERGED,
            '"chosen" and "rejected" part before the last Assistant: turn; expected only that turn to differ',
        )
    prompt = prompt_turns(_transcript(chosen, marks[:-1], marks[-1].start()))
    return prompt, _text_of_turn(chosen[end:], "chosen"), _text_of_turn(rejected[end:], "rejected")


def _text_of_turn(text: str, name: str) -> tuple[Message, ...]:
    return one_answer((Message("assistant", text.strip()),), name)


def _transcript(text: str, marks: list[re.Match[str]], end: int) -> tuple[Message, ...]:
    stops = [*(mark.start() for mark in marks[1:]), end]
    return tuple(
        Message(
            fields.ROLES[mark[1].lower()] if mark[1] == "Human" else "assistant",
            text[mark.end() : stop].strip(),
        )
        for mark, stop in zip(marks, stops, strict=True)
    )


def extra_id_turns(text: str) -> tuple[Message, ...]:
    """HelpSteer's prompt: the user's first turn, then <extra_id_1>Assistant and <extra_id_1>User marks."""
    first, *rest = _EXTRA_ID.split(text)
    later = zip(rest[::2], rest[1::2], strict=True)
    return (Message("user", first), *(Message(role.lower(), said) for role, said in later))
