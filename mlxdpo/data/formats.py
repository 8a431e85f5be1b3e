"""The table of row shapes, how a row's shape is detected, and how a row of a shape is converted and checked.

Detection looks at columns *and types*, because well-known sets share column names with different contents. To
add a shape: add a `Format`, from the ways in `converters.py`, and a row to the fixtures of the tests.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data import context, converters, fields, reasons, trajectories
from mlxdpo.data.converters import Converter, Items, column, contest, instruction, pair, question, ranking
from mlxdpo.data.fields import FLAG, MESSAGES, NUMBER, NUMBERS, TEXT, TEXT_OR_MESSAGES, TEXTS, Kind, Row
from mlxdpo.data.report import BadRow
from mlxdpo.types import Preference, UserError


@dataclass(frozen=True)
class Format:
    """A row shape: the columns it needs and may have, and the function that reads it.

    A column `a.b` is the key b of an object in column a. Where `gather` is set, consecutive rows with the same prompt
    are gathered into one row before `convert`.
    """

    name: str
    about: str
    example: str
    columns: Mapping[str, Kind]
    convert: Converter
    optional: Mapping[str, Kind] = field(default_factory=dict)
    gather: Callable[[Sequence[Row]], Row] | None = None

    @property
    def inner(self) -> Mapping[str, frozenset[str]]:
        """The keys that it reads of the objects in a list, by column."""
        return {name: kind.keys for name, kind in self.columns.items() if kind.keys}

    @property
    def reads(self) -> frozenset[str]:
        """The columns that the shape itself reads."""
        return frozenset({*self.columns, *self.optional})

    def flattened(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as its columns are read: JSON text of messages as messages, one message as a list of it, and the
        keys of the objects into which the shape looks as columns."""
        parents = {name.partition(".")[0] for name in self.columns if "." in name}
        flat = {name: fields.parsed(value) for name, value in row.items()}
        for parent in parents:
            if isinstance(inner := fields.decoded_json(row.get(parent)), Mapping):
                del flat[parent]
                flat |= {f"{parent}.{key}": fields.parsed(value) for key, value in inner.items()}
        return flat


_ANSWERS = {"chosen": TEXT_OR_MESSAGES, "rejected": TEXT_OR_MESSAGES}
_TEXTS = {"chosen": TEXT, "rejected": TEXT}
_TURNS = {"chosen": MESSAGES, "rejected": MESSAGES}
_SYSTEM = {"system": fields.TEXT_OR_NULL}
_PROMPT = {"prompt": TEXT}
_INPUT = {"input": fields.TEXT_OR_NULL}
_RESPONSES = {"chosen_response": TEXT_OR_MESSAGES, "rejected_response": TEXT_OR_MESSAGES}
_BATTLE = {"response_a": TEXT_OR_MESSAGES, "response_b": TEXT_OR_MESSAGES}

_ALL = (  # the order is the order of detection: the more specific shape first
    Format(
        "cai",
        "a first response and its revision",
        "HuggingFaceH4/cai-conversation-harmless",
        dict.fromkeys(("init_prompt", "init_response", "revision_response"), TEXT),
        pair(column("init_prompt"), "revision_response", "init_response"),
    ),
    Format(
        "hh",
        "transcripts of Human: and Assistant: turns",
        "Anthropic/hh-rlhf",
        {"chosen": fields.TRANSCRIPT, "rejected": fields.TRANSCRIPT},
        converters.hh,
    ),
    Format(
        "openai",
        "a preferred and a non-preferred output of an input with messages",
        "preference fine-tuning at OpenAI, Azure, Together, Fireworks",
        {"input.messages": MESSAGES, "preferred_output": TEXT_OR_MESSAGES, "non_preferred_output": TEXT_OR_MESSAGES},
        pair(column("input.messages"), "preferred_output", "non_preferred_output"),
    ),
    Format(
        "shp",
        "a post and two comments, labels 1 where comment A is better",
        "stanfordnlp/SHP",
        dict.fromkeys(("history", "human_ref_A", "human_ref_B"), TEXT) | {"labels": FLAG},
        contest(column("history"), "human_ref_A", "human_ref_B", converters.more_upvoted),
        {"score_ratio": NUMBER},
    ),
    Format(
        "strength",
        "two responses and a signed strength, above zero where response_2 is better",
        "nvidia/HelpSteer2:preference",
        _PROMPT | {"response_1": TEXT, "response_2": TEXT, "preference_strength": NUMBER},
        contest(converters.helpsteer_turns, "response_1", "response_2", converters.signed("preference_strength")),
    ),
    Format(
        "helpsteer3",
        "context messages, two responses and a signed preference, above zero where response2 is better",
        "nvidia/HelpSteer3",
        {"context": MESSAGES, "response1": TEXT, "response2": TEXT, "overall_preference": NUMBER},
        contest(column("context"), "response1", "response2", converters.signed("overall_preference")),
    ),
    Format(
        "safe_rlhf",
        "two responses and the number, 0 or 1, of the better one",
        "PKU-Alignment/PKU-SafeRLHF",
        _PROMPT | {"response_0": TEXT, "response_1": TEXT, "better_response_id": NUMBER},
        contest(column("prompt"), "response_0", "response_1", converters.numbered("better_response_id", 0)),
    ),
    Format(
        "webgpt",
        "a question and two answers with a score each",
        "openai/webgpt_comparisons",
        {"question.full_text": TEXT, "answer_0": TEXT, "answer_1": TEXT, "score_0": NUMBER, "score_1": NUMBER},
        contest(
            column("question.full_text"), "answer_0", "answer_1", converters.score_difference("score_0", "score_1")
        ),
    ),
    Format(
        "summaries",
        "a post, two summaries, and the number, 0 or 1, of the better one",
        "openai/summarize_from_feedback:comparisons",
        {"info.post": TEXT, "summaries": fields.objects("text"), "choice": NUMBER},
        converters.summaries,
        {"info.title": fields.TEXT_OR_NULL, "info.subreddit": fields.TEXT_OR_NULL},
    ),
    Format(
        "alpaca_farm",
        "an instruction, two outputs, and the number, 1 or 2, of the better one",
        "tatsu-lab/alpaca_farm:alpaca_human_preference",
        {"instruction": TEXT, "output_1": TEXT, "output_2": TEXT, "preference": NUMBER},
        contest(instruction, "output_1", "output_2", converters.numbered("preference", 1)),
        _INPUT,
    ),
    Format(
        "arena",
        "two conversations with the same questions, and the winner",
        "lmsys/chatbot_arena_conversations",
        {"conversation_a": MESSAGES, "conversation_b": MESSAGES, "winner": TEXT},
        converters.arena_battle,
    ),
    Format(
        "battle",
        "a prompt, two responses, and the winner: model_a, model_b or a tie",
        "votes of an arena, one row each",
        {"prompt": TEXT_OR_MESSAGES, "winner": TEXT} | _BATTLE,
        contest(column("prompt"), "response_a", "response_b", converters.battle),
    ),
    Format(
        "arena_flags",
        "a prompt, two responses, and a flag for each way it can end",
        "lmarena-ai/arena-human-preference-55k",
        _PROMPT
        | {"response_a": TEXT, "response_b": TEXT}
        | dict.fromkeys(("winner_model_a", "winner_model_b", "winner_tie"), FLAG),
        converters.texts_battle,
    ),
    Format(
        "stack_exchange",
        "a question and two answers, response_j the better one",
        "lvwerra/stack-exchange-paired",
        {"question": TEXT, "response_j": TEXT, "response_k": TEXT},
        pair(question("question"), "response_j", "response_k"),
    ),
    Format(
        "ratings",
        "consecutive rows of one prompt, each a response with its helpfulness",
        "nvidia/HelpSteer2",
        _PROMPT | {"response": TEXT, "helpfulness": NUMBER},
        ranking(converters.helpsteer_turns, converters.list_column("completions"), converters.list_column("scores")),
        gather=converters.gather_helpsteer,
    ),
    Format(
        "ranked",
        "a prompt with several completions and their scores",
        "several sampled answers and their scores",
        {"prompt": TEXT_OR_MESSAGES, "completions": TEXTS, "scores": NUMBERS},
        ranking(column("prompt"), converters.list_column("completions"), converters.list_column("scores")),
    ),
    Format(
        "nectar",
        "a prompt and answers with their ranks, 1 the best",
        "berkeley-nest/Nectar",
        _PROMPT | {"answers": fields.objects("answer", "rank")},
        ranking(
            converters.transcript, converters.inside("answers", "answer"), converters.inside("answers", "rank", -1)
        ),
    ),
    Format(
        "ultrafeedback",
        "an instruction and completions with an overall score each",
        "openbmb/UltraFeedback",
        {"instruction": TEXT, "completions": fields.objects("response", "overall_score")},
        ranking(
            column("instruction"),
            converters.inside("completions", "response"),
            converters.inside("completions", "overall_score"),
        ),
    ),
    Format(
        "openai_messages",
        "messages and two answers, each a message, messages or text",
        "Axolotl's chat_template.default",
        {"messages": fields.ASKED_MESSAGES} | _ANSWERS,
        pair(column("messages")),
    ),
    Format(
        "sharegpt",
        "a conversation and two answers to it",
        "LLaMA-Factory's ShareGPT ranking",
        {"conversations": fields.ASKED_MESSAGES} | _ANSWERS,
        pair(column("conversations")),
    ),
    Format(
        "kto_messages",
        "a conversation, and label true where its last answer is desirable (KTO)",
        "LLaMA-Factory's KTO, Axolotl's chat_template.argilla_chat",
        {"messages": MESSAGES, "label": FLAG},
        converters.judged_conversation("messages", "label"),
    ),
    Format(
        "kto_sharegpt",
        "a conversation, and kto_tag true where its last answer is desirable",
        "LLaMA-Factory's ShareGPT KTO",
        {"conversations": MESSAGES, "kto_tag": FLAG},
        converters.judged_conversation("conversations", "kto_tag"),
    ),
    Format(
        "kto_alpaca",
        "an instruction, one output, and kto_tag true where it is desirable",
        "LLaMA-Factory's Alpaca KTO",
        {"instruction": TEXT, "output": TEXT, "kto_tag": FLAG},
        converters.opinion(instruction, "output", "kto_tag"),
        _INPUT,
    ),
    Format(
        "unpaired",
        "a prompt, one completion, and label true where it is desirable (KTO)",
        "trl-lib/kto-mix-14k",
        {"prompt": TEXT_OR_MESSAGES, "completion": TEXT_OR_MESSAGES, "label": FLAG},
        converters.opinion(column("prompt"), "completion", "label"),
    ),
    Format(
        "completion",
        "a prompt and one completion to imitate (stage: sft)",
        "trl-lib/Capybara as prompt and completion",
        {"prompt": TEXT_OR_MESSAGES, "completion": TEXT_OR_MESSAGES},
        converters.demonstration(column("prompt"), "completion"),
    ),
    Format(
        "system",
        "a system prompt, a prompt and two texts",
        "jondurbin/truthy-dpo-v0.1, Axolotl's prompt_pairs",
        _SYSTEM | _PROMPT | _TEXTS,
        pair(question("prompt")),
    ),
    Format("text", "a prompt and two texts", "trl-lib/tldr-preference", _PROMPT | _TEXTS, pair(column("prompt"))),
    Format(
        "messages",
        "prompt messages and two answers, messages or text, or two trajectories",
        "TRL's conversational rows with an explicit prompt",
        {"prompt": MESSAGES} | _ANSWERS,
        pair(column("prompt")),
    ),
    Format(
        "turns",
        "a text prompt and two conversations that begin with it, or an answer each",
        "HuggingFaceH4/ultrafeedback_binarized, Axolotl's ultra",
        _PROMPT | _TURNS,
        converters.turns,
    ),
    Format(
        "argilla_prompt",
        "a prompt, a chosen and a rejected response",
        "feedback sets of Argilla",
        {"prompt": TEXT_OR_MESSAGES} | _RESPONSES,
        pair(column("prompt"), *_RESPONSES),
    ),
    Format(
        "argilla",
        "an instruction, a chosen and a rejected response",
        "Axolotl's argilla",
        {"instruction": TEXT} | _RESPONSES,
        pair(instruction, *_RESPONSES),
        _INPUT,
    ),
    Format(
        "alpaca",
        "an instruction, an optional input, and two answers",
        "LLaMA-Factory's Alpaca ranking",
        {"instruction": TEXT} | _ANSWERS,
        pair(instruction),
        _INPUT,
    ),
    Format(
        "orca",
        "a question and two texts, optionally a system prompt",
        "Intel/orca_dpo_pairs, Axolotl's intel",
        {"question": TEXT} | _TEXTS,
        pair(question("question")),
        _SYSTEM,
    ),
    Format(
        "icr",
        "an input and two texts",
        "argilla/distilabel-intel-orca-dpo-pairs, Axolotl's icr",
        {"input": TEXT} | _TEXTS,
        pair(question("input")),
    ),
    Format(
        "distilabel",
        "an instruction with several generations and their ratings",
        "distilabel's UltraFeedback task",
        {"instruction": TEXT, "generations": TEXTS, "ratings": NUMBERS},
        ranking(column("instruction"), converters.list_column("generations"), converters.list_column("ratings")),
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
        {"prompt": TEXT_OR_MESSAGES, "steps": fields.STEPS},
        trajectories.judged_steps,
    ),
    Format(
        "tree",
        "the turns of a trajectory so far and two texts that could come next",
        "openbmb/UltraInteract_pair",
        {"trajectory": MESSAGES} | _TEXTS,
        trajectories.tree_node,
    ),
    Format(
        "step_labels",
        "a conversation, and for each assistant turn whether it is good (KTO)",
        "labelled steps of one trajectory",
        {"messages": MESSAGES, "labels": fields.FLAGS},
        trajectories.labelled_steps,
    ),
    Format(
        "step_rewards",
        "a conversation, and for each assistant turn a reward, above 0 where it is good (KTO)",
        "rewarded steps of one trajectory",
        {"messages": MESSAGES, "rewards": NUMBERS},
        trajectories.rewarded_steps,
    ),
    Format(
        "alpaca_output",
        "an instruction, an optional input, and an output to imitate (stage: sft)",
        "tatsu-lab/alpaca",
        {"instruction": TEXT, "output": TEXT},
        converters.demonstration(instruction, "output"),
        _INPUT,
    ),
    Format(
        "conversation",
        "a conversation whose assistant turns are to be imitated (stage: sft)",
        "HuggingFaceH4/ultrachat_200k",
        {"messages": MESSAGES},
        converters.conversation("messages"),
    ),
    Format(
        "conversations",
        "the same under ShareGPT's name",
        "LLaMA-Factory's ShareGPT",
        {"conversations": MESSAGES},
        converters.conversation("conversations"),
    ),
)

FORMATS: dict[str, Format] = {shape.name: shape for shape in _ALL}
"""Every known row shape by name, in the order of detection."""


def named_format(name: str) -> Format:
    """The format called `name`. Raises `UserError` with the known names."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`mlxdpo data formats` lists them"
    raise UserError(f"data.format {name!r} is not a known row shape; {hint}")


def detect(row: Mapping[str, Any]) -> Format | None:
    """The first format whose columns are all there with fitting types, or None."""
    return next((shape for shape in FORMATS.values() if _misfit(shape, shape.flattened(row)) is None), None)


def detect_by_names(row: Mapping[str, Any]) -> Format | None:
    """The format whose columns are all there and which fits most of them, at least one; or None."""

    def fitting(shape: Format) -> int:
        """How many of its columns hold what they should."""
        flat = shape.flattened(row)
        return sum(kind.test(flat[name]) for name, kind in shape.columns.items())

    there = [shape for shape in FORMATS.values() if shape.columns.keys() <= shape.flattened(row).keys()]
    best = max(there, key=fitting, default=None)
    return best if best and fitting(best) else None


def check_columns(shape: Format, row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for a column of the format that is missing or holds something else; `row` is flattened."""
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


ANY = DataConfig()  # how rows are read where no recipe is at hand


def convert(shape: Format, rows: Sequence[Row], data: DataConfig = ANY) -> Items:
    """The preferences or opinions of one row, or of the gathered rows of one prompt, with their context.

    Columns that are not read are kept in `columns`. Raises `BadRow` for whatever cannot be used, also for identical
    completions and for tied scores in the columns of `context.SCORES`.
    """
    row = shape.gather(rows) if shape.gather else rows[0]
    own = shape.reads - {"system"}  # a system prompt is context in every shape
    kept = {name: value for name, value in row.values.items() if name not in {*own, *context.CONTEXT_COLUMNS}}
    converted = shape.convert(row)
    items = context.in_context([item for item in converted if not isinstance(item, BadRow)], row.values, own, data)
    for item in items:
        if isinstance(item, Preference):
            _check_pair(item, row.values, data)
    found = iter(context.with_extras([dataclasses.replace(item, columns=kept) for item in items], rows, data.columns))
    return [item if isinstance(item, BadRow) else next(found) for item in converted]


def _check_pair(pair: Preference, row: Mapping[str, Any], data: DataConfig) -> None:
    if pair.chosen == pair.rejected:
        raise BadRow(reasons.IDENTICAL, '"chosen" and "rejected" are the same')
    for better, worse, high, low in context.scores_of(row, data):
        if high == low:
            raise BadRow(reasons.TIED, f'"{better}" and "{worse}" are both {high:g}')
