"""Preferences become token ids: which tokens are prompt and which are scored.

The prompt is rendered with the generation prompt, prompt and completion are rendered together, and the
boundary is the common token prefix of all: tokenizers merge across it, so `len(prompt ids)` proves nothing.
Scored is the completion through its end-of-turn token, exactly once; what a template prints after that is cut
off (TRL scores it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.fit import fit
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.template import Writer, probe, template_digest, unwrap
from mlxdpo.types import Example, Message, Preference, Text, UserError

__all__ = ["Shown", "describe", "encode", "encode_all", "encode_prompt", "template_digest"]

CHUNK = 1000  # rows tokenised in one call: the tokenizer's threads are kept busy, and progress is seen


class Rendered(NamedTuple):
    """A row as text: the prompt, and each completion together with it. `plain`: no template wrote it."""

    prompt: str
    fulls: tuple[str, ...]
    plain: bool


class Shown(NamedTuple):
    """A decoded pair: segments of text, each with whether it is scored."""

    chosen: list[tuple[str, bool]]
    rejected: list[tuple[str, bool]]


def encode(
    row: Preference,
    tokenizer: Any,
    data: DataConfig,
    report: Report,
    *,
    eos_ids: frozenset[int] | None = None,
) -> Example | None:
    """Token ids of one pair, or None for a row that is left out (counted in `report` with its reason).

    Raises `UserError` for a bad row when `data.on_bad_row` is stop, and for settings the tokenizer cannot
    serve. `encode_all` is the fast way for many.
    """
    return _encode_chunk([row], probe(tokenizer, data, eos_ids), data, report)[0]


def encode_all(
    rows: Sequence[Preference],
    tokenizer: Any,
    data: DataConfig,
    *,
    eos_ids: frozenset[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], Report]:
    """`encode` for many rows, in order, with one report. `progress(done, total)` is called now and then."""
    writer, report = probe(tokenizer, data, eos_ids), Report()
    examples: list[Example] = []
    for at in range(0, len(rows), CHUNK):
        examples += [e for e in _encode_chunk(rows[at : at + CHUNK], writer, data, report) if e]
        if progress:
            progress(min(at + CHUNK, len(rows)), len(rows))
    return examples, report


def encode_prompt(
    prompt: Text, tokenizer: Any, data: DataConfig, tools: Sequence[Mapping[str, Any]] = ()
) -> np.ndarray:
    """Ids (int32) to generate from: the prompt with the generation prompt, as in training.

    The same ids as `Example.prompt`, except of a row that was trimmed, whose boundary was moved or that got
    an empty thinking block (each counted). Raises `UserError` when the template refuses the turns.
    """
    writer = probe(tokenizer, data)
    try:
        rendered = _unicode(render(prompt, (), tools, writer, data, "prompt", Report()))
    except BadRow as bad:
        raise UserError(f"prompt: {bad.sentence}") from None
    ids = writer.ids([rendered.prompt])[0]
    return np.array(_begin(ids, writer) if rendered.plain else _one_bos(ids, writer), np.int32)


def describe(example: Example, tokenizer: Any) -> Shown:
    """The pair as text, special tokens visible, in segments of unscored and scored text."""
    return Shown(*(_segments(example.prompt, c, tokenizer) for c in (example.chosen, example.rejected)))


def _segments(prompt: np.ndarray, completion: np.ndarray, tokenizer: Any) -> list[tuple[str, bool]]:
    """Decodes the whole row: a segment alone loses its leading space (SentencePiece) or tears characters."""
    before, whole = (_decode(ids, tokenizer) for ids in (prompt, np.concatenate([prompt, completion])))
    # A character with bytes on both sides decodes to U+FFFD in the prompt alone: it goes to the scored side.
    while not whole.startswith(before):
        before = before[:-1]
    return [(text, scored) for text, scored in ((before, False), (whole[len(before) :], True)) if text]


def _decode(ids: np.ndarray, tokenizer: Any) -> str:
    return unwrap(tokenizer).decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _encode_chunk(
    rows: Sequence[Preference], writer: Writer, data: DataConfig, report: Report
) -> list[Example | None]:
    """Render every row, tokenise all texts in one call, then cut each row into prompt and completions."""
    rendered: list[Rendered | None] = []
    for row in rows:
        report.read += 1
        try:
            both = (row.chosen, row.rejected)
            rendered.append(_unicode(render(row.prompt, both, row.tools, writer, data, row.where, report)))
        except BadRow as bad:
            report.refuse(row.where, bad, data.on_bad_row)
            rendered.append(None)
    texts = iter(writer.ids([t for r in rendered if r for t in (r.prompt, *r.fulls)]))
    result: list[Example | None] = []
    for row, r in zip(rows, rendered, strict=True):
        ids = [next(texts) for _ in range(1 + len(r.fulls))] if r else []
        result.append(_example(row.where, ids, r, writer, data, report) if r else None)
    return result


def _example(
    where: str, ids: list[list[int]], rendered: Rendered, writer: Writer, data: DataConfig, report: Report
) -> Example | None:
    try:
        prompt, completions = split(where, ids, rendered, writer, report)
        fitted = fit(where, prompt, completions, writer.bos, data, report)
        if fitted is None:
            return None
        prompt, (chosen, rejected) = fitted
        if np.array_equal(chosen, rejected):
            raise BadRow("identical after tokenisation", "chosen and rejected are the same tokens")
    except BadRow as bad:
        report.refuse(where, bad, data.on_bad_row)
        return None
    report.kept += 1
    return Example(prompt, chosen, rejected, where)


def render(
    prompt: Text,
    completions: tuple[Text, ...],
    tools: Sequence[Mapping[str, Any]],
    writer: Writer,
    data: DataConfig,
    where: str,
    report: Report,
) -> Rendered:
    """A prompt and its completions as text, each completion cut after its end-of-turn token.

    Raises `BadRow` when the template refuses the turns, `UserError` when there is no template to ask.
    """
    messages = any(not isinstance(text, str) for text in (prompt, *completions))
    if not messages and (data.template == "plain" or (data.template == "auto" and not writer.chat)):
        return Rendered(prompt, tuple(prompt + c for c in completions), plain=True)
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
        answer = _without_end(_turns(completion, "assistant"), writer, where, report)
        fulls.append(_cut(writer.render((*turns, *answer), tools, generate=False), writer))
        if not all(message.content.strip() in fulls[-1] for message in answer):
            report.change(where, "completion rewritten by the chat template")
    return Rendered(_led(before, fulls, writer, where, report), tuple(fulls), plain=False)


def _led(before: str, fulls: Sequence[str], writer: Writer, where: str, report: Report) -> str:
    """The prompt with the empty thinking block that the template writes before answers without reasoning.

    Where one answer reasons and another does not, the empty block is what tells them apart, and is scored.
    """
    led = [bool(writer.lead) and full.startswith(before + writer.lead) for full in fulls]
    if led and all(led):
        report.change(where, "empty thinking block, written by the template, counted as prompt")
        return before + writer.lead
    if any(led):
        report.change(where, "empty thinking block scored: the other completion has reasoning")
    if not all(full.startswith(before) for full in fulls):
        report.change(
            where, "boundary moved back: the template writes the turn otherwise than it prompts for it"
        )
    return before


def _unicode(rendered: Rendered) -> Rendered:
    """Raises `BadRow` for half a surrogate pair (JSON lets "\\ud83d" through; tokenizers do not)."""
    try:
        for text in (rendered.prompt, *rendered.fulls):
            text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadRow(
            "not Unicode", f"the text has half a character ({half!a}); write it as UTF-8"
        ) from None
    return rendered


def _turns(text: Text, role: str) -> tuple[Message, ...]:
    return (Message(role, text),) if isinstance(text, str) else text


def _without_end(
    answer: tuple[Message, ...], writer: Writer, where: str, report: Report
) -> tuple[Message, ...]:
    """Texts copied from a model's output may end in the token that the template is about to write again."""
    end = writer.end.strip()
    if not end or not answer or not answer[-1].content.rstrip().endswith(end):
        return answer
    report.change(where, "end-of-turn token in the text left out")
    last = answer[-1]
    return (*answer[:-1], last._replace(content=last.content.rstrip().removesuffix(end)))


def _cut(full: str, writer: Writer) -> str:
    """Without what the template prints after the end of the turn."""
    return full.removesuffix(writer.rest) if full.endswith(writer.end + writer.rest) else full


def split(
    where: str, ids: list[list[int]], rendered: Rendered, writer: Writer, report: Report
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the prompt text and of each full text → prompt (P,) and completions, int32, each with one EOS.

    The boundary is the common token prefix, the shortest over the completions, so that they share their
    prompt. Raises `BadRow` for an empty prompt and for an end-of-sequence token in mid-completion.
    """
    begin = _begin if rendered.plain else _one_bos
    prompt, *fulls = (np.array(begin(i, writer), np.int32) for i in ids)
    boundary = min(_common_prefix(prompt, full) for full in fulls)
    if boundary < len(prompt) and all(full.startswith(rendered.prompt) for full in rendered.fulls):
        report.change(where, "boundary moved back: the prompt's last tokens merge with the completion")
    if boundary == 0:
        raise BadRow(
            "empty prompt", "the prompt has no tokens, so the completion's first token has no context"
        )
    completions = [_ended(full[boundary:], writer) for full in fulls]
    if any(np.isin(completion[:-1], list(writer.ends)).any() for completion in completions):
        raise BadRow("end-of-sequence inside", "a completion has an end-of-sequence token before its end")
    return prompt[:boundary], completions


def _ended(completion: np.ndarray, writer: Writer) -> np.ndarray:
    if len(completion) and int(completion[-1]) in writer.ends:
        return completion
    if writer.eos is None:
        raise UserError(
            "neither the tokenizer nor the model names an end-of-sequence token; set eos_token_id"
        )
    return np.append(completion, np.int32(writer.eos))


def _begin(ids: list[int], writer: Writer) -> list[int]:
    """Plain text with the tokenizer's BOS, unless the text brings it."""
    start = list(writer.start)
    return _one_bos(ids if ids[: len(start)] == start else start + ids, writer)


def _one_bos(ids: list[int], writer: Writer) -> list[int]:
    """A template may write a BOS before text that already begins with one."""
    while len(ids) > 1 and ids[0] == ids[1] and ids[0] in writer.bos:
        ids = ids[1:]
    return ids


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n
