"""Marks in every part of a row, looked for in what a chat template makes of it: nothing is lost without a word.

A template may print no tools, drop a turn whose role it does not know, or read reasoning under another name. None of
that raises. So the parts of a row are replaced by words that occur nowhere else, and the rendered text is searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlxdpo.data.report import BadRow
from mlxdpo.data.turns import REASONING, SYSTEM, split_thought
from mlxdpo.types import Message

Kind = Literal["content", "reasoning", "call", "tool", "detail"]


class RowPart(NamedTuple):
    """A part of a row: what kind it is, its name, the turn it stands in (-1: the tools), and the mark planted there.

    A "detail" changes what a model knows, not what it has to answer: descriptions, ids, names and unknown keys.
    """

    kind: Kind
    name: str
    turn: int
    mark: str


class Marked(NamedTuple):
    """A row with marks for its parts."""

    turns: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    parts: tuple[RowPart, ...]

    @property
    def shape(self) -> str:
        """The same text for rows that a template treats alike: their parts are other words in the same places."""
        return json.dumps([self.turns, self.tools], default=str)


Mark = Callable[[Kind, str], str]


def plant(turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Marked:
    """Marks in canonical turns and in tools: content, reasoning, calls, arguments, schemas, and what stands besides."""
    parts: list[RowPart] = []

    def at(turn: int) -> Mark:
        """Marks for one turn. Nine letters and digits: Mistral's templates take no other id of a call."""

        def mark(kind: Kind, name: str) -> str:
            """A word for a part."""
            parts.append(RowPart(kind, name, turn, f"Mk{len(parts):06d}z"))
            return parts[-1].mark

        return mark

    ids: dict[str, str] = {}
    found = tuple(_marked_turn(turn, at(index), ids) for index, turn in enumerate(turns))
    return Marked(found, tuple(_marked_tool(tool, at(-1)) for tool in tools), tuple(parts))


def arrived(parts: Sequence[RowPart], text: str) -> dict[RowPart, int]:
    """How often each part stands in the rendered text."""
    return {part: text.count(part.mark) for part in parts}


def _marked_turn(turn: Message, mark: Mark, ids: dict[str, str]) -> Message:
    return Message(turn.role, _marked_content(turn, mark), {
        key: _marked_extra(key, value, mark, ids) for key, value in turn.extra.items()
    })  # fmt: skip


def _marked_content(turn: Message, mark: Mark) -> str:
    parts = split_thought(turn.content) if turn.role == "assistant" else None
    if parts is None:
        return mark("content", turn.role) if turn.content.strip() else turn.content
    opening, reasoning, closing, answer = parts
    inside = mark("reasoning", "reasoning") if reasoning.strip() else reasoning
    return opening + inside + closing + (mark("content", turn.role) if answer.strip() else answer)


def _marked_extra(key: str, value: Any, mark: Mark, ids: dict[str, str]) -> Any:
    if value in (None, "", [], {}):
        return value
    if key == "tool_calls":
        return [_marked_call(call, mark, ids) for call in value]
    if key == "tool_call_id":
        return _marked_id(value, key, mark, ids)
    return mark("reasoning" if key in REASONING else "detail", key)


def _marked_id(value: Any, name: str, mark: Mark, ids: dict[str, str]) -> str:
    """A call and its result have the same id, and have it still."""
    if str(value) not in ids:
        ids[str(value)] = mark("detail", name)
    return ids[str(value)]


def _marked_call(call: Mapping[str, Any], mark: Mark, ids: dict[str, str]) -> dict[str, Any]:
    function = call["function"]
    found: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": mark("call", f"the call of {function['name']}"),
            "arguments": _marked_arguments(function["arguments"], f"an argument of {function['name']}", mark),
        },
    }
    for key, value in call.items():
        if key not in found and value is not None:
            found[key] = _marked_id(value, "id of a tool call", mark, ids) if key == "id" else mark("detail", key)
    return found


def _marked_arguments(value: Any, name: str, mark: Mark) -> Any:
    if isinstance(value, Mapping):
        return {mark("call", name): _marked_arguments(inner, name, mark) for inner in value.values()}
    if isinstance(value, list | tuple):
        return [_marked_arguments(inner, name, mark) for inner in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    return mark("call", name)


def _marked_tool(tool: Mapping[str, Any], mark: Mark) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _marked_tool(tool["function"], mark)}
    found: dict[str, Any] = {}
    if "name" in tool:
        found["name"] = mark("tool", f"the name {tool['name']}")
    if isinstance(tool.get("description"), str) and tool["description"].strip():
        found["description"] = mark("detail", "description of a tool")
    return found | {key: _marked_schema(value, mark) for key, value in tool.items() if key not in found}


def _marked_schema(value: Any, mark: Mark) -> Any:
    """A JSON schema with marks for the names and descriptions of properties; types and other rules stay."""
    if isinstance(value, list | tuple):
        return [_marked_schema(inner, mark) for inner in value]
    if not isinstance(value, Mapping):
        return value
    properties = value.get("properties")
    named = properties if isinstance(properties, Mapping) else {}
    names = {name: mark("tool", f"the parameter {name}") for name in named}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if key == "properties" and named:
            found[key] = {names[name]: _marked_schema(of, mark) for name, of in named.items()}
        elif key == "required" and isinstance(inner, list | tuple):
            found[key] = [names.get(name, name) if isinstance(name, str) else name for name in inner]
        elif key == "description" and isinstance(inner, str) and inner.strip():
            found[key] = mark("detail", "description of a parameter")
        else:
            found[key] = _marked_schema(inner, mark)
    return found


class Arrival(NamedTuple):
    """What a template made of a marked row: how often each part stands in the text, and roles it writes as answers."""

    counts: tuple[int, ...]
    as_answers: tuple[str, ...] = ()


FOLD = "set data.system to fold to put it in front of the user turn"
OTHER_MODEL = "use a model whose chat template supports it"
STRIPPED = "reasoning that the chat template strips"


def judge(marked: Marked, arrival: Arrival, answers: int, reasoning: str) -> list[str]:
    """What became of a row's parts that is to be counted; turns from `answers` on are completions.

    `reasoning` is the setting of that name. Raises `BadRow` for a part whose loss changes what is taught.
    """
    for role in arrival.as_answers:
        remedy = FOLD if role in SYSTEM else OTHER_MODEL
        raise BadRow(
            "role that the chat template does not know",
            f"the chat template writes the {role} turn as an assistant's; {remedy}",
        )
    found: list[str] = []
    for part, count in zip(marked.parts, arrival.counts, strict=True):
        if count == 0:
            found += _lost(part, marked, part.turn >= answers, reasoning)
        elif count > 1 and part.kind in ("content", "reasoning"):
            if part.turn >= answers:
                raise BadRow(
                    "answer that the chat template repeats",
                    f"the chat template prints the answer's {part.name} {count} times",
                )
            found.append("turn that the chat template prints more than once")
    return list(dict.fromkeys(found))


def _lost(part: RowPart, marked: Marked, of_answer: bool, reasoning: str) -> list[str]:
    """The change to count for a part that did not arrive, or `BadRow`."""
    if part.kind == "detail":
        return [f"{part.name}: not printed by the chat template"]
    if part.kind == "reasoning":
        if not of_answer:
            return ["reasoning of an earlier turn: not printed by the chat template"]
        if reasoning == "drop":
            return [STRIPPED]
        ways = "; set data.reasoning to keep to train it before the answer, or to drop to train the answer alone"
        raise BadRow(STRIPPED, f"the chat template does not print the answer's {part.name}{ways}")
    if part.kind == "tool":
        raise BadRow(
            "tools that the chat template omits",
            f"the chat template does not print {part.name} of the {len(marked.tools)} tools; {OTHER_MODEL}, or take"
            " `tools` out of the rows",
        )
    if part.kind == "call":
        raise BadRow(
            "tool call that the chat template omits",
            f"the chat template does not print {part.name}; {OTHER_MODEL}",
        )
    remedy = FOLD if part.name in SYSTEM else OTHER_MODEL
    raise BadRow(
        f"{part.name} turn that the chat template omits",
        f"the chat template does not print turn {part.turn + 1} ({part.name}); {remedy}",
    )
