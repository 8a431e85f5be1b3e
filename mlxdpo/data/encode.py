"""Preferences become token ids: which tokens are prompt and which are scored.

The prompt is rendered with the generation prompt, prompt and completion are rendered together, and the
boundary is the common token prefix of all: tokenizers merge across it, so `len(prompt ids)` proves nothing.
Scored is the completion through its end-of-turn token, exactly once; what a template prints after that is cut
off (TRL scores it).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.render import Rendered, checked_unicode, render
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.scored_turns import RenderedTurns, common_prefix, render_turns, split_turns
from mlxdpo.data.template import Writer, probe, unwrap
from mlxdpo.types import Example, Extras, Preference, Text, UnpairedExample, UserError

# Rows that are too long: what is cut, what is dropped, and that it is counted.


class DroppedRow(BadRow):
    """A row left out because the settings say so; nothing is wrong with it, so it never stops a run."""


def fit_to_limit(
    where: str,
    prompt: np.ndarray,
    completions: list[np.ndarray],
    bos: frozenset[int],
    data: DataConfig,
    changes: list[str],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cut a row to `data.max_length` tokens, one prompt for all completions; `changes` gets what was done.

    The prompt loses its beginning but keeps a BOS (an id in `bos`); the completions stay whole. Only one that
    leaves no room for a single prompt token is cut itself; the prompt then keeps up to half of the limit.
    Raises `DroppedRow` or `UserError` where the settings say drop or stop.
    """
    limit, longest = data.max_length, max(map(len, completions))
    if longest + 1 > limit:
        what = f"a completion of {longest} tokens does not fit data.max_length {limit}"
        _allow(data.on_long_completion, "completion", where, what)
        longest = limit - min(len(prompt), limit // 2)
        changes.append("completion truncated")
        completions = [completion[:longest] for completion in completions]
    room = limit - longest
    if len(prompt) > room:
        what = f"a prompt of {len(prompt)} tokens and a completion of {longest} exceed data.max_length {limit}"
        _allow(data.on_long_prompt, "prompt", where, what)
        changes.append("prompt trimmed")
        head = prompt[:1] if int(prompt[0]) in bos else prompt[:0]
        prompt = np.concatenate([head, prompt[len(prompt) - room + len(head) :]])
    return prompt, completions


def _allow(policy: str, part: Literal["prompt", "completion"], where: str, what: str) -> None:
    """Passes when the policy is to cut (trim, truncate)."""
    if policy == "stop":
        cut = {"prompt": "trim", "completion": "truncate"}[part]
        raise UserError(f"{where}: {what}; raise data.max_length, or set data.on_long_{part} to {cut} or drop")
    if policy == "drop":
        raise DroppedRow(f"{part} too long", what)


CHUNK = 1000  # rows tokenised in one call: the tokenizer's threads are kept busy


class Shown(NamedTuple):
    """A decoded pair: segments of text, each with whether it is scored."""

    chosen: list[tuple[str, bool]]
    rejected: list[tuple[str, bool]]


def encode(
    row: Preference | UnpairedExample,
    tokenizer: Any,
    data: DataConfig,
    report: Report,
    *,
    eos_ids: frozenset[int] | None = None,
) -> Example | None:
    """Token ids of one row, or None for one that is left out (counted in `report` with its reason).

    The example of an `UnpairedExample` has its completion twice, and its thumb in `extras`.

    Raises `UserError` for a bad row when `data.on_bad_row` is stop, and for settings the tokenizer cannot
    serve. `encode_all` is the fast way for many.
    """
    return _encode_chunk([row], probe(tokenizer, data, eos_ids), data, report)[0]


def encode_all(
    rows: Sequence[Preference | UnpairedExample],
    tokenizer: Any,
    data: DataConfig,
    *,
    eos_ids: frozenset[int] | None = None,
) -> tuple[list[Example], Report]:
    """`encode` for many rows, in order, with one report."""
    writer, report = probe(tokenizer, data, eos_ids), Report()
    examples: list[Example] = []
    for at in range(0, len(rows), CHUNK):
        examples += [e for e in _encode_chunk(rows[at : at + CHUNK], writer, data, report) if e]
    return examples, report


def encode_stream(
    rows: Iterable[Preference | UnpairedExample], writer: Writer, data: DataConfig, report: Report
) -> Iterator[Example]:
    """`encode` for more rows than fit in memory, in order, a chunk at a time; `writer` is what `probe` found."""
    left = iter(rows)
    while chunk := list(itertools.islice(left, CHUNK)):
        yield from (example for example in _encode_chunk(chunk, writer, data, report) if example)


def encode_prompt(
    prompt: Text, tokenizer: Any, data: DataConfig, tools: Sequence[Mapping[str, Any]] = ()
) -> np.ndarray:
    """Ids (int32) to generate from: the prompt with the generation prompt, as in training.

    The same ids as `Example.prompt`, except of a row that was trimmed, whose boundary was moved or that got
    an empty thinking block (each counted). Raises `UserError` when the template refuses the turns.
    """
    writer = probe(tokenizer, data)
    try:
        rendered = checked_unicode(render(prompt, (), tools, writer, data, "prompt", []))
    except BadRow as bad:
        raise UserError(f"prompt: {bad.sentence}") from None
    ids = writer.ids([rendered.prompt])[0]
    return np.array(_cut_beginning(ids, writer) if rendered.plain else _one_bos(ids, writer), np.int32)


def shown_example(example: Example, tokenizer: Any) -> Shown:
    """The pair as text, special tokens visible, in segments of unscored and scored text."""
    both = ((example.chosen, example.chosen_mask), (example.rejected, example.rejected_mask))
    return Shown(*(_segments(example.prompt, *completion, tokenizer) for completion in both))


def _segments(
    prompt: np.ndarray, completion: np.ndarray, mask: np.ndarray | None, tokenizer: Any
) -> list[tuple[str, bool]]:
    """Decodes the whole row: a segment alone loses its leading space (SentencePiece) or tears characters."""
    ids = np.concatenate([prompt, completion])
    scored = np.arange(len(ids)) >= len(prompt)
    if mask is not None:
        scored[len(prompt) :] = mask
    whole, segments, at = _decode(ids, tokenizer), [], 0
    for end in [*np.flatnonzero(np.diff(scored)) + 1, len(ids)]:
        before = _decode(ids[:end], tokenizer)
        # A character with bytes on both sides decodes to U+FFFD in its first half alone: it goes to the later side.
        while not whole.startswith(before):
            before = before[:-1]
        segments.append((before[at:], bool(scored[end - 1])))
        at = len(before)
    return [(text, is_scored) for text, is_scored in segments if text]


def _decode(ids: np.ndarray, tokenizer: Any) -> str:
    return unwrap(tokenizer).decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _encode_chunk(
    rows: Sequence[Preference | UnpairedExample], writer: Writer, data: DataConfig, report: Report
) -> list[Example | None]:
    """Render every row, tokenise all texts in one call, then cut each row into prompt and completions.

    What is changed in a row is noted in `changes` and counted once it is clear that the row is kept.
    """
    changes: list[list[str]] = [[] for _ in rows]
    rendered: list[Rendered | RenderedTurns | None] = []
    for row, noted in zip(rows, changes, strict=True):
        report.read += 1
        try:
            rendered.append(_rendered(row, writer, data, noted))
        except BadRow as bad:
            report.refuse(row.where, bad, data.on_bad_row)
            rendered.append(None)
    texts = iter(writer.ids([text for r in rendered if r for text in r.texts]))
    result: list[Example | None] = []
    for row, r, noted in zip(rows, rendered, changes, strict=True):
        ids = [next(texts) for _ in r.texts] if r else []
        result.append(_example(row, ids, r, writer, data, noted, report) if r else None)
    return result


def _rendered(
    row: Preference | UnpairedExample, writer: Writer, data: DataConfig, noted: list[str]
) -> Rendered | RenderedTurns:
    if row.context is not None:
        return checked_unicode(render_turns(row, writer, data, noted))
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    return checked_unicode(render(row.prompt, answers, row.tools, writer, data, row.where, noted))


def _example(
    row: Preference | UnpairedExample,
    ids: list[list[int]],
    rendered: Rendered | RenderedTurns,
    writer: Writer,
    data: DataConfig,
    changes: list[str],
    report: Report,
) -> Example | None:
    masks: list[np.ndarray | None] = [None]
    try:
        if isinstance(rendered, RenderedTurns):
            turns = [np.array(_one_bos(i, writer), np.int32) for i in ids]
            prompt, completions, masks = split_turns(turns, rendered, writer, changes)  # type: ignore[assignment]
        else:
            prompt, completions = split_completion(ids, rendered, writer, changes)
        _differ(completions)
        if len(prompt) + max(map(len, completions)) > data.max_length:
            prompt, completions, masks = _context_in_prompt(prompt, completions, masks)
        prompt, completions = fit_to_limit(row.where, prompt, completions, writer.bos, data, changes)
        _differ(completions)  # truncation may have cut off where they differ
        masks = [_mask_of_rest(mask, len(ids)) for mask, ids in zip(masks, completions, strict=False)]
    except BadRow as bad:
        report.refuse(row.where, bad, "skip" if isinstance(bad, DroppedRow) else data.on_bad_row)
        return None
    report.kept += 1
    for change in changes:
        report.change(row.where, change)
    return Example(prompt, completions[0], completions[-1], row.where, _said_by(row), masks[0], masks[-1])


def _context_in_prompt(
    prompt: np.ndarray, completions: list[np.ndarray], masks: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray | None]]:
    """The turns that trajectories share before what is judged, moved to their prompt, which may be trimmed."""
    first = min(0 if mask is None else int(mask.argmax()) for mask in masks)
    shared = completions[0][:first]
    if not all(np.array_equal(completion[:first], shared) for completion in completions):
        return prompt, completions, list(masks)
    rest = [mask if mask is None else mask[first:] for mask in masks]
    return np.concatenate([prompt, shared]), [completion[first:] for completion in completions], rest


def _mask_of_rest(mask: np.ndarray | None, length: int) -> np.ndarray | None:
    """The mask of a completion cut to `length` tokens; None where all of it is scored."""
    if mask is None or mask.all():
        return None
    if not mask[:length].any():
        raise BadRow("no scored token", "a completion truncated at data.max_length has no scored token")
    return mask[:length]


def _said_by(row: Preference | UnpairedExample) -> Extras:
    return row.extras._replace(desirable=float(row.desirable)) if isinstance(row, UnpairedExample) else row.extras


def _differ(completions: list[np.ndarray]) -> None:
    if len(completions) == 2 and np.array_equal(completions[0], completions[1]):
        raise BadRow("identical after tokenisation", "chosen and rejected are the same tokens")


def split_completion(
    ids: list[list[int]], rendered: Rendered, writer: Writer, changes: list[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of the prompt text and of each full text → prompt (P,) and completions, int32, each with one EOS.

    The boundary is the common token prefix, the shortest over the completions, so that they share their
    prompt. Raises `BadRow` for an empty prompt and for an end-of-sequence token in mid-completion.
    """
    begin = _cut_beginning if rendered.plain else _one_bos
    prompt, *fulls = (np.array(begin(i, writer), np.int32) for i in ids)
    boundary = min(common_prefix(prompt, full) for full in fulls)
    if boundary < len(prompt) and all(full.startswith(rendered.prompt) for full in rendered.fulls):
        changes.append("boundary moved back: the prompt's last tokens merge with the completion")
    if writer.unk is not None and any(writer.unk in full for full in fulls):
        changes.append("text with characters that the tokenizer does not know")
    if boundary == 0:
        raise BadRow("empty prompt", "the prompt has no tokens, so the completion's first token has no context")
    completions = [_ended(full[boundary:], writer) for full in fulls]
    if not all(map(len, completions)):
        raise BadRow("no scored token", "a completion adds no token to its prompt, so there is nothing to train on")
    if any(np.isin(completion[:-1], list(writer.ends)).any() for completion in completions):
        raise BadRow("end-of-sequence inside", "a completion has an end-of-sequence token before its end")
    return prompt[:boundary], completions


def _ended(completion: np.ndarray, writer: Writer) -> np.ndarray:
    has_end = len(completion) > 0 and int(completion[-1]) in writer.ends
    if not writer.scores_end:
        return completion[:-1] if has_end else completion
    if has_end:
        return completion
    if writer.eos is None:
        raise UserError("neither the tokenizer nor the model defines an end-of-sequence token; set eos_token_id")
    return np.append(completion, np.int32(writer.eos))


def _cut_beginning(ids: list[int], writer: Writer) -> list[int]:
    """Plain text with the tokenizer's BOS, unless the text brings it."""
    start = list(writer.start)
    return _one_bos(ids if ids[: len(start)] == start else start + ids, writer)


def _one_bos(ids: list[int], writer: Writer) -> list[int]:
    """A template may write a BOS before text that already begins with one."""
    while len(ids) > 1 and ids[0] == ids[1] and ids[0] in writer.bos:
        ids = ids[1:]
    return ids
