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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow
from mlxdpo.io.digest import json_digest
from mlxdpo.types import Message, Text, UserError

# Llama-3.x templates print today's date unless given one: token ids would change at midnight, and with them
# the reference cache and a resumed run. This is the date those templates fall back to by themselves.
DATE = "26 Jul 2024"


def dated(template: Any) -> str | None:
    """A chat template in which today is the day of `DATE`; None for several, of which transformers chooses."""
    if not isinstance(template, str):
        return None
    day = datetime.date(2024, 7, 26)
    return re.sub(r"strftime_now\((['\"])([^'\"]*)\1\)", lambda found: f"'{day.strftime(found[2])}'", template)


PROBES = ("Red7", "Blue8")  # no whitespace to trim, no markup, no common first or last character


@dataclass(frozen=True, slots=True)
class Writer:
    """A tokenizer with what was found out about it.

    start    ids that plain text begins with (BOS), empty where the tokenizer emits none
    bos      ids that count as a BOS where a prompt begins with one
    unk      id written for what the vocabulary lacks, or None
    eos      id appended where nothing ends the completion; None where the model has no such token
    ends     ids that end a completion: the model's end-of-sequence ids and the template's end-of-turn
    chat     whether there is a chat template; what follows `scores_end` describes its assistant turn, as text
    scores_end  whether the token that ends a completion is scored (`data.eos`)
    lead     printed between the generation prompt and the content (an empty thinking block), usually ""
    end      printed from the end of the content through the end-of-turn token; "" where there is none
    rest     printed after that (a newline, the next header): never scored
    opening  special tokens that a rendered conversation begins with: such text is already templated
    """

    tokenizer: Any
    thinking: bool
    start: tuple[int, ...]
    bos: frozenset[int]
    unk: int | None
    eos: int | None
    ends: frozenset[int]
    chat: bool
    scores_end: bool
    lead: str = ""
    end: str = ""
    rest: str = ""
    opening: tuple[str, ...] = ()

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
                date_string=DATE,
                chat_template=dated(self.tokenizer.chat_template),
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


def probe(tokenizer: Any, data: DataConfig, eos_ids: frozenset[int] | None = None) -> Writer:
    """Find out what `tokenizer` writes under the template settings of `data`.

    `eos_ids` are the model configuration's end-of-sequence ids; without them the tokenizer's own. Raises
    `UserError` when the chat template cannot write one question and its answer.
    """
    bare = unwrap(tokenizer)
    # mlx-lm's wrapper has the model configuration's set; a bare tokenizer answers this name with one int.
    wrapped = tokenizer.eos_token_ids if tokenizer is not bare else ()
    stops = frozenset(eos_ids or wrapped or {bare.eos_token_id} - {None})
    eos = bare.eos_token_id if bare.eos_token_id in stops else min(stops, default=None)
    start = _start(bare)
    bos = frozenset(start) | ({bare.bos_token_id} - {None})
    plain = Writer(bare, data.thinking, start, bos, bare.unk_token_id, eos, stops, False, data.eos == "score")
    return _probe_turn(plain) if bare.chat_template else plain


def _start(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts before every text. Those it puts after (some add EOS) are not asked for."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for n in range(len(with_special) - len(without) + 1):
        if with_special[n : n + len(without)] == without:
            return tuple(with_special[:n])
    return ()


def _probe_turn(writer: Writer) -> Writer:
    """Fill in the description of the assistant turn."""
    question = (Message("user", "Which?"),)
    try:
        prompt = writer.render(question, (), generate=True)
        bare = writer.render(question, (), generate=False)
        answers = [writer.render((*question, Message("assistant", p)), (), generate=False) for p in PROBES]
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
        chat=True,
        lead=before[len(prompt) :] if before.startswith(prompt) else "",
        end=stop,
        rest=after[len(stop) :],
        opening=_opening(special, prompt),
    )


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
    return json_digest(parts)


def _vocabulary(tokenizer: Any) -> str:
    """Digest of the tokenizer's rules, without the padding and truncation that calls leave behind in it."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    else:
        rules = tokenizer.get_vocab()
    return json_digest(rules)


class Rendered(NamedTuple):
    """A row as text: the prompt, and each completion together with it. `plain`: no template wrote it."""

    prompt: str
    fulls: tuple[str, ...]
    plain: bool

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is tokenised."""
        return (self.prompt, *self.fulls)


def render(
    prompt: Text,
    completions: tuple[Text, ...],
    tools: Sequence[Mapping[str, Any]],
    writer: Writer,
    data: DataConfig,
    where: str,
    changes: list[str],
) -> Rendered:
    """A prompt and its completions as text, each completion cut after its end-of-turn token.

    Raises `BadRow` when the template refuses the turns, `UserError` when there is no template to ask.
    """
    texts = [text for text in (prompt, *completions) if isinstance(text, str)]
    messages = len(texts) < 1 + len(completions)
    if not messages and (data.template == "plain" or (data.template == "auto" and not writer.chat)):
        return Rendered(texts[0], tuple(texts[0] + c for c in texts[1:]), plain=True)
    if not writer.chat:
        asked = "the row is a list of messages" if messages else "data.template is chat"
        raise UserError(
            f"{where}: {asked}, but the tokenizer has no chat template; use an instruction-tuned model, or"
            " plain-text rows with data.template plain"
        )
    if isinstance(prompt, str) and data.template == "auto" and prompt.lstrip().startswith(writer.opening):
        raise BadRow(
            "already templated",
            f"the prompt begins with {prompt.lstrip()[:20]!r}; set data.template to plain to leave it so",
        )
    turns = _turns(prompt, "user")
    before = writer.render(turns, tools, generate=True)
    fulls = []
    for completion in completions:
        answer = without_end_token(_turns(completion, "assistant"), writer, changes)
        fulls.append(cut_at_end(writer.render((*turns, *answer), tools, generate=False), writer))
        if not all(message.content.strip() in fulls[-1] for message in answer):
            changes.append("completion rewritten by the chat template")
    return Rendered(_led(before, fulls, writer, changes), tuple(fulls), plain=False)


def _led(before: str, fulls: Sequence[str], writer: Writer, changes: list[str]) -> str:
    """The prompt with the empty thinking block that the template writes before answers without reasoning.

    Where one answer reasons and another does not, the empty block is what tells them apart, and is scored.
    """
    # A lead of whitespace (Llama-2) is part of the answer's first token.
    led = [bool(writer.lead.strip()) and full.startswith(before + writer.lead) for full in fulls]
    if led and all(led):
        changes.append("empty thinking block, written by the template, counted as prompt")
        return before + writer.lead
    if any(led):
        changes.append("empty thinking block scored: the other completion has reasoning")
    if not all(full.startswith(before) for full in fulls):
        changes.append("boundary moved back: the template writes the turn otherwise than it prompts for it")
    return before


AnyRendered = TypeVar("AnyRendered", bound=Any)


def checked_unicode(rendered: AnyRendered) -> AnyRendered:
    """Raises `BadRow` for half a surrogate pair (JSON lets "\\ud83d" through; tokenizers do not)."""
    try:
        for text in rendered.texts:
            text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadRow("not Unicode", f"the text has half a character ({half!a}); write it as UTF-8") from None
    return rendered


def _turns(text: Text, role: str) -> tuple[Message, ...]:
    return (Message(role, text),) if isinstance(text, str) else text


def without_end_token(answer: tuple[Message, ...], writer: Writer, changes: list[str]) -> tuple[Message, ...]:
    """Texts copied from a model's output may end in the token that the template is about to write again."""
    end = writer.end.strip()
    if not end or not answer or not answer[-1].content.rstrip().endswith(end):
        return answer
    changes.append("end-of-turn token in the text left out")
    last = answer[-1]
    return (*answer[:-1], last._replace(content=last.content.rstrip().removesuffix(end)))


def cut_at_end(full: str, writer: Writer) -> str:
    """Without what the template prints after the end of the turn."""
    return full.removesuffix(writer.rest) if full.endswith(writer.end + writer.rest) else full
