"""Values of a row, checked: text, conversation turns, numbers, flags. Whatever does not fit raises `BadRow`.

Every sentence names the column and what was found, so that `file:line: sentence` can be acted upon.

Prompts and answers come out of text, turns and transcripts. A prompt is never cut out of two texts by their common
characters: shared openings of the answers would become part of it. Conversations are split by whole turns, transcripts
at their last Assistant: mark.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

from mlxdpo.data import fields, reasons
from mlxdpo.data.report import BadRow
from mlxdpo.types import Message, Text

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
    # ShareGPT's names for the same roles.
    **{name: "assistant" for name in ("gpt", "chatgpt", "bot", "model", "bard", "bing")},
    **{"human": "user", "function": "tool", "observation": "tool", "function_response": "tool"},
}

_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Row(NamedTuple):
    """One row of a source with the place it came from ("pairs.jsonl:37"); `credit` is `data.credit`."""

    where: str
    values: Mapping[str, Any]
    credit: str | None = None


class Kind(NamedTuple):
    """What a column may hold: `name` for sentences, `test` for a value."""

    name: str
    test: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """A finite number, or text that reads as one (a CSV cell); not a Boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def is_messages(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    """A list of objects, at least one; `messages` looks into them."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def is_flag(value: Any) -> bool:
    """true or false, 1 or 0, or one of these as text (a CSV cell)."""
    return _flag(value) is not None


TEXT = Kind("text", lambda value: isinstance(value, str))
TEXT_OR_NULL = Kind("text or null", lambda value: value is None or isinstance(value, str))
TRANSCRIPT = Kind(
    "a transcript that begins with Human:", lambda v: isinstance(v, str) and v.lstrip().startswith("Human:")
)
MESSAGES = Kind("messages", is_messages)
TEXT_OR_MESSAGES = Kind("text or messages", lambda value: isinstance(value, str) or is_messages(value))
NUMBER = Kind("a number", is_number)
FLAG = Kind("true or false", is_flag)
TEXTS = Kind("a list of text", lambda v: isinstance(v, list) and bool(v) and all(isinstance(t, str) for t in v))
FLAGS = Kind("a list of true or false", lambda v: isinstance(v, list) and bool(v) and all(is_flag(f) for f in v))
STEPS = Kind("a list of steps", is_messages)
NUMBERS = Kind("a list of numbers", lambda v: isinstance(v, list) and bool(v) and all(is_number(n) for n in v))


def describe_type(value: Any) -> str:
    """What a value is, for a sentence: "a Boolean", "a list of numbers", "null"."""
    if isinstance(value, list):
        return _describe_list(value)
    if isinstance(value, Mapping):
        return "an object"
    names = {type(None): "null", bool: "a Boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _describe_list(value: list[Any]) -> str:
    if not value:
        return "an empty list"
    if is_messages(value):
        return "messages" if any("role" in turn or "from" in turn for turn in value) else "a list of objects"
    kinds = {describe_type(item) for item in value}
    plural = {"a number": "numbers", "text": "text", "a Boolean": "Booleans", "null": "nulls"}
    return f"a list of {plural.get(kinds.pop(), 'mixed values')}" if len(kinds) == 1 else "a list of mixed values"


def column_names(names: Iterable[Any]) -> str:
    """Column names for a sentence, printable whatever they are, the first dozen of them."""
    shown = [printable(str(name)) for name in itertools.islice(names, 13)]
    return ", ".join([*shown[:12], "..."] if len(shown) > 12 else shown) or "none"


def printable(text: str) -> str:
    """The first 60 characters of a text, with escapes for line ends, half characters and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:60])


def parsed(value: Any) -> Any:
    """Messages written as JSON text (a CSV cell, a twice-encoded column) as a list; else the value itself."""
    if not (isinstance(value, str) and _WRITTEN_MESSAGES.match(value)):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if is_messages(found) else value


def checked_text(values: Mapping[str, Any], name: str) -> str:
    """A text column. Refuses text that UTF-8 cannot hold, and messages printed as Python lists."""
    value = values[name]
    if not isinstance(value, str):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(value)}; expected text')
    _check_unicode(value, name)
    if _WRITTEN_MESSAGES.match(value):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is a list of messages printed as text; expected JSON')
    return value


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            reasons.INVALID_UTF8,
            f'"{name}" has a broken character at position {error.start + 1}; expected UTF-8',
        ) from None


def checked_number(values: Mapping[str, Any], name: str) -> float:
    """A number column, finite."""
    if not is_number(values[name]):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(values[name])}; expected a number')
    return float(values[name])


def flag(values: Mapping[str, Any], name: str) -> bool:
    """A true-or-false column."""
    found = _flag(values[name])
    if found is None:
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(values[name])}; expected true or false')
    return found


def _flag(value: Any) -> bool | None:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return {"true": True, "1": True, "false": False, "0": False}.get(value.lower()) if isinstance(value, str) else None


def messages(values: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A column of turns, `role`/`content` or ShareGPT's `from`/`value`, as messages with known roles."""
    value = values[name]
    if not is_messages(value):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(value)}; expected messages')
    return tuple(_message(turn, f'turn {number} of "{name}"') for number, turn in enumerate(value, 1))


def _message(turn: Mapping[str, Any], place: str) -> Message:
    role_key, content_key = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    if role_key not in turn:
        raise BadRow(reasons.WRONG_TYPE, f"{place} has neither role nor from; it has {column_names(turn)}")
    role = ROLES.get(turn[role_key].lower()) if isinstance(turn[role_key], str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise BadRow(
            reasons.UNKNOWN_ROLE, f"{place} has the role {printable(repr(turn[role_key]))}; expected one of {known}"
        )
    # Parquet fills keys that only other turns have with nulls.
    extra = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    content = turn.get(content_key)
    if content is None and extra.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(reasons.WRONG_TYPE, f"the {content_key} of {place} is {describe_type(content)}; expected text")
    _check_unicode(content, place.replace('"', "'"))
    return Message(role, content, extra)


def tools(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The `tools` column: a list of objects, the same as JSON text, or nothing."""
    value = values.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(reasons.WRONG_TYPE, '"tools" is text that is not JSON; expected a list of tools') from None
    if value is None or value in ("", []):
        return ()
    if not is_messages(value):
        raise BadRow(reasons.WRONG_TYPE, f'"tools" is {describe_type(value)}; expected a list of tools')
    return tuple(value)


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
