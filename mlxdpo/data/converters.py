"""Row shapes: one small function per shape turns a row into preferences or opinions.

`formats.FORMATS` registers them. A function sees a row whose columns are there and of the right kind; whatever else
is wrong with it raises `BadRow`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxdpo.data import fields, reasons
from mlxdpo.data.fields import (
    Row,
    answer,
    as_turns,
    extra_id_turns,
    one_answer,
    prompt_of_row,
    prompt_turns,
    split_transcripts,
)
from mlxdpo.data.report import BadRow
from mlxdpo.data.trajectories import Judged, judged_answer, pair_of_answers, pair_of_conversations
from mlxdpo.types import Message, Preference, Text, UnpairedExample

Items = Judged


def text_pair(row: Row) -> Items:
    """Plain prompt and completions, as they stand, or two trajectories behind a prompt."""
    prompt = prompt_of_row(row.values, "prompt")
    if (pair := pair_of_answers(row, as_turns(prompt))) is not None:
        return [pair]
    return [_preference(row, prompt, answer(row.values, "chosen", prompt), answer(row.values, "rejected", prompt))]


def system_text(row: Row) -> Items:
    """A system prompt beside plain text; an empty one is left out."""
    return _with_system(row, "prompt")


def orca(row: Row) -> Items:
    """The question is the user's turn, after the system prompt if there is one."""
    return _with_system(row, "question")


def _with_system(row: Row, column: str) -> Items:
    question = (Message("user", fields.checked_text(row.values, column)),)
    system = row.values.get("system") or ""
    turns = (Message("system", fields.checked_text(row.values, "system")), *question) if system.strip() else question
    prompt = prompt_turns(turns)
    return [_preference(row, prompt, answer(row.values, "chosen", prompt), answer(row.values, "rejected", prompt))]


def implicit(row: Row) -> Items:
    """The prompt is the turns that both conversations share; what differs is one assistant turn, or all that follow."""
    return [_parted(row)]


def _parted(row: Row) -> Preference:
    """Two conversations as a pair: plain where they differ in the last turn alone."""
    chosen, rejected = fields.messages(row.values, "chosen"), fields.messages(row.values, "rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    if not len(chosen) == len(rejected) == shared + 1:
        return pair_of_conversations(row, chosen, rejected)
    answers = one_answer(chosen[shared:], "chosen"), one_answer(rejected[shared:], "rejected")
    return _preference(row, prompt_turns(chosen[:shared]), *answers)


def turns(row: Row) -> Items:
    """A text prompt beside whole conversations that repeat it, or beside the assistant turns alone."""
    conversations = [fields.messages(row.values, name) for name in ("chosen", "rejected")]
    if all(len(turns) == 1 or turns[0].role == "assistant" for turns in conversations):
        return text_pair(row)
    pair = _parted(row)
    asked = _squeezed(fields.checked_text(row.values, "prompt"))
    said = [_squeezed(m.content) for m in conversations[0][: len(pair.prompt) + (pair.context or 0)] if m.content]
    if not any(asked in turn or turn in asked for turn in said if turn):
        raise BadRow(
            reasons.PROMPT_MISMATCH,
            '"prompt" is in none of the shared turns of "chosen" and "rejected"; '
            "set data.format to implicit if the turns are right",
        )
    return [pair]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def hh(row: Row) -> Items:
    """Human:/Assistant: transcripts, split at the last Assistant: of the chosen one."""
    return [_preference(row, *split_transcripts(row.values))]


def opinion(row: Row) -> Items:
    """One completion, or a trajectory, with a thumb up or down."""
    prompt = prompt_of_row(row.values, "prompt")
    if (judged := judged_answer(row, as_turns(prompt), fields.flag(row.values, "label"))) is not None:
        return [judged]
    completion = answer(row.values, "completion", prompt)
    if not isinstance(completion, str):
        prompt = as_turns(prompt)
    return [UnpairedExample(prompt, completion, fields.flag(row.values, "label"), row.where)]


def demonstration(row: Row) -> Items:
    """One completion, or a trajectory, that is worth imitating."""
    prompt = prompt_of_row(row.values, "prompt")
    if (judged := judged_answer(row, as_turns(prompt), True)) is not None:
        return [judged]
    completion = answer(row.values, "completion", prompt)
    return [UnpairedExample(prompt if isinstance(completion, str) else as_turns(prompt), completion, True, row.where)]


def conversation(row: Row) -> Items:
    """Each assistant turn behind something a user said is worth imitating; what stands before it is its prompt."""
    turns = fields.messages(row.values, "messages")
    asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    at = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > asked]
    if not at:
        raise BadRow(reasons.NOT_ONE_ANSWER, '"messages" has no assistant turn behind a user turn; expected one')
    return [
        UnpairedExample(prompt_turns(turns[:i]), one_answer(turns[i : i + 1], "messages"), True, row.where) for i in at
    ]


def signed_strength(row: Row) -> Items:
    """preference_strength above zero: response_2 is better (the HelpSteer3 card's sign); zero is a tie."""
    strength = fields.checked_number(row.values, "preference_strength")
    if strength == 0:
        raise BadRow(reasons.TIED, '"preference_strength" is 0: neither response is better')
    better, worse = ("response_2", "response_1") if strength > 0 else ("response_1", "response_2")
    prompt = prompt_turns(extra_id_turns(fields.checked_text(row.values, "prompt")))
    return [_preference(row, prompt, answer(row.values, better, prompt), answer(row.values, worse, prompt))]


def helpsteer(row: Row) -> Items:
    """Rated responses of one prompt, gathered; the one rated more helpful is chosen."""
    prompt = prompt_turns(extra_id_turns(fields.checked_text(row.values, "prompt")))
    return _ranked(row, prompt, row.values["completions"], row.values["scores"])


def gather_helpsteer(rows: Sequence[Row]) -> Row:
    """The responses to one prompt, a row each, as one row of rated completions."""
    first, *others = rows
    if not others:
        raise BadRow(reasons.LONE, "the prompt has this one response; expected the next row to have another")
    # What the rows disagree about belongs to a response, not to the pair.
    shared = {n: v for n, v in first.values.items() if all(row.values.get(n) == v for row in others)}
    rated = {
        "completions": [row.values["response"] for row in rows],
        "scores": [row.values["helpfulness"] for row in rows],
    }
    return Row(first.where, shared | rated)


def ranked(row: Row) -> Items:
    """K scored completions of one prompt make a pair of every two whose scores differ, at most K(K-1)/2."""
    prompt = prompt_of_row(row.values, "prompt")
    return _ranked(row, prompt, row.values["completions"], row.values["scores"])


def _ranked(row: Row, prompt: Text, completions: Sequence[str], scores: Sequence[float | str]) -> Items:
    if len(completions) != len(scores):
        raise BadRow(reasons.WRONG_TYPE, f'"completions" has {len(completions)} items and "scores" {len(scores)}')
    named = {f"completion {n}": completion for n, completion in enumerate(completions, 1)}
    answers = [answer(named, name, prompt) for name in named]
    found = sorted(zip(map(float, scores), answers, strict=True), key=lambda item: -item[0])
    pairs = [(a, b) for i, (high, a) in enumerate(found) for low, b in found[i + 1 :] if high > low]
    if not pairs:
        raise BadRow(reasons.TIED, f"all {len(scores)} completions have the score {float(scores[0]):g}")
    return [_preference(row, prompt, better, worse) for better, worse in pairs]


def reddit(row: Row) -> Items:
    """SHP: labels 1: comment A is better. Vote ratios below 2 are left out, as the data card advises."""
    if "score_ratio" in row.values and (ratio := fields.checked_number(row.values, "score_ratio")) < 2:
        raise BadRow(reasons.WEAK, f'"score_ratio" is {ratio:g}, below 2')
    first, second = "human_ref_A", "human_ref_B"
    better, worse = (first, second) if fields.flag(row.values, "labels") else (second, first)
    prompt = prompt_of_row(row.values, "history")
    return [_preference(row, prompt, answer(row.values, better, prompt), answer(row.values, worse, prompt))]


def revision(row: Row) -> Items:
    """Constitutional AI: the revised response is chosen over the first one."""
    prompt = prompt_of_row(row.values, "init_prompt")
    better, worse = (answer(row.values, name, prompt) for name in ("revision_response", "init_response"))
    return [_preference(row, prompt, better, worse)]


def _preference(row: Row, prompt: Text, chosen: Text, rejected: Text) -> Preference:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(reasons.WRONG_TYPE, "one completion is text and the other messages; expected the same of both")
    return Preference(prompt if isinstance(chosen, str) else as_turns(prompt), chosen, rejected, row.where)
