"""A row's turns in the form that a chat template reads: content as text, calls as objects, reasoning under its name.

Data sets write the same turn in several ways (arguments as JSON text or as an object, reasoning under three names or
between <think> tags, content as parts). Each comes out as one form here, and then as the form that the template prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mlxdpo.data import reasons
from mlxdpo.data.report import BadRow
from mlxdpo.types import Message

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn under which reasoning stands: Qwen3's and DeepSeek's, vLLM's, gpt-oss'."""
INLINE = "<think>"
"""The other form: in the content, between tags. The opening one may be missing where the prompt ended in it."""
SYSTEM = ("system", "developer")

_THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*?)(\s*</think>\s*)", re.DOTALL)


class Thought(NamedTuple):
    """An assistant turn's reasoning: the form it stands in, its text, and the turn without it."""

    form: str
    text: str
    rest: Message


def canonical(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with text as content, and calls as `{"type", "function": {"name", "arguments"}}` with parsed arguments.

    Raises `BadRow` for content or calls of another kind.
    """
    return tuple(turn if isinstance(turn.content, str) and not turn.extra else _canonical(turn) for turn in turns)


def _canonical(turn: Message) -> Message:
    extra = dict(turn.extra)
    if extra.get("function_call"):  # OpenAI's name before there were several
        extra["tool_calls"] = [*(extra.get("tool_calls") or ()), extra.pop("function_call")]
    if calls := extra.get("tool_calls"):
        calls = _parsed(calls)
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            raise BadRow(reasons.WRONG_TYPE, f"tool_calls is {str(calls)[:40]!r}; expected a list of calls")
        extra["tool_calls"] = [_call(call) for call in calls]
    return Message(turn.role, content_text(turn.content), extra)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    if not isinstance(function.get("name"), str):
        raise BadRow(
            reasons.WRONG_TYPE, f"a tool call names no function; it has {', '.join(map(str, call)) or 'nothing'}"
        )
    arguments = _parsed(function.get("arguments", {}))
    return {
        **{k: v for k, v in call.items() if k not in ("function", "name", "arguments")},
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments},
    }


def _parsed(value: Any) -> Any:
    """JSON text that holds an object or a list, as that; anything else stays."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def content_text(content: Any) -> str:
    """Content as text. Parts are joined as they stand; raises `BadRow` for a part that is no text (an image)."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        raise BadRow(reasons.WRONG_TYPE, f"the content of a turn is {type(content).__name__}; expected text")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type", "something else") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow("content that is not text", f"a part of a turn's content is {kind}; only text can be trained")
        texts.append(text)
    return "".join(texts)


def thought_of(turn: Message) -> Thought | None:
    """The reasoning of an assistant turn; None where there is none."""
    if turn.role != "assistant":
        return None
    for key in REASONING:
        text = turn.extra.get(key)
        if isinstance(text, str) and text.strip():
            return Thought(key, text, turn._replace(extra={k: v for k, v in turn.extra.items() if k not in REASONING}))
    found = _THOUGHT.match(turn.content) if "</think>" in turn.content else None
    if found is None or not found[2].strip():
        return None
    return Thought(INLINE, found[0], turn._replace(content=turn.content[found.end() :]))


def split_thought(content: str) -> tuple[str, str, str, str] | None:
    """Content with reasoning between tags as opening tag, reasoning, closing tag and answer; None for other content."""
    found = _THOUGHT.match(content) if "</think>" in content else None
    return None if found is None else (found[1], found[2], found[3], content[found.end() :])


def thought_block(thought: Thought) -> str:
    """Reasoning as it stands before an answer: as the row has it, or between tags on lines for themselves."""
    if thought.form != INLINE:
        return f"<think>\n{thought.text.strip()}\n</think>\n\n"
    return thought.text if thought.text.lstrip().startswith("<think>") else f"<think>\n{thought.text}"


def with_thought_as(turn: Message, form: str) -> Message:
    """An assistant turn whose reasoning stands in `form`, a key of `REASONING`; other turns as they are."""
    thought = thought_of(turn)
    if thought is None or thought.form == form:
        return turn
    parts = split_thought(turn.content) if thought.form == INLINE else None
    text = parts[1].strip() if parts else thought.text
    return thought.rest._replace(extra={**thought.rest.extra, form: text})


def with_arguments_as(turn: Message, form: Literal["object", "text"]) -> Message:
    """A turn whose calls have arguments as the template prints them: as an object, or as JSON text."""
    calls = turn.extra.get("tool_calls")
    if not calls or form == "object":
        return turn
    written = [
        {**call, "function": {**call["function"], "arguments": _json_text(call["function"]["arguments"])}}
        for call in calls
    ]
    return turn._replace(extra={**turn.extra, "tool_calls": written})


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def folded(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with what a system turn says in front of the next user turn, an empty line between them.

    Raises `BadRow` for a system turn that no user turn follows.
    """
    found: list[Message] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role in SYSTEM:
            waiting.append(turn.content)
        elif turn.role == "user" and waiting:
            found.append(turn._replace(content="\n\n".join([*waiting, turn.content])))
            waiting = []
        else:
            found.append(turn)
    if waiting:
        raise BadRow("system turn without a user turn after it", "no user turn follows the system turn to fold it into")
    return tuple(found)
