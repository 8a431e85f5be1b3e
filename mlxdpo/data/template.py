"""What a tokenizer and its chat template really write, found by probing: what they declare cannot be trusted.

A tokenizer may declare a BOS it never emits, `eos_token` may not be the token that ends a turn (Llama-3), a
template may print a header after the last turn (Llama-3) or an empty thinking block before the content
(Qwen3). `probe` renders one small conversation and reads the answers off the text; `render` writes a row: the prompt,
and the prompt with each completion, cut after the end of the answer's turn.
"""

from __future__ import annotations

import datetime
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlxdpo.config import DataConfig
from mlxdpo.data.marks import Arrival
from mlxdpo.data.report import BadRow
from mlxdpo.data.turns import (
    INLINE,
    REASONING,
    with_arguments_as,
)
from mlxdpo.io.digest import json_digest
from mlxdpo.types import Message, UserError

# What templates that ask for today's date are told where no run has a date: Llama-3's fall back to it by themselves.
NO_DATE = datetime.date(2024, 7, 26)

DIRECTIVES = [f"%{letter}" for letter in "aAbBdHIjmMpSUwWxXyY"] + [f"%-{letter}" for letter in "dHIjmMSy"]


def dated(template: str, day: datetime.date) -> str:
    """A chat template in which today is `day`: token ids would change at midnight, and with them a resumed run.

    A macro stands before it with the name of the function that it asks; functions themselves transformers lets in none.
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(f" | replace({text!r}, {day.strftime(text)!r})" for text in DIRECTIVES)
    # The empty expression keeps a line end at the template's beginning, which a block would take with it.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}{{{{ '' }}}}{template}"


PROBES = ("Red7", "Blue8")  # no whitespace to trim, no markup, no common first or last character


@dataclass(frozen=True, slots=True)
class Writer:
    """A tokenizer with what was found out about it.

    start    ids that plain text begins with (BOS), empty where the tokenizer emits none
    bos      ids that count as a BOS where a prompt begins with one
    unk      id written for what the vocabulary lacks, or None
    eos      id appended where nothing ends the completion; None where the model has no such token
    ends     ids that end a completion: the model's end-of-sequence ids and the template's end-of-turn
    scores_end  whether the token that ends a completion is scored (`data.eos`)
    date     the day that a template is told when it asks for today's
    template  the chat template, or None; what follows describes how it writes, as text
    lead     printed between the generation prompt and the content (an empty thinking block), usually ""
    end      printed from the end of the content through the end-of-turn token; "" where there is none
    rest     printed after that (a newline, the next header): never scored
    opening  special tokens that a rendered conversation begins with: such text is already templated
    arguments  whether it prints a call's arguments as an object or as JSON text
    reasoning  the forms in which it prints an answer's reasoning: keys of a turn, or between tags in the content
    with_tools  the same with the template for rows that have tools, where there is one for them alone
    seen     how rows of each shape arrive in its text, by shape
    """

    tokenizer: Any
    thinking: bool
    start: tuple[int, ...]
    bos: frozenset[int]
    unk: int | None
    eos: int | None
    ends: frozenset[int]
    scores_end: bool
    date: datetime.date = NO_DATE
    template: str | None = None
    lead: str = ""
    end: str = ""
    rest: str = ""
    opening: tuple[str, ...] = ()
    arguments: Literal["object", "text"] = "object"
    reasoning: tuple[str, ...] = ()
    with_tools: Writer | None = None
    seen: dict[Any, Arrival] = field(default_factory=dict, compare=False, repr=False)

    @property
    def chat(self) -> bool:
        """Whether there is a chat template."""
        return self.template is not None

    def render(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generate: bool) -> str:
        """The conversation as the template writes it, with the header of the next answer when `generate`.

        Raises `BadRow` with the template's own words when it refuses the turns.
        """
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                [turn.as_dict() for turn in turns],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=generate,
                tokenize=False,
                enable_thinking=self.thinking,
                date_string=self.date.strftime("%d %b %Y"),
                chat_template=None if self.template is None else dated(self.template, self.date),
            )
        except (jinja2.TemplateError, TypeError, IndexError, ValueError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(turn.role for turn in turns) or "none"
            raise BadRow("refused by the chat template", f"the chat template says {words!r} (turns: {roles})") from None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added at either end."""
        if not texts:
            return []
        # verbose=False: lengths beyond the tokenizer's own limit are our business (data.max_length).
        wanted = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(list(texts), **wanted, verbose=False)["input_ids"]


def unwrap(tokenizer: Any) -> Any:
    """The `transformers` tokenizer inside mlx-lm's wrapper, whose template call injects `enable_thinking`."""
    # A fast tokenizer has a `_tokenizer` too: the Rust object, which knows no template.
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


_PROBED: weakref.WeakKeyDictionary[Any, dict[str, Writer]] = weakref.WeakKeyDictionary()


def probe(tokenizer: Any, data: DataConfig, eos_ids: frozenset[int] | None = None) -> Writer:
    """Find out what `tokenizer` writes under the template settings of `data`, once for each tokenizer and settings.

    `eos_ids` are the model configuration's end-of-sequence ids; without them the tokenizer's own. Raises
    `UserError` when the chat template cannot write one question and its answer.
    """
    bare = unwrap(tokenizer)
    # mlx-lm's wrapper has the model configuration's set; a bare tokenizer answers this name with one int.
    wrapped = tokenizer.eos_token_ids if tokenizer is not bare else ()
    stops = frozenset(eos_ids or wrapped or {bare.eos_token_id} - {None})
    templates = chat_templates(bare)
    asked = [
        templates,
        sorted(stops),
        data.thinking,
        data.eos,
        data.date,
        sorted(map(str, bare.special_tokens_map.items())),
    ]
    known, key = _PROBED.setdefault(bare, {}), json_digest(asked)
    if key not in known:
        known[key] = _probe(bare, data, stops, templates)
    return known[key]


def _probe(bare: Any, data: DataConfig, stops: frozenset[int], templates: Mapping[str, str]) -> Writer:
    eos = bare.eos_token_id if bare.eos_token_id in stops else min(stops, default=None)
    start = _start(bare)
    bos = frozenset(start) | ({bare.bos_token_id} - {None})
    plain = Writer(bare, data.thinking, start, bos, bare.unk_token_id, eos, stops, data.eos == "score", day_of(data))
    if not templates:
        return plain
    if "default" not in templates:
        raise UserError(
            f"the tokenizer's chat templates are {', '.join(templates)} and none is called default; name one so, or set"
            " data.template to plain"
        )
    usual = _probe_turn(replace(plain, template=templates["default"]))
    if "tool_use" not in templates:
        return usual
    tools = _probe_turn(replace(plain, template=templates["tool_use"]), (TOOL,))
    ends = usual.ends | tools.ends
    return replace(usual, ends=ends, with_tools=replace(tools, ends=ends))


def chat_templates(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's chat templates by name: "default" alone, or several as transformers reads them; {} for none."""
    found = unwrap(tokenizer).chat_template
    if isinstance(found, Mapping):
        return dict(found)
    return {"default": found} if found else {}


def day_of(data: DataConfig) -> datetime.date:
    """The day that templates are told."""
    return datetime.date.fromisoformat(data.date) if data.date else NO_DATE


def on_day(data: DataConfig, tokenizer: Any, today: datetime.date) -> DataConfig:
    """`data` with the day that templates are told: the one it names, else `today`; none where no template asks."""
    if data.date is None and asks_for_date(tokenizer):
        return data.model_copy(update={"date": today.isoformat()})
    return data


def asks_for_date(tokenizer: Any) -> bool:
    """Whether a chat template prints today's date: token ids depend on the day then."""
    return any(re.search(r"strftime_now|date_string", template) for template in chat_templates(tokenizer).values())


def _start(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts before every text. Those it puts after (some add EOS) are not asked for."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for n in range(len(with_special) - len(without) + 1):
        if with_special[n : n + len(without)] == without:
            return tuple(with_special[:n])
    return ()


def _probe_turn(writer: Writer, tools: Sequence[Mapping[str, Any]] = ()) -> Writer:
    """Fill in the description of the assistant turn, as the template writes it beside `tools`."""
    question = (Message("user", "Which?"),)
    try:
        prompt = writer.render(question, tools, generate=True)
        bare = writer.render(question, tools, generate=False)
        answers = [writer.render((*question, Message("assistant", p)), tools, generate=False) for p in PROBES]
    except BadRow as bad:
        raise UserError(f"{bad.sentence}, for one question and one answer; set data.template to plain") from None
    before, found, after = answers[0].rpartition(PROBES[0])
    if not found or answers[1] != before + PROBES[1] + after:
        raise UserError("the chat template does not print the assistant's content; set data.template to plain")
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    special = _special(writer)
    end = _first(special, after)
    if end and header and end[1] == (_first(special, header) or ("", ""))[1]:
        end = None  # the next answer's header, not the end of this one
    stop = end[0] + end[1] if end else ""
    ends = writer.ends | ({writer.tokenizer.convert_tokens_to_ids(end[1])} if end else set())
    # SmolLM2 declares <|im_start|>, the header of every turn, as its BOS.
    declared = writer.tokenizer.bos_token
    is_header = bool(declared) and declared in prompt[len(declared) :]
    return replace(
        writer,
        bos=frozenset(writer.start) if is_header else writer.bos,
        ends=frozenset(ends),
        lead=before[len(prompt) :] if before.startswith(prompt) else "",
        end=stop,
        rest=after[len(stop) :],
        opening=_opening(special, prompt),
        arguments=_arguments_form(writer),
        reasoning=tuple(form for form in (*REASONING, INLINE) if _prints_reasoning(writer, form)),
    )


def _arguments_form(writer: Writer) -> Literal["object", "text"]:
    """Whether arguments arrive as an object: some templates join them to other text, or print them as Python does."""
    turns = {
        form: [Message("user", "Which?"), with_arguments_as(Message("assistant", "", {"tool_calls": [CALL]}), form)]
        for form in ("object", "text")
    }
    written = {form: _tried(writer, both) for form, both in turns.items()}
    if PROBES[0] in written["object"] and f"'{PROBES[0]}'" not in written["object"]:
        return "object"
    return "text" if f'"{PROBES[0]}"' in written["text"] else "object"


CALL = {"type": "function", "id": "Call00001", "function": {"name": "look", "arguments": {PROBES[0]: PROBES[1]}}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


def _tried(writer: Writer, turns: Sequence[Message]) -> str:
    """The text of turns with a tool, "" where the template refuses them."""
    try:
        return writer.render(turns, (TOOL,), generate=False)
    except BadRow:
        return ""


def _prints_reasoning(writer: Writer, form: str) -> bool:
    content = f"<think>\n{PROBES[0]}\n</think>\n\n{PROBES[1]}" if form == INLINE else PROBES[1]
    answer = Message("assistant", content, {} if form == INLINE else {form: PROBES[0]})
    text = _tried(writer, (Message("user", "Which?"), answer))
    return all(text.count(word) == 1 for word in PROBES)


def _special(writer: Writer) -> list[str]:
    """Texts of the special tokens. Not of every added one: Gemma adds runs of newlines, Qwen adds <think>."""
    tokenizer = writer.tokenizer
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    stops = {t for t in tokenizer.convert_ids_to_tokens(sorted(writer.ends)) if t}
    return sorted(added | set(tokenizer.all_special_tokens) | stops, key=lambda t: (-len(t), t))


def _first(special: Sequence[str], text: str) -> tuple[str, str] | None:
    """The first special token in the text and what stands before it; the longest where two begin together."""
    found = [(text.index(token), -len(token), token) for token in special if token in text]
    if not found:
        return None
    at, _, token = min(found)
    return text[:at], token


def _opening(special: Sequence[str], text: str) -> tuple[str, ...]:
    """The special tokens that the text begins with, one after the other."""
    found: list[str] = []
    while (first := _first(special, text)) and not first[0]:
        found.append(first[1])
        text = text[len(first[1]) :]
    return tuple(found)


def template_digest(tokenizer: Any, data: DataConfig) -> str:
    """sha256 of all that turns text into ids: template, vocabulary, merges, special tokens, settings.

    A run keeps it in its manifest and refuses to go on under another.
    """
    bare = unwrap(tokenizer)
    parts = {
        "chat_template": bare.chat_template,
        "tokenizer": _vocabulary(bare),
        "special": {k: str(v) for k, v in sorted(bare.special_tokens_map.items())},
        "start": _start(bare),
        "template": data.template,
        "eos": data.eos,
        "thinking": data.thinking,
    }
    # What is new and as it was before is left out: the digests that older runs keep stay.
    parts |= {
        key: value
        for key, value in {"system": data.system, "reasoning": data.reasoning}.items()
        if value != DataConfig.model_fields[key].default
    }
    if data.date and asks_for_date(bare):
        parts["date"] = data.date
    return json_digest(parts)


def _vocabulary(tokenizer: Any) -> str:
    """Digest of the tokenizer's rules, without the padding and truncation that calls leave behind in it."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    else:
        rules = tokenizer.get_vocab()
    return json_digest(rules)
