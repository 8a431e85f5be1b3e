"""Row shapes: one small function per shape turns a row into preferences or opinions, registered in `FORMATS`.

Detection looks at columns *and types*, because two well-known sets share column names with different contents. To
add a shape: write its function, add a `Format`, add a row to the fixtures of the tests.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxdpo.data import reasons, values
from mlxdpo.data.report import BadRow
from mlxdpo.data.turns import (
    answer,
    as_turns,
    extra_id_turns,
    prompt_of,
    prompt_turns,
    split_last_turns,
    split_transcripts,
)
from mlxdpo.data.values import Kind, Row
from mlxdpo.types import Message, Opinion, Preference, UserError

Items = Sequence[Preference | Opinion]


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


def text(row: Row) -> Items:
    """Plain prompt and completions, as they stand."""
    prompt = prompt_of(row.values, "prompt")
    return [_pair(row, prompt, answer(row.values, "chosen", prompt), answer(row.values, "rejected", prompt))]


def system_text(row: Row) -> Items:
    """A system prompt beside plain text; an empty one is left out."""
    return _with_system(row, "prompt")


def orca(row: Row) -> Items:
    """The question is the user's turn, after the system prompt if there is one."""
    return _with_system(row, "question")


def _with_system(row: Row, column: str) -> Items:
    question = (Message("user", values.text(row.values, column)),)
    system = row.values.get("system") or ""
    turns = (Message("system", values.text(row.values, "system")), *question) if system.strip() else question
    prompt = prompt_turns(turns)
    return [_pair(row, prompt, answer(row.values, "chosen", prompt), answer(row.values, "rejected", prompt))]


def implicit(row: Row) -> Items:
    """The prompt is the turns that both conversations share; what differs is one assistant turn."""
    return [_pair(row, *split_last_turns(row.values))]


def turns(row: Row) -> Items:
    """A text prompt beside whole conversations that repeat it, or beside the assistant turn alone."""
    conversations = [values.messages(row.values, name) for name in ("chosen", "rejected")]
    if all(len(turns) == 1 for turns in conversations):
        return text(row)
    prompt, chosen, rejected = split_last_turns(row.values)
    asked, said = (
        _squeezed(values.text(row.values, "prompt")),
        [_squeezed(m.content) for m in prompt if m.content],
    )
    if not any(asked in turn or turn in asked for turn in said if turn):
        raise BadRow(
            reasons.PROMPT_MISMATCH,
            '"prompt" is in none of the shared turns of "chosen" and "rejected"; '
            "set data.format to implicit if the turns are right",
        )
    return [_pair(row, prompt, chosen, rejected)]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def hh(row: Row) -> Items:
    """Human:/Assistant: transcripts, split at the last Assistant: of the chosen one."""
    return [_pair(row, *split_transcripts(row.values))]


def opinion(row: Row) -> Items:
    """One completion with a thumb up or down."""
    prompt = prompt_of(row.values, "prompt")
    completion = answer(row.values, "completion", prompt)
    if not isinstance(completion, str):
        prompt = as_turns(prompt)
    return [Opinion(prompt, completion, values.flag(row.values, "label"), row.where)]


def signed_strength(row: Row) -> Items:
    """preference_strength above zero: response_2 is better (the HelpSteer3 card's sign); zero is a tie."""
    strength = values.number(row.values, "preference_strength")
    if strength == 0:
        raise BadRow(reasons.TIED, '"preference_strength" is 0: neither response is better')
    better, worse = ("response_2", "response_1") if strength > 0 else ("response_1", "response_2")
    prompt = prompt_turns(extra_id_turns(values.text(row.values, "prompt")))
    return [_pair(row, prompt, answer(row.values, better, prompt), answer(row.values, worse, prompt))]


def helpsteer(row: Row) -> Items:
    """Rated responses of one prompt, gathered; the one rated more helpful is chosen."""
    prompt = prompt_turns(extra_id_turns(values.text(row.values, "prompt")))
    return _ranked(row, prompt, row.values["completions"], row.values["scores"])


def _gather_helpsteer(rows: Sequence[Row]) -> Row:
    first = rows[0]
    if len(rows) == 1:
        raise BadRow(reasons.LONE, "the prompt has this one response; expected the next row to have another")
    rated = {
        "completions": [row.values["response"] for row in rows],
        "scores": [row.values["helpfulness"] for row in rows],
    }
    return Row(first.where, {**first.values, **rated})


def ranked(row: Row) -> Items:
    """K scored completions of one prompt make a pair of every two whose scores differ, at most K(K-1)/2."""
    prompt = prompt_of(row.values, "prompt")
    return _ranked(row, prompt, row.values["completions"], row.values["scores"])


def _ranked(row: Row, prompt: Any, completions: Sequence[str], scores: Sequence[Any]) -> Items:
    if len(completions) != len(scores):
        raise BadRow(
            reasons.WRONG_TYPE, f'"completions" has {len(completions)} items and "scores" {len(scores)}'
        )
    named = {f"completion {n}": completion for n, completion in enumerate(completions, 1)}
    answers = [answer(named, name, prompt) for name in named]
    found = sorted(zip(map(float, scores), answers, strict=True), key=lambda item: -item[0])
    pairs = [(a, b) for i, (high, a) in enumerate(found) for low, b in found[i + 1 :] if high > low]
    if not pairs:
        raise BadRow(reasons.TIED, f"all {len(scores)} completions have the score {scores[0]}")
    return [_pair(row, prompt, better, worse) for better, worse in pairs if better != worse]


def reddit(row: Row) -> Items:
    """SHP: labels 1 means that comment A is better; ratios of votes below 2 are left out, as the card advises."""
    if "score_ratio" in row.values and values.number(row.values, "score_ratio") < 2:
        raise BadRow(reasons.WEAK, f'"score_ratio" is {row.values["score_ratio"]}, below 2')
    first, second = "human_ref_A", "human_ref_B"
    better, worse = (first, second) if values.flag(row.values, "labels") else (second, first)
    prompt = prompt_of(row.values, "history")
    return [_pair(row, prompt, answer(row.values, better, prompt), answer(row.values, worse, prompt))]


def revision(row: Row) -> Items:
    """Constitutional AI: the revised response is chosen over the first one."""
    prompt = prompt_of(row.values, "init_prompt")
    better, worse = (answer(row.values, name, prompt) for name in ("revision_response", "init_response"))
    return [_pair(row, prompt, better, worse)]


def _pair(row: Row, prompt: Any, chosen: Any, rejected: Any) -> Preference:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            reasons.WRONG_TYPE, "one completion is text and the other messages; expected the same of both"
        )
    return Preference(prompt if isinstance(chosen, str) else as_turns(prompt), chosen, rejected, row.where)


_ANSWERS = {"chosen": values.TEXT_OR_MESSAGES, "rejected": values.TEXT_OR_MESSAGES}
_TEXTS = {"chosen": values.TEXT, "rejected": values.TEXT}
_TURNS = {"chosen": values.MESSAGES, "rejected": values.MESSAGES}
_SYSTEM = {"system": values.TEXT_OR_NULL}
_PROMPT = {"prompt": values.TEXT}

_ALL = (  # the order is the order of detection: the more specific shape first
    Format(
        "cai",
        "a first response and its revision",
        "HuggingFaceH4/cai-conversation-harmless",
        dict.fromkeys(("init_prompt", "init_response", "revision_response"), values.TEXT),
        revision,
    ),
    Format(
        "hh",
        "transcripts of Human: and Assistant: turns",
        "Anthropic/hh-rlhf",
        {"chosen": values.TRANSCRIPT, "rejected": values.TRANSCRIPT},
        hh,
    ),
    Format(
        "shp",
        "a post and two comments, labels 1 where comment A is better",
        "stanfordnlp/SHP",
        dict.fromkeys(("history", "human_ref_A", "human_ref_B"), values.TEXT) | {"labels": values.FLAG},
        reddit,
        {"score_ratio": values.NUMBER},
    ),
    Format(
        "strength",
        "two responses and a signed strength, above zero where response_2 is better",
        "nvidia/HelpSteer2:preference",
        _PROMPT
        | {"response_1": values.TEXT, "response_2": values.TEXT, "preference_strength": values.NUMBER},
        signed_strength,
    ),
    Format(
        "ratings",
        "consecutive rows of one prompt, each a response with its helpfulness",
        "nvidia/HelpSteer2",
        _PROMPT | {"response": values.TEXT, "helpfulness": values.NUMBER},
        helpsteer,
        gather=_gather_helpsteer,
    ),
    Format(
        "ranked",
        "a prompt with several completions and their scores",
        "rows that mlxdpo collect writes",
        {"prompt": values.TEXT_OR_MESSAGES, "completions": values.TEXTS, "scores": values.NUMBERS},
        ranked,
    ),
    Format(
        "unpaired",
        "a prompt, one completion, and label true where it is desirable (KTO)",
        "trl-lib/kto-mix-14k",
        {"prompt": values.TEXT_OR_MESSAGES, "completion": values.TEXT_OR_MESSAGES, "label": values.FLAG},
        opinion,
    ),
    Format(
        "system",
        "a system prompt, a prompt and two texts",
        "jondurbin/truthy-dpo-v0.1",
        _SYSTEM | _PROMPT | _TEXTS,
        system_text,
    ),
    Format("text", "a prompt and two texts", "trl-lib/tldr-preference", _PROMPT | _TEXTS, text),
    Format(
        "orca",
        "a question and two texts, perhaps a system prompt",
        "Intel/orca_dpo_pairs",
        {"question": values.TEXT} | _TEXTS,
        orca,
        _SYSTEM,
    ),
    Format(
        "messages",
        "prompt messages and two answers, messages or text",
        "trl-lib/lm-human-preferences-sentiment",
        {"prompt": values.MESSAGES} | _ANSWERS,
        text,
    ),
    Format(
        "turns",
        "a text prompt and two conversations that begin with it",
        "HuggingFaceH4/ultrafeedback_binarized",
        _PROMPT | _TURNS,
        turns,
    ),
    Format(
        "implicit",
        "two conversations that share all but the last turn",
        "argilla/dpo-mix-7k",
        _TURNS,
        implicit,
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
    """The first format whose columns are all there, whatever they hold, or None."""
    return next((shape for shape in FORMATS.values() if shape.columns.keys() <= row.keys()), None)


def check_columns(shape: Format, row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a column of the format that is missing or holds something else."""
    if bad := _misfit(shape, row):
        raise bad


def _misfit(shape: Format, row: Mapping[str, Any]) -> BadRow | None:
    for name, kind in shape.columns.items():
        if name not in row:
            seen = ", ".join(row) or "none"
            return BadRow(reasons.MISSING_COLUMN, f'"{name}" is missing; the row has the columns {seen}')
        if not kind.test(row[name]):
            return _wrong(name, kind, row)
    for name, kind in shape.optional.items():
        if name in row and not kind.test(row[name]):
            return _wrong(name, kind, row)
    return None


def _wrong(name: str, kind: Kind, row: Mapping[str, Any]) -> BadRow:
    return BadRow(reasons.WRONG_TYPE, f'"{name}" is {values.describe(row[name])}; expected {kind.name}')


def convert(shape: Format, rows: Sequence[Row]) -> Items:
    """The preferences or opinions of one row, or of the gathered rows of one prompt.

    Columns that the format does not read are kept in `columns`. Raises `BadRow` for whatever cannot be used, also
    for identical completions and for tied scores in the columns of `SCORES`.
    """
    row = shape.gather(rows) if shape.gather else rows[0]
    used = {*shape.columns, *shape.optional, "tools"}
    kept = {name: value for name, value in row.values.items() if name not in used}
    tools = values.tools(row.values)
    items = [dataclasses.replace(item, tools=tools, columns=kept) for item in shape.convert(row)]
    for item in items:
        if isinstance(item, Preference):
            _check_pair(item, row.values)
    return items


def _check_pair(pair: Preference, row: Mapping[str, Any]) -> None:
    if pair.chosen == pair.rejected:
        raise BadRow(reasons.IDENTICAL, '"chosen" and "rejected" are the same')
    for better, worse in SCORES:
        if (
            values.is_number(row.get(better))
            and values.is_number(row.get(worse))
            and float(row[better]) == float(row[worse])
        ):
            raise BadRow(reasons.TIED, f'"{better}" and "{worse}" are both {row[better]}')
