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
    **{name: "assistant" for name in ("gpt", "chatgpt", "bot", "model", "bard", "bing", "function_call")},
    **{"human": "user", "function": "tool", "observation": "tool", "function_response": "tool"},
}

_WRITTEN_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Row(NamedTuple):
    """One row of a source with the place it came from ("pairs.jsonl:37"); `credit` is `data.credit`."""

    where: str
    values: Mapping[str, Any]
    credit: str | None = None


class Kind(NamedTuple):
    """What a column may hold: `name` for sentences, `test` for a value; of objects the `keys` that are read, if few."""

    name: str
    test: Callable[[Any], bool]
    keys: frozenset[str] = frozenset()


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
ASKED_MESSAGES = Kind(
    "messages that end with a user or tool turn", lambda value: is_messages(value) and not _is_answer(value[-1])
)
TEXT_OR_MESSAGES = Kind("text or messages", lambda value: isinstance(value, str) or is_messages(value))
NUMBER = Kind("a number", is_number)
FLAG = Kind("true or false", is_flag)
TEXTS = Kind("a list of text", lambda v: isinstance(v, list) and bool(v) and all(isinstance(t, str) for t in v))
FLAGS = Kind("a list of true or false", lambda v: isinstance(v, list) and bool(v) and all(is_flag(f) for f in v))
STEPS = Kind("a list of steps", is_messages)
NUMBERS = Kind("a list of numbers", lambda v: isinstance(v, list) and bool(v) and all(is_number(n) for n in v))


def objects(*keys: str) -> Kind:
    """A list of objects that have these keys."""
    return Kind(
        f"a list of objects with {' and '.join(keys)}",
        lambda value: is_messages(value) and all(turn.keys() >= {*keys} for turn in value),
        frozenset(keys),
    )


def _is_answer(turn: Mapping[str, Any]) -> bool:
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"


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
    """Messages written as JSON text (a CSV cell, a twice-encoded column) as a list, and one message as a list of it;
    else the value itself."""
    if isinstance(value, str) and _WRITTEN_MESSAGES.match(value):
        found = decoded_json(value)
        return value if found is value or not (is_messages(found) or _is_message(found)) else parsed(found)
    return [value] if _is_message(value) else value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value.keys() & {"role", "from"})


def decoded_json(value: Any) -> Any:
    """What a text says in JSON; the value itself where it is no text, or its text no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


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
    said = turn[role_key].lower() if isinstance(turn[role_key], str) else ""
    role = ROLES.get(said)
    if role is None:
        known = ", ".join(ROLES)
        raise BadRow(
            reasons.UNKNOWN_ROLE, f"{place} has the role {printable(repr(turn[role_key]))}; expected one of {known}"
        )
    # JSON that was written from Arrow has null under keys that only other turns have.
    extra = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    if "content" in extra:
        raise BadRow(reasons.WRONG_TYPE, f"{place} has a value and a content; expected one of them")
    content = turn.get(content_key)
    if said == "function_call":  # ShareGPT's way to write a call
        extra, content = extra | {"tool_calls": content}, ""
    if extra.get("tool_calls") in ([], ""):
        del extra["tool_calls"]
    if "tool_calls" in extra:
        extra["tool_calls"] = _calls(extra["tool_calls"], place)
    if content is None and extra.get("tool_calls"):
        content = ""
    return Message(role, _text_of_content(content, f"the {content_key} of {place}"), extra)


def _text_of_content(content: Any, place: str) -> str:
    """Text, or the texts of its parts one behind the other, as chat templates print them."""
    if isinstance(content, list):
        content = "".join(_text_of_part(part, place) for part in content)
    if not isinstance(content, str):
        raise BadRow(reasons.WRONG_TYPE, f"{place} is {describe_type(content)}; expected text")
    _check_unicode(content, place.replace('"', "'"))
    return content


def _text_of_part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else describe_type(part)
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise BadRow(reasons.NOT_TEXT, f"{place} has a part of type {printable(str(kind))}; only text is read")
    return part["text"]


def _calls(value: Any, place: str) -> list[Any]:
    """Tool calls with the arguments as an object, whether they came as one or as JSON text (OpenAI's way)."""
    found = decoded_json(value)
    calls = [found] if isinstance(found, Mapping) else found
    if not is_messages(calls):
        raise BadRow(
            reasons.WRONG_TYPE, f"the tool calls of {place} are {describe_type(value)}; expected a list of calls"
        )
    bare = [
        call if "function" in call or "name" not in call else {"type": "function", "function": call} for call in calls
    ]
    return [_with_object(call, "function", "arguments") for call in bare]


def _with_object(value: Mapping[str, Any], inner: str, name: str) -> dict[str, Any]:
    """A call or a tool in which the object called `name` is no JSON text."""
    function = value.get(inner)
    if isinstance(function, Mapping) and isinstance(found := decoded_json(function.get(name)), Mapping):
        return {**value, inner: {**function, name: found}}
    return dict(value)


def tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A `tools` column: a list of objects, one of them, either as JSON text, or nothing."""
    found = decoded_json(value)
    if isinstance(found, str) and found.strip():
        raise BadRow(reasons.WRONG_TYPE, '"tools" is text that is not JSON; expected a list of tools')
    listed = [found] if isinstance(found, Mapping) else found
    if listed is None or listed == [] or isinstance(listed, str):
        return ()
    each = [decoded_json(tool) for tool in listed] if isinstance(listed, list) else listed
    if not is_messages(each):
        raise BadRow(reasons.WRONG_TYPE, f'"tools" is {describe_type(listed)}; expected a list of tools')
    return tuple(_without_nulls(_with_object(tool, "function", "parameters")) for tool in each)


def _without_nulls(schema: Any) -> Any:
    """A tool's schema without the nulls of JSON that was written from Arrow; JSON schema has none but as a value."""
    if isinstance(schema, list):
        return [_without_nulls(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {k: _without_nulls(v) for k, v in schema.items() if v is not None or k in ("default", "const")}


_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NEXT_MARK = re.compile(r"\n\n(Human|Assistant):")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def prompt_of_row(row: Mapping[str, Any], name: str) -> Text:
    """A prompt column: text, which may be empty, or turns with something said by a user."""
    return fields.checked_text(row, name) if isinstance(row[name], str) else prompt_turns(fields.messages(row, name))


def asked_prompt(prompt: Text, name: str = "prompt") -> Text:
    """The prompt, unless it is text without a word: a chat template has nothing to answer then."""
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow(
            reasons.EMPTY_PROMPT,
            f'"{name}" is empty; expected the text to answer, or data.template plain to train on answers without one',
        )
    return prompt


def prompt_turns(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns of a prompt, checked: a user says something, and the last word is not the assistant's."""
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise BadRow(reasons.EMPTY_PROMPT, "the prompt has no user turn with text; expected one to answer")
    if turns[-1].role == "assistant":
        raise BadRow(
            reasons.NOT_ONE_ANSWER,
            "the prompt ends with an assistant turn; expected a user or tool turn (the beginning of an answer is for "
            "plain text: a prompt and answers as text, with data.template plain)",
        )
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


def split_last_turns(
    row: Mapping[str, Any], better: str = "chosen", worse: str = "rejected"
) -> tuple[tuple[Message, ...], Text, Text]:
    """Two conversations as prompt, chosen, rejected: the shared leading turns, then one assistant turn each."""
    chosen, rejected = fields.messages(row, better), fields.messages(row, worse)
    if chosen == rejected:
        raise BadRow(reasons.IDENTICAL, f'"{better}" and "{worse}" are the same')
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not len(chosen) == len(rejected) == shared + 1:
        raise BadRow(
            reasons.DIVERGED,
            f'"{better}" ({len(chosen)} turns) and "{worse}" ({len(rejected)}) part at turn {shared + 1}; '
            "expected them to differ in the last turn only",
        )
    answers = one_answer(chosen[shared:], better), one_answer(rejected[shared:], worse)
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


def transcript_turns(text: str) -> Text:
    """A Human:/Assistant: transcript that ends with an empty Assistant: turn as the turns before it; else the text."""
    marks = list(_MARK.finditer(text))
    if (
        len(marks) < 2
        or marks[-1][1] != "Assistant"
        or text[marks[-1].end() :].strip()
        or text[: marks[0].start()].strip()
    ):
        return text
    return prompt_turns(_transcript(text, marks[:-1], marks[-1].start()))


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
