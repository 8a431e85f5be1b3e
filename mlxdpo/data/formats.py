"""The registry of row shapes, how a row's shape is detected, and how a row of a shape is converted and checked.

Detection looks at columns *and types*, because well-known sets share column names with different contents. To
add a shape: write its function in `converters.py`, add a `Format`, add a row to the fixtures of the tests.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlxdpo.data import converters, fields, reasons, trajectories
from mlxdpo.data.converters import Items
from mlxdpo.data.fields import Kind, Row, describe_type, is_number
from mlxdpo.data.report import BadRow
from mlxdpo.types import Extras, Preference, UnpairedExample, UserError

# What a row says of its pair besides texts: columns that `data.columns` names as probability, weight or margin.
#
# Only a named column counts: published sets have columns of these names that mean something else.

Item = Preference | UnpairedExample
Part = Item | BadRow
"""What a row gives: items, and why a part of it is none."""


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


def with_extras(items: Sequence[Part], rows: Sequence[Row], columns: Mapping[str, str]) -> Iterator[Part]:
    """The items of a row, or of the gathered rows of a prompt, with what its named columns say.

    Raises `BadRow` for a value that is none, and for a row that makes several pairs, of which none owns the number.
    """
    named = {name: own for name, own in columns.items() if name in COLUMNS}
    if not named:
        yield from items
        return
    if len(items) > 1 or len(rows) > 1:
        raise BadRow(
            reasons.WRONG_TYPE, f'the row makes several pairs, so "{next(iter(named.values()))}" belongs to none'
        )
    extras = Extras(
        **{COLUMNS[name].field: _extra_number(rows[0].values[name], own, COLUMNS[name]) for name, own in named.items()}
    )
    yield from (item if isinstance(item, BadRow) else dataclasses.replace(item, extras=extras) for item in items)


def _extra_number(value: Any, name: str, said: ExtraColumn) -> float:
    if not is_number(value):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe_type(value)}; expected {said.expected}')
    if not said.fits(float(value)):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {float(value):g}; expected {said.expected}')
    return float(value)


@dataclass(frozen=True)
class Format:
    """A row shape: the columns it needs and may have, and the function that reads it.

    Where `gather` is set, consecutive rows with the same prompt are gathered into one row before `convert`.
    """

    name: str
    about: str
    example: str
    columns: Mapping[str, Kind]
    convert: Callable[[Row], Items]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    gather: Callable[[Sequence[Row]], Row] | None = None


# The columns, in pairs, that hold the scores of the two completions in published sets.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
)


_ANSWERS = {"chosen": fields.TEXT_OR_MESSAGES, "rejected": fields.TEXT_OR_MESSAGES}
_TEXTS = {"chosen": fields.TEXT, "rejected": fields.TEXT}
_TURNS = {"chosen": fields.MESSAGES, "rejected": fields.MESSAGES}
_SYSTEM = {"system": fields.TEXT_OR_NULL}
_PROMPT = {"prompt": fields.TEXT}

_ALL = (  # the order is the order of detection: the more specific shape first
    Format(
        "cai",
        "a first response and its revision",
        "HuggingFaceH4/cai-conversation-harmless",
        dict.fromkeys(("init_prompt", "init_response", "revision_response"), fields.TEXT),
        converters.revision,
    ),
    Format(
        "hh",
        "transcripts of Human: and Assistant: turns",
        "Anthropic/hh-rlhf",
        {"chosen": fields.TRANSCRIPT, "rejected": fields.TRANSCRIPT},
        converters.hh,
    ),
    Format(
        "shp",
        "a post and two comments, labels 1 where comment A is better",
        "stanfordnlp/SHP",
        dict.fromkeys(("history", "human_ref_A", "human_ref_B"), fields.TEXT) | {"labels": fields.FLAG},
        converters.reddit,
        {"score_ratio": fields.NUMBER},
    ),
    Format(
        "strength",
        "two responses and a signed strength, above zero where response_2 is better",
        "nvidia/HelpSteer2:preference",
        _PROMPT | {"response_1": fields.TEXT, "response_2": fields.TEXT, "preference_strength": fields.NUMBER},
        converters.signed_strength,
    ),
    Format(
        "ratings",
        "consecutive rows of one prompt, each a response with its helpfulness",
        "nvidia/HelpSteer2",
        _PROMPT | {"response": fields.TEXT, "helpfulness": fields.NUMBER},
        converters.helpsteer,
        gather=converters.gather_helpsteer,
    ),
    Format(
        "ranked",
        "a prompt with several completions and their scores",
        "several sampled answers and their scores",
        {"prompt": fields.TEXT_OR_MESSAGES, "completions": fields.TEXTS, "scores": fields.NUMBERS},
        converters.ranked,
    ),
    Format(
        "unpaired",
        "a prompt, one completion, and label true where it is desirable (KTO)",
        "trl-lib/kto-mix-14k",
        {"prompt": fields.TEXT_OR_MESSAGES, "completion": fields.TEXT_OR_MESSAGES, "label": fields.FLAG},
        converters.opinion,
    ),
    Format(
        "completion",
        "a prompt and one completion to imitate (stage: sft)",
        "trl-lib/Capybara as prompt and completion",
        {"prompt": fields.TEXT_OR_MESSAGES, "completion": fields.TEXT_OR_MESSAGES},
        converters.demonstration,
    ),
    Format(
        "system",
        "a system prompt, a prompt and two texts",
        "jondurbin/truthy-dpo-v0.1",
        _SYSTEM | _PROMPT | _TEXTS,
        converters.system_text,
    ),
    Format("text", "a prompt and two texts", "trl-lib/tldr-preference", _PROMPT | _TEXTS, converters.text_pair),
    Format(
        "orca",
        "a question and two texts, perhaps a system prompt",
        "Intel/orca_dpo_pairs",
        {"question": fields.TEXT} | _TEXTS,
        converters.orca,
        _SYSTEM,
    ),
    Format(
        "messages",
        "prompt messages and two answers, messages or text, or two trajectories",
        "TRL's conversational rows with an explicit prompt",
        {"prompt": fields.MESSAGES} | _ANSWERS,
        converters.text_pair,
    ),
    Format(
        "turns",
        "a text prompt and two conversations that begin with it",
        "HuggingFaceH4/ultrafeedback_binarized",
        _PROMPT | _TURNS,
        converters.turns,
    ),
    Format(
        "implicit",
        "two conversations that share all but the last turn, or part earlier (trajectories)",
        "argilla/dpo-mix-7k",
        _TURNS,
        converters.implicit,
    ),
    Format(
        "steps",
        "a prompt, then step by step the turn taken (chosen) and alternatives to it (rejected), tool turns between",
        "logs of an agent with what it might have done at each step",
        {"prompt": fields.TEXT_OR_MESSAGES, "steps": fields.STEPS},
        trajectories.judged_steps,
    ),
    Format(
        "tree",
        "the turns of a trajectory so far and two texts that could come next",
        "openbmb/UltraInteract_pair",
        {"trajectory": fields.MESSAGES} | _TEXTS,
        trajectories.tree_node,
    ),
    Format(
        "step_labels",
        "a conversation, and for each assistant turn whether it is good (KTO)",
        "labelled steps of one trajectory",
        {"messages": fields.MESSAGES, "labels": fields.FLAGS},
        trajectories.labelled_steps,
    ),
    Format(
        "step_rewards",
        "a conversation, and for each assistant turn a reward, above 0 where it is good (KTO)",
        "rewarded steps of one trajectory",
        {"messages": fields.MESSAGES, "rewards": fields.NUMBERS},
        trajectories.rewarded_steps,
    ),
    Format(
        "conversation",
        "a conversation whose assistant turns are to be imitated (stage: sft)",
        "HuggingFaceH4/ultrachat_200k",
        {"messages": fields.MESSAGES},
        converters.conversation,
    ),
)

FORMATS: dict[str, Format] = {shape.name: shape for shape in _ALL}
"""Every known row shape by name, in the order of detection."""


def named_format(name: str) -> Format:
    """The format called `name`. Raises `UserError` with the known names."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: auto, {', '.join(FORMATS)}"
    raise UserError(f"data.format is {name!r}, which is no known row shape; {hint}")


def detect(row: Mapping[str, Any]) -> Format | None:
    """The first format whose columns are all there with fitting types, or None."""
    return next((shape for shape in FORMATS.values() if _misfit(shape, row) is None), None)


def detect_by_names(row: Mapping[str, Any]) -> Format | None:
    """The format whose columns are all there and which fits most of them, at least one; or None."""

    def fitting(shape: Format) -> int:
        """How many of its columns hold what they should."""
        return sum(kind.test(row[name]) for name, kind in shape.columns.items())

    there = [shape for shape in FORMATS.values() if shape.columns.keys() <= row.keys()]
    best = max(there, key=fitting, default=None)
    return best if best and fitting(best) else None


def check_columns(shape: Format, row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a column of the format that is missing or holds something else."""
    if bad := _misfit(shape, row):
        raise bad


def _misfit(shape: Format, row: Mapping[str, Any]) -> BadRow | None:
    for name, kind in shape.columns.items():
        if name not in row:
            return BadRow(
                reasons.MISSING_COLUMN, f'"{name}" is missing; the row has the columns {fields.column_names(row)}'
            )
        if not kind.test(row[name]):
            return _wrong(name, kind, row)
    for name, kind in shape.optional.items():
        if name in row and not kind.test(row[name]):
            return _wrong(name, kind, row)
    return None


def _wrong(name: str, kind: Kind, row: Mapping[str, Any]) -> BadRow:
    return BadRow(reasons.WRONG_TYPE, f'"{name}" is {fields.describe_type(row[name])}; expected {kind.name}')


def convert(shape: Format, rows: Sequence[Row]) -> Items:
    """The preferences or opinions of one row, or of the gathered rows of one prompt.

    Columns that the format does not read are kept in `columns`. Raises `BadRow` for whatever cannot be used,
    also for identical completions and for tied scores in the columns of `SCORES`.
    """
    row = shape.gather(rows) if shape.gather else rows[0]
    used = {*shape.columns, *shape.optional, "tools"}
    kept = {name: value for name, value in row.values.items() if name not in used}
    tools = fields.tools(row.values)
    items: list[Part] = [
        item if isinstance(item, BadRow) else dataclasses.replace(item, tools=tools, columns=kept)
        for item in shape.convert(row)
    ]
    for item in items:
        if isinstance(item, Preference):
            _check_pair(item, row.values)
    return items


def _check_pair(pair: Preference, row: Mapping[str, Any]) -> None:
    if pair.chosen == pair.rejected:
        raise BadRow(reasons.IDENTICAL, '"chosen" and "rejected" are the same')
    for better, worse in SCORES:
        scored = fields.is_number(row.get(better)) and fields.is_number(row.get(worse))
        if scored and float(row[better]) == float(row[worse]):
            raise BadRow(reasons.TIED, f'"{better}" and "{worse}" are both {float(row[better]):g}')
