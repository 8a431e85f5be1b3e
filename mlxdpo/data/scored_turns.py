"""Trajectories become token ids: which tokens of a conversation of several assistant turns are scored.

Scored is each judged assistant turn from behind the header that the template writes for it through its end-of-turn
token; never what users and tools say, nor turns that come before what is judged. The whole conversation is rendered
and tokenised once, as the model will see it. Where a turn begins is found as for a single one: render the turns before
it with the generation prompt, and take the common token prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.fields import as_turns
from mlxdpo.data.render import arrivals, conversation_text, cut_at_end, without_end_token
from mlxdpo.data.report import BadRow
from mlxdpo.data.template import Writer
from mlxdpo.data.turns import canonical
from mlxdpo.types import Message, Preference, UnpairedExample, UserError


class RenderedTurns(NamedTuple):
    """A trajectory as text.

    prompt       the turns before the first assistant turn that belongs to a completion
    fulls        each completion with all that comes before it, through its last assistant turn
    starts       for each completion the text before each of its judged turns, with its header
    """

    prompt: str
    fulls: tuple[str, ...]
    starts: tuple[tuple[str, ...], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is tokenised, in the order that `split_turns` takes ids."""
        return (self.prompt, *self.fulls, *(text for texts in self.starts for text in texts))


def render_turns(
    row: Preference | UnpairedExample, writer: Writer, data: DataConfig, changes: list[str]
) -> RenderedTurns:
    """A trajectory as text. Raises `BadRow` for one that the template writes otherwise than turn by turn."""
    if not writer.chat:
        raise UserError(
            f"{row.where}: the row is a trajectory of messages, but the tokenizer has no chat template; use an "
            "instruction-tuned model"
        )
    assert row.context is not None
    before, tools = canonical(as_turns(row.prompt)), row.tools
    if tools and writer.with_tools is not None:
        writer = writer.with_tools
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    prompts = [conversation_text(before, tools, writer, data, generate=generate) for generate in (False, True)]
    fulls, starts, noted = [], [], list[str]()
    for answer in answers:
        assert not isinstance(answer, str)
        turns = (*before, *_cleaned(canonical(answer), writer, changes))
        judged = [i for i in range(len(before) + row.context, len(turns)) if turns[i].role == "assistant"]
        fulls.append(cut_at_end(conversation_text(turns, tools, writer, data), writer))
        starts.append(tuple(_start_of_turn(turns, i, tools, fulls[-1], writer, data) for i in judged))
        noted += arrivals(turns[: judged[0]], turns[judged[0] :], tools, writer, data)
        if not all(turns[i].content.strip() in fulls[-1] for i in judged):
            changes.append("completion rewritten by the chat template")
    changes += dict.fromkeys(noted)
    led = [full.startswith(texts[-1] + writer.lead) for full, texts in zip(fulls, starts, strict=True)]
    if writer.lead.strip() and all(led):
        changes.append("empty thinking block, written by the template, counted as prompt")
        starts = [(*texts[:-1], texts[-1] + writer.lead) for texts in starts]
    # Without the next header, where the template can: it may depend on the turn that follows.
    prompt = prompts[0] if prompts[1].startswith(prompts[0]) else prompts[1]
    return RenderedTurns(prompt, tuple(fulls), tuple(starts))


def _cleaned(turns: Sequence[Message], writer: Writer, changes: list[str]) -> tuple[Message, ...]:
    """The turns through the last one of the assistant, without end-of-turn tokens in their text."""
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
    if last + 1 < len(turns):
        changes.append("turns after the last assistant turn skipped: nothing there is scored")
    cleaned = tuple(turn for one in turns[: last + 1] for turn in without_end_token((one,), writer, changes))
    ends = [end for end in writer.tokenizer.convert_ids_to_tokens(sorted(writer.ends)) if end]
    if any(end in turn.content for turn in cleaned if turn.role == "assistant" for end in ends):
        raise BadRow("end-of-sequence inside", "an assistant turn has an end-of-sequence token before its end")
    return cleaned


def _start_of_turn(
    turns: Sequence[Message],
    at: int,
    tools: Sequence[Mapping[str, Any]],
    full: str,
    writer: Writer,
    data: DataConfig,
) -> str:
    """The text before turn `at`, with its header. Raises `BadRow` where the template writes the turn, or those before
    it, otherwise when others follow: what is scored would not be what the model is asked to write."""
    start = conversation_text(turns[:at], tools, writer, data, generate=True)
    bare = conversation_text(turns[:at], tools, writer, data)
    ended = cut_at_end(conversation_text(turns[: at + 1], tools, writer, data), writer)
    different = (i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b)
    common = next(different, min(len(start), len(full)))
    least = len(bare) if start.startswith(bare) else len(start)
    # An empty thinking block, which only the last turn and the header before it may have, is no part of the answer.
    answer = ended[len(start) :].removeprefix(writer.lead) if ended.startswith(start) else None
    begins = (
        q
        for q in range(common, least - 1, -1)
        if full.startswith(ended[q:], q) or (answer and full.startswith(answer, q))
    )
    begin = next(begins, None)
    if begin is None:
        raise BadRow(
            "turn rewritten once others follow",
            f"the chat template writes turn {at + 1} or those before it differently once others follow (it drops "
            "reasoning, for example), so the turns cannot be scored in one row; set data.credit to turn",
        )
    if at + 1 < len(turns) and not writer.end:
        raise BadRow(
            "turn without an end",
            "the chat template ends no assistant turn with a token, so turns in the middle have no end that could be "
            "scored; set data.credit to turn",
        )
    return full[:begin]


class SplitTurns(NamedTuple):
    """Token ids (int32) of prompt and completions, and of each completion which are scored (bool)."""

    prompt: np.ndarray
    completions: list[np.ndarray]
    masks: list[np.ndarray]


def split_turns(ids: Sequence[np.ndarray], rendered: RenderedTurns, writer: Writer, changes: list[str]) -> SplitTurns:
    """Ids of `rendered.texts` → prompt, completions and masks.

    Both completions begin to be scored at the same token where the same turns come before. Raises `BadRow` for an
    empty prompt and for a completion without a scored token.
    """
    prompt, fulls, rest = ids[0], ids[1 : 1 + len(rendered.fulls)], list(ids[1 + len(rendered.fulls) :])
    begins = []
    for texts, full in zip(rendered.starts, fulls, strict=True):
        starts, rest = rest[: len(texts)], rest[len(texts) :]
        begins.append([common_prefix(start, full) for start in starts])
        if any(begin < len(start) for begin, start in zip(begins[-1], starts, strict=True)):
            changes.append("boundary moved back: the prompt's last tokens merge with the completion")
    if len({texts[0] for texts in rendered.starts}) == 1:
        first = min(begin[0] for begin in begins)
        begins = [[first, *begin[1:]] for begin in begins]
    boundary = min(common_prefix(prompt, full) for full in fulls)
    if boundary == 0:
        raise BadRow("empty prompt", "the prompt has no tokens, so the completion's first token has no context")
    if writer.unk is not None and any(writer.unk in full for full in fulls):
        changes.append("text with characters that the tokenizer does not know")
    completions, masks = [], []
    for full, starts in zip(fulls, begins, strict=True):
        full = _with_end(full, writer)
        mask = np.zeros(len(full), bool)
        for start in starts:
            mask[start : _end_of_turn(full, start, writer)] = True
        if not mask[boundary:].any():
            raise BadRow("no scored token", "a completion adds no token to its prompt, so there is nothing to train on")
        last = int(np.flatnonzero(mask)[-1]) + 1  # from what follows nothing is predicted
        completions.append(full[boundary:last])
        masks.append(mask[boundary:last])
    return SplitTurns(prompt[:boundary], completions, masks)


def _with_end(full: np.ndarray, writer: Writer) -> np.ndarray:
    if int(full[-1]) in writer.ends or not writer.scores_end:
        return full
    if writer.eos is None:
        raise UserError("neither the tokenizer nor the model defines an end-of-sequence token; set eos_token_id")
    return np.append(full, np.int32(writer.eos))


def _end_of_turn(full: np.ndarray, start: int, writer: Writer) -> int:
    """Where the scored tokens of the turn that starts at `start` end: behind its end-of-turn token, or before it."""
    ends = np.flatnonzero(np.isin(full[start:], list(writer.ends)))
    return start + (int(ends[0]) + writer.scores_end if len(ends) else len(full) - start)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two vectors begin with alike."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n
