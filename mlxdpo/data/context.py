"""What stands beside the texts of a row and changes what the model reads, whatever the row's shape: system prompt,
history, tools, images, settings of the chat template. Each is used, or the row is refused by name.

Besides: the numbers of a pair in columns that `data.columns` names, and the names of the unused columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig
from mlxdpo.data import fields, reasons
from mlxdpo.data.fields import Row, as_turns, asked_prompt, decoded_json, describe_type, is_messages, is_number
from mlxdpo.data.report import BadRow
from mlxdpo.types import Extras, Message, Preference, Text, UnpairedExample

Item = Preference | UnpairedExample

SYSTEM_COLUMNS = ("system", "system_prompt")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
TOOLS_COLUMNS = ("tools", "input.tools")
HISTORY, TEMPLATE_SETTINGS = "history", "chat_template_kwargs"
CONTEXT_COLUMNS = frozenset({*SYSTEM_COLUMNS, *MEDIA_COLUMNS, *TOOLS_COLUMNS, HISTORY, TEMPLATE_SETTINGS})

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
"""The columns, in pairs, that hold the scores of the two completions in published sets."""


def in_context(items: Sequence[Item], values: Mapping[str, Any], own: Collection[str], data: DataConfig) -> list[Item]:
    """The items of a row with its context. `own` are the columns that the row's shape reads as something else.

    Raises `BadRow` for a context that cannot be used, and for an empty prompt unless `data.template` is plain.
    """
    beside = {name: values[name] for name in CONTEXT_COLUMNS & values.keys() - own if _holds(values[name])}
    for name in MEDIA_COLUMNS:
        if name in beside:
            raise BadRow(
                reasons.NOT_TEXT,
                f'"{name}" holds {describe_type(beside[name])}; only text is supported, so skip such rows, or '
                "take the column out if the texts make sense alone",
            )
    _check_template_settings(beside.get(TEMPLATE_SETTINGS), data)
    tools = next((found for name in TOOLS_COLUMNS if (found := fields.tools(beside.get(name)))), ())
    before = (*_system_turn(beside), *_history(beside.get(HISTORY)))
    return [_placed(item, before, tools, data) for item in items]


def _holds(value: Any) -> bool:
    return value is not None and value != [] and value != {} and not (isinstance(value, str) and not value.strip())


def _check_template_settings(value: Any, data: DataConfig) -> None:
    found = decoded_json(value)
    if found is not None and not isinstance(found, Mapping):
        said = describe_type(value)
        raise BadRow(reasons.WRONG_TYPE, f'"{TEMPLATE_SETTINGS}" is {said}; expected an object of settings')
    for name, wanted in (found or {}).items():
        if not _holds(wanted):  # a setting that is left empty, as data sets with one schema for all rows have it
            continue
        if name != "enable_thinking" or bool(wanted) != data.thinking:
            way = f"set data.thinking to {str(bool(wanted)).lower()}" if name == "enable_thinking" else "take it out"
            shown = fields.printable(f"{name} {str(wanted).lower()}")
            raise BadRow(reasons.CONTEXT, f'"{TEMPLATE_SETTINGS}" asks for {shown}; {way}')


def _system_turn(beside: Mapping[str, Any]) -> tuple[Message, ...]:
    texts = {name: fields.checked_text(beside, name) for name in SYSTEM_COLUMNS if name in beside}
    if len(set(texts.values())) > 1:
        raise BadRow(reasons.CONTEXT, f"{' and '.join(texts)} hold different system prompts; keep one")
    return (Message("system", next(iter(texts.values()))),) if texts else ()


def _history(value: Any) -> tuple[Message, ...]:
    """Earlier turns: messages, or LLaMA-Factory's pairs of what was asked and what was answered."""
    found = decoded_json(value)
    if found is None:
        return ()
    if is_messages(found):
        return fields.messages({HISTORY: found}, HISTORY)
    rounds = found if isinstance(found, list) else [found]
    if not all(isinstance(two, list) and len(two) == 2 and all(isinstance(t, str) for t in two) for two in rounds):
        said = describe_type(value)
        raise BadRow(reasons.WRONG_TYPE, f'"{HISTORY}" is {said}; expected pairs of question and answer, or messages')
    said = [fields.checked_text({HISTORY: text}, HISTORY) for two in rounds for text in two]
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(said))


def _placed(item: Item, before: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...], data: DataConfig) -> Item:
    if data.template != "plain":
        asked_prompt(item.prompt)
    if tools:
        item = replace(item, tools=tools)
    if before:
        item = _behind(item, before, data)
    for name in ("prompt", *_answers_of(item)):
        if not isinstance(text := getattr(item, name), str) and any(turn.extra.get("tool_calls") for turn in text):
            item = replace(item, **{name: tuple(_without_foreign_nulls(turn, tools) for turn in text)})
    return item


def _answers_of(item: Item) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(item, Preference) else ("completion",)


def _behind(item: Item, before: tuple[Message, ...], data: DataConfig) -> Item:
    """The item with earlier turns in front of its prompt, which is a conversation then."""
    if isinstance(item.prompt, str) and data.template == "plain":
        name = "system" if before[0].role == "system" else HISTORY
        raise BadRow(reasons.CONTEXT, f"{name} cannot precede a plain-text prompt; set data.template to chat")
    turns = as_turns(item.prompt)
    if before[0].role == "system" and turns[0].role in ("system", "developer"):
        if before[0].content.split() != turns[0].content.split():
            raise BadRow(
                reasons.CONTEXT, "the system column and the system turn of the prompt are different; keep one of them"
            )
        before, turns = (turns[0], *before[1:]), turns[1:]
    elif before[0].role != "system" and turns[0].role in ("system", "developer"):
        before, turns = (turns[0], *before), turns[1:]
    changed = {name: _as_answer(getattr(item, name)) for name in _answers_of(item)}
    return replace(item, prompt=(*before, *turns), **changed)


def _as_answer(text: Text) -> Text:
    return (Message("assistant", text),) if isinstance(text, str) else text


def _without_foreign_nulls(turn: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    """A call without null arguments that its tool does not have: JSON written from Arrow has those of all tools."""
    schemas = [tool.get("function", tool) for tool in tools]
    known = {
        s["name"]: s.get("parameters") for s in schemas if isinstance(s, Mapping) and isinstance(s.get("name"), str)
    }
    calls = turn.extra.get("tool_calls")
    if not calls or not known:
        return turn
    return turn._replace(extra={**turn.extra, "tool_calls": [_own_arguments(call, known) for call in calls]})


def _own_arguments(call: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return call
    schema, arguments = known.get(function["name"]), function.get("arguments")
    own = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(arguments, Mapping):
        return call
    kept = {name: value for name, value in arguments.items() if value is not None or name in own}
    return {**call, "function": {**function, "arguments": kept}}


def unread_columns(
    values: Mapping[str, Any], own: Collection[str], inner: Mapping[str, Collection[str]], data: DataConfig
) -> list[str]:
    """The columns of a row that hold something and that nothing reads; `a.b` is the key b of the objects in column a.

    `own` are the columns that the row's shape reads, `inner` the keys in those of which it reads only some.
    """
    named = {own_name for name, own_name in data.columns.items() if name in COLUMNS} | data.columns.keys()
    scores = {name for better, worse, *_ in scores_of(values, data) for name in (better, worse)}
    read = {*own, *CONTEXT_COLUMNS, *named, *scores}
    outer = [name for name, value in values.items() if name not in read and _holds(value)]
    parts = {
        f"{name}.{key}": None
        for name, keys in inner.items()
        for part in values.get(name) or ()
        for key, value in part.items()
        if key not in keys and _holds(value)
    }
    return [*outer, *parts]


def scores_of(values: Mapping[str, Any], data: DataConfig) -> Iterator[tuple[str, str, float, float]]:
    """The scores of the two completions of a pair that a row has: both columns' names and numbers, chosen first.

    Where `data.columns` exchanges chosen and rejected, their scores are exchanged too.
    """
    exchanged = (data.columns.get("chosen"), data.columns.get("rejected")) == ("rejected", "chosen")
    for two in SCORES:
        better, worse = two[::-1] if exchanged else two
        if better in values and is_number(values[better]) and is_number(values.get(worse)):
            yield better, worse, float(values[better]), float(values[worse])


class ExtraColumn(NamedTuple):
    """A column: the field of `Extras` it fills, what its numbers must be, and a test of them."""

    field: str
    expected: str
    fits: Callable[[float], bool]


COLUMNS = {
    "probability": ExtraColumn("label", "a probability from 0 to 1", lambda x: 0 <= x <= 1),
    "weight": ExtraColumn("weight", "a number of at least 0", lambda x: x >= 0),
    "margin": ExtraColumn("margin", "a number", lambda x: True),
}
"""What a row says of its pair besides texts, in columns that `data.columns` names so.

Only a named column counts: published sets have columns of these names that mean something else.
"""


def with_extras(items: Sequence[Item], rows: Sequence[Row], columns: Mapping[str, str]) -> list[Item]:
    """The items of a row, or of the gathered rows of a prompt, with what its named columns say.

    Raises `BadRow` for a value that is none, and for a row that makes several pairs, of which none owns the number.
    """
    named = {name: own for name, own in columns.items() if name in COLUMNS}
    if not named:
        return list(items)
    if len(items) > 1 or len(rows) > 1:
        raise BadRow(
            reasons.WRONG_TYPE, f'the row makes several pairs, so "{next(iter(named.values()))}" belongs to none'
        )
    extras = Extras(
        **{COLUMNS[name].field: _extra_number(rows[0].values[name], own, COLUMNS[name]) for name, own in named.items()}
    )
    return [replace(item, extras=extras) for item in items]


def _extra_number(value: Any, name: str, said: ExtraColumn) -> float:
    if not is_number(value):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(value)}; expected {said.expected}')
    if not said.fits(float(value)):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {float(value):g}; expected {said.expected}')
    return float(value)
