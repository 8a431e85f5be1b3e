"""A row as text: the prompt, and the prompt with each completion, cut after the end of the answer's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow
from mlxdpo.data.template import Writer
from mlxdpo.types import Message, Text, UserError


class Rendered(NamedTuple):
    """A row as text: the prompt, and each completion together with it. `plain`: no template wrote it."""

    prompt: str
    fulls: tuple[str, ...]
    plain: bool


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
        answer = _without_end_token(_turns(completion, "assistant"), writer, changes)
        fulls.append(_cut_at(writer.render((*turns, *answer), tools, generate=False), writer))
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


def checked_unicode(rendered: Rendered) -> Rendered:
    """Raises `BadRow` for half a surrogate pair (JSON lets "\\ud83d" through; tokenizers do not)."""
    try:
        for text in (rendered.prompt, *rendered.fulls):
            text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadRow("not Unicode", f"the text has half a character ({half!a}); write it as UTF-8") from None
    return rendered


def _turns(text: Text, role: str) -> tuple[Message, ...]:
    return (Message(role, text),) if isinstance(text, str) else text


def _without_end_token(answer: tuple[Message, ...], writer: Writer, changes: list[str]) -> tuple[Message, ...]:
    """Texts copied from a model's output may end in the token that the template is about to write again."""
    end = writer.end.strip()
    if not end or not answer or not answer[-1].content.rstrip().endswith(end):
        return answer
    changes.append("end-of-turn token in the text left out")
    last = answer[-1]
    return (*answer[:-1], last._replace(content=last.content.rstrip().removesuffix(end)))


def _cut_at(full: str, writer: Writer) -> str:
    """Without what the template prints after the end of the turn."""
    return full.removesuffix(writer.rest) if full.endswith(writer.end + writer.rest) else full
