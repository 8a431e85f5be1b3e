"""A row as text: the prompt, and the prompt with each completion, cut after the end of the answer's turn.

What a chat template leaves out of a row is looked for on the way (`marks`), and refused or counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mlxdpo.config import DataConfig
from mlxdpo.data.marks import FOLD, STRIPPED, Arrival, Marked, arrived, judge, plant
from mlxdpo.data.report import BadRow
from mlxdpo.data.template import Writer
from mlxdpo.data.turns import (
    INLINE,
    SYSTEM,
    canonical,
    folded,
    thought_block,
    thought_of,
    with_arguments_as,
    with_thought_as,
)
from mlxdpo.types import Message, Text, UserError


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
        if tools:
            raise BadRow("tools without a chat template", "the row has tools, and plain text has no place for them")
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
    if tools and writer.with_tools is not None:
        writer = writer.with_tools
    turns, fulls, noted = canonical(_turns(prompt, "user")), [], list[str]()
    before = _first_render(turns, tools, writer, data)
    for completion in completions:
        answer = without_end_token(canonical(_turns(completion, "assistant")), writer, changes)
        fulls.append(cut_at_end(_with_answer(turns, answer, tools, writer, data), writer))
        noted += arrivals(turns, answer, tools, writer, data)
        noted += _rewritten(fulls[-1], turns, answer, stripped=STRIPPED in noted)
    if not completions:
        noted += arrivals(turns, (), tools, writer, data)
    changes += dict.fromkeys(noted)
    return Rendered(_led(before, fulls, writer, changes), tuple(fulls), plain=False)


def _first_render(
    turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], writer: Writer, data: DataConfig
) -> str:
    """The prompt with the header of the answer; a template that refuses a system turn alone is told apart."""
    try:
        return conversation_text(turns, tools, writer, data, generate=True)
    except BadRow as bad:
        if not any(turn.role in SYSTEM for turn in turns) or data.system == "fold":
            raise
        conversation_text(turns, tools, writer, data.model_copy(update={"system": "fold"}), generate=True)
        raise BadRow(bad.reason, f"{bad.sentence}; {FOLD}") from None


def conversation_text(
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    writer: Writer,
    data: DataConfig,
    *,
    generate: bool = False,
) -> str:
    """Canonical turns as the template writes them, each part in the form that it prints."""
    read = folded(turns) if data.system == "fold" else turns
    keys = [form for form in writer.reasoning if form != INLINE]
    found = []
    for turn in read:
        thought = thought_of(turn) if turn.role == "assistant" and keys else None
        if thought is not None and thought.form not in writer.reasoning:
            turn = with_thought_as(turn, keys[0])
        found.append(with_arguments_as(turn, writer.arguments))
    return writer.render(found, tools, generate=generate)


SLOT = "Sl0t5q"  # where reasoning is put that the template does not print


def _with_answer(
    turns: Sequence[Message],
    answer: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    writer: Writer,
    data: DataConfig,
) -> str:
    """Prompt and answer as the template writes them, with the answer's reasoning in front where that is to be kept."""
    thought = thought_of(answer[-1]) if data.reasoning == "keep" and answer else None
    if thought is None or thought.form in writer.reasoning or set(writer.reasoning) - {INLINE}:
        return conversation_text((*turns, *answer), tools, writer, data)
    slotted = thought.rest._replace(content=SLOT + thought.rest.content)
    text = conversation_text((*turns, *answer[:-1], slotted), tools, writer, data)
    head, found, tail = text.rpartition(SLOT)
    if not found:
        return text
    return head.removesuffix(writer.lead if writer.lead.strip() else "") + thought_block(thought) + tail


KNOWN = 4096  # shapes of rows that are remembered


def arrivals(
    turns: Sequence[Message],
    answer: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    writer: Writer,
    data: DataConfig,
) -> list[str]:
    """What became of the parts of a row on their way into the text, to be counted; see `judge`.

    Rows of one shape are treated alike, so it is looked at once.
    """
    marked = plant((*turns, *answer), tools)
    key = (marked.shape, len(answer), data.system, data.reasoning)
    if key not in writer.seen:
        if len(writer.seen) >= KNOWN:
            writer.seen.clear()
        writer.seen[key] = _arrival(marked, len(turns), writer, data)
    return judge(marked, writer.seen[key], len(turns), data.reasoning)


def _arrival(marked: Marked, answers: int, writer: Writer, data: DataConfig) -> Arrival:
    turns, answer = marked.turns[:answers], marked.turns[answers:]
    if not answer:
        text = conversation_text(turns, marked.tools, writer, data, generate=True)
        return Arrival(tuple(arrived(marked.parts, text).values()))
    text = _with_answer(turns, answer, marked.tools, writer, data)
    known = {"user", "assistant", *(SYSTEM if data.system == "fold" else ())}
    as_answers = []
    for role in dict.fromkeys(turn.role for turn in turns if turn.role not in known):
        other = tuple(turn._replace(role="assistant") if turn.role == role else turn for turn in turns)
        try:
            if _with_answer(other, answer, marked.tools, writer, data) == text:
                as_answers.append(role)
        except BadRow:
            continue  # a template that refuses it tells the roles apart
    return Arrival(tuple(arrived(marked.parts, text).values()), tuple(as_answers))


def _rewritten(full: str, turns: Sequence[Message], answer: Sequence[Message], *, stripped: bool) -> list[str]:
    """Contents that stand in the text otherwise than in the row, beyond white space at their ends."""
    found = []
    if not all(turn.content.strip() in full or thought_of(turn) for turn in turns):
        found.append("turn of the prompt rewritten by the chat template")
    for turn in answer:
        thought = thought_of(turn) if stripped else None
        if (thought.rest if thought else turn).content.strip() not in full:
            found.append("completion rewritten by the chat template")
    return found


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
