"""How a row of a shape becomes preferences or opinions. A shape says which of a few ways is its own, and with which
columns: two answers of which one is named better; two answers and who won; several answers with scores; whole
conversations; one answer.

`formats.FORMATS` is the table. A converter sees a row whose columns are there and of the right kind; whatever else is
wrong with it raises `BadRow`. Context (system prompt, tools, ...) is added behind it, in `context.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlxdpo.data import fields, reasons
from mlxdpo.data.context import CONTEXT_COLUMNS
from mlxdpo.data.fields import (
    Row,
    answer,
    as_turns,
    extra_id_turns,
    one_answer,
    prompt_of_row,
    prompt_turns,
    split_last_turns,
    split_transcripts,
    transcript_turns,
)
from mlxdpo.data.report import BadRow
from mlxdpo.data.trajectories import Judged, judged_answer, pair_of_answers, pair_of_conversations
from mlxdpo.types import Message, Preference, Text, UnpairedExample

Items = Judged
Converter = Callable[[Row], Items]
Values = Mapping[str, Any]
Asked = Callable[[Values], Text]
"""Where the prompt of a row is found."""


def column(name: str) -> Asked:
    """The prompt is one column: text, or messages."""
    return lambda values: prompt_of_row(values, name)


def question(name: str) -> Asked:
    """The prompt is the user's turn, never plain text to go on with."""
    return lambda values: prompt_turns((Message("user", fields.checked_text(values, name)),))


def helpsteer_turns(values: Values) -> Text:
    """HelpSteer2's prompt, whose later turns begin with marks."""
    return prompt_turns(extra_id_turns(fields.checked_text(values, "prompt")))


def instruction(values: Values) -> Text:
    """Alpaca's instruction, and on the next line the input that it is about, if any (LLaMA-Factory joins them so)."""
    parts = [fields.checked_text(values, name) for name in ("instruction", "input") if values.get(name) is not None]
    return "\n".join(part for part in parts if part.strip())


def transcript(values: Values) -> Text:
    """Human: and Assistant: turns up to the empty last one, as in Nectar; other text as it is."""
    return transcript_turns(fields.checked_text(values, "prompt"))


def reddit_post(values: Values) -> Text:
    """A post to summarise, laid out as in the TL;DR experiments (arXiv 2009.01325)."""
    given = {name: values.get(f"info.{name}") or "" for name in ("subreddit", "title", "post")}
    subreddit, title, post = (fields.checked_text(given, name) for name in given)
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def one_turn_each(values: Values) -> Text:
    """The prompt of an arena battle, written as a JSON list of the user's turns."""
    return _only_text(values, "prompt")


def pair(asked: Asked, better: str = "chosen", worse: str = "rejected") -> Converter:
    """A prompt and two answers, or trajectories, of which the columns' names say which is the better one."""

    def read_pair(row: Row) -> Items:
        """The pair of one row."""
        prompt = asked(row.values)
        found = pair_of_answers(row, as_turns(prompt), better, worse)
        return [found or _preference(row, prompt, better, worse)]

    return read_pair


def contest(asked: Asked, first: str, second: str, lead: Callable[[Values], float]) -> Converter:
    """A prompt and two answers; `lead` is above zero where the second is better, below where the first is, else 0."""

    def read_contest(row: Row) -> Items:
        """The pair of one row, its winner first."""
        return [_preference(row, asked(row.values), *_winner_first(row.values, first, second, lead))]

    return read_contest


def _winner_first(values: Values, first: str, second: str, lead: Callable[[Values], float]) -> tuple[str, str]:
    ahead = lead(values)
    if ahead == 0:
        raise BadRow(reasons.TIED, f'neither "{first}" nor "{second}" is marked better')
    return (second, first) if ahead > 0 else (first, second)


def battle(values: Values) -> float:
    """The column `winner` of an arena: model_a, model_b, a tie of both good or both bad."""
    said = fields.checked_text(values, "winner").strip().lower()
    side = said.removeprefix("model_").removeprefix("response_").removeprefix("assistant_")
    if side in ("a", "b"):
        return 1.0 if side == "b" else -1.0
    if said.startswith(("tie", "both", "equal", "neither", "draw")):
        return 0.0
    raise BadRow(reasons.WRONG_TYPE, f'"winner" is {fields.printable(repr(said))}; expected model_a, model_b or tie')


def won_flags(values: Values) -> float:
    """An arena's columns winner_model_a, winner_model_b and winner_tie, of which one is true."""
    return float(fields.flag(values, "winner_model_b")) - float(fields.flag(values, "winner_model_a"))


def signed(name: str) -> Callable[[Values], float]:
    """A signed strength, above zero where the second answer is better (the cards of HelpSteer2 and HelpSteer3)."""
    return lambda values: fields.checked_number(values, name)


def numbered(name: str, first: float) -> Callable[[Values], float]:
    """The number of the better answer, counted from `first`; a number halfway between is a tie."""

    def lead(values: Values) -> float:
        """Above zero where the second answer is better."""
        if not first <= (number := fields.checked_number(values, name)) <= first + 1:
            raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {number:g}; expected {first:g} or {first + 1:g}')
        return number - first - 0.5

    return lead


def score_difference(first: str, second: str) -> Callable[[Values], float]:
    """By how much the second score exceeds the first."""
    return lambda values: fields.checked_number(values, second) - fields.checked_number(values, first)


def more_upvoted(values: Values) -> float:
    """SHP: labels 1: comment A is better. Vote ratios below 2 are left out, as the data card advises."""
    if "score_ratio" in values and (ratio := fields.checked_number(values, "score_ratio")) < 2:
        raise BadRow(reasons.WEAK, f'"score_ratio" is {ratio:g}, below 2')
    return -1.0 if fields.flag(values, "labels") else 1.0


def arena_battle(row: Row) -> Items:
    """Two conversations with the same questions, and who won. They may differ in the last answer only."""
    better, worse = _winner_first(row.values, "conversation_a", "conversation_b", battle)
    return [Preference(*split_last_turns(row.values, better, worse), row.where)]


def texts_battle(row: Row) -> Items:
    """Arena answers written as JSON lists of one text each."""
    names = ("response_a", "response_b")
    texts = Row(row.where, {**row.values, **{name: _only_text(row.values, name) for name in names}})
    return contest(one_turn_each, *names, won_flags)(texts)


def _only_text(values: Values, name: str) -> str:
    found = fields.decoded_json(fields.checked_text(values, name))
    if isinstance(found, list) and len(found) != 1:
        raise BadRow(reasons.NOT_ONE_ANSWER, f'"{name}" holds {len(found)} turns; expected one')
    only = found[0] if isinstance(found, list) else values[name]
    return fields.checked_text({name: only}, name)


def summaries(row: Row) -> Items:
    """Two summaries of a post and the number of the better one."""
    found = [one.get("text") for one in row.values["summaries"]]
    if len(found) != 2:
        raise BadRow(reasons.WRONG_TYPE, f'"summaries" has {len(found)} items; expected two')
    texts = Row(row.where, {**row.values, "summary 0": found[0], "summary 1": found[1]})
    return contest(reddit_post, "summary 0", "summary 1", numbered("choice", 0))(texts)


def ranking(asked: Asked, answers: Callable[[Values], Sequence[Any]], scores: Callable[[Values], Sequence[Any]]):
    """K scored completions of one prompt make a pair of every two whose scores differ, at most K(K-1)/2."""

    def read_ranking(row: Row) -> Items:
        """The pairs of one row."""
        return _ranked(row, asked(row.values), answers(row.values), scores(row.values))

    return read_ranking


def list_column(name: str) -> Callable[[Values], Sequence[Any]]:
    """A column that is a list."""
    return lambda values: values[name]


def inside(name: str, key: str, sign: int = 1) -> Callable[[Values], Sequence[Any]]:
    """One key of the objects in a list; numbers are multiplied by `sign` (-1 for a rank, of which 1 is the best)."""

    def read_inside(values: Values) -> Sequence[Any]:
        """What each object holds under the key."""
        found = [one.get(key) for one in values[name]]
        return [-float(value) if sign < 0 and fields.is_number(value) else value for value in found]

    return read_inside


def _ranked(row: Row, prompt: Text, completions: Sequence[Any], scores: Sequence[Any]) -> Items:
    if len(completions) != len(scores):
        raise BadRow(reasons.WRONG_TYPE, f'"completions" has {len(completions)} items and "scores" {len(scores)}')
    named = {f"completion {n}": completion for n, completion in enumerate(completions, 1)}
    rated = {f"the score of completion {n}": score for n, score in enumerate(scores, 1)}
    answers = [answer(named, name, prompt) for name in named]
    numbers = [fields.checked_number(rated, name) for name in rated]
    found = sorted(zip(numbers, answers, strict=True), key=lambda item: -item[0])
    pairs = [(a, b) for i, (high, a) in enumerate(found) for low, b in found[i + 1 :] if high > low]
    if not pairs:
        raise BadRow(reasons.TIED, f"all {len(scores)} completions have the score {numbers[0]:g}")
    return [Preference(_prompt_beside(prompt, better), better, worse, row.where) for better, worse in pairs]


def gather_helpsteer(rows: Sequence[Row]) -> Row:
    """The responses to one prompt, a row each, as one row of rated completions."""
    first, *others = rows
    if not others:
        raise BadRow(reasons.LONE, "the prompt has this one response; expected the next row to have another")
    for name in CONTEXT_COLUMNS:
        if any(row.values.get(name) != first.values.get(name) for row in others):
            raise BadRow(reasons.CONTEXT, f'the rows of this prompt differ in "{name}"; expected the same in all')
    # What the rows disagree about otherwise belongs to a response, not to the pair.
    shared = {n: v for n, v in first.values.items() if all(row.values.get(n) == v for row in others)}
    rated = {
        "completions": [row.values["response"] for row in rows],
        "scores": [row.values["helpfulness"] for row in rows],
    }
    return Row(first.where, shared | rated)


def implicit(row: Row) -> Items:
    """The prompt is the turns that both conversations share; what differs is one assistant turn, or all that follow."""
    return [_parted(row)]


def _parted(row: Row) -> Preference:
    """Two conversations as a pair: plain where they differ in the last turn alone."""
    chosen, rejected = fields.messages(row.values, "chosen"), fields.messages(row.values, "rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    if not len(chosen) == len(rejected) == shared + 1:
        return pair_of_conversations(row, chosen, rejected)
    return Preference(*split_last_turns(row.values), row.where)


def turns(row: Row) -> Items:
    """A text prompt beside whole conversations that repeat it, or beside the assistant turns alone."""
    conversations = [fields.messages(row.values, name) for name in ("chosen", "rejected")]
    if all(len(turns) == 1 or turns[0].role == "assistant" for turns in conversations):
        return pair(column("prompt"))(row)
    parted = _parted(row)
    asked = _squeezed(fields.checked_text(row.values, "prompt"))
    shared = conversations[0][: len(parted.prompt) + (parted.context or 0)]
    said = [_squeezed(turn.content) for turn in shared if turn.content]
    if not any(asked in turn or turn in asked for turn in said if turn):
        raise BadRow(
            reasons.PROMPT_MISMATCH,
            '"prompt" is in none of the shared turns of "chosen" and "rejected"; '
            "set data.format to implicit if the turns are right",
        )
    return [parted]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def hh(row: Row) -> Items:
    """Human:/Assistant: transcripts, split at the last Assistant: of the chosen one."""
    return [Preference(*split_transcripts(row.values), row.where)]


def opinion(asked: Asked, completion: str, label: str) -> Converter:
    """One completion, or a trajectory, with a thumb up or down."""

    def read_opinion(row: Row) -> Items:
        """The completion of one row."""
        return [_unpaired(row, asked(row.values), completion, fields.flag(row.values, label))]

    return read_opinion


def judged_conversation(name: str, label: str) -> Converter:
    """A conversation whose last answer has a thumb up or down."""

    def read_judged(row: Row) -> Items:
        """The last answer of one row's conversation."""
        turns = fields.messages(row.values, name)
        said, liked = one_answer(turns[-1:], name), fields.flag(row.values, label)
        return [UnpairedExample(prompt_turns(turns[:-1]), said, liked, row.where)]

    return read_judged


def demonstration(asked: Asked, completion: str) -> Converter:
    """One completion, or a trajectory, that is worth imitating."""

    def read_demonstration(row: Row) -> Items:
        """The completion of one row."""
        return [_unpaired(row, asked(row.values), completion, True)]

    return read_demonstration


def conversation(name: str) -> Converter:
    """Each assistant turn behind something a user said is worth imitating; what stands before it is its prompt."""

    def read_conversation(row: Row) -> Items:
        """The answers of one row's conversation."""
        turns = fields.messages(row.values, name)
        asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
        at = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > asked]
        if not at:
            raise BadRow(reasons.NOT_ONE_ANSWER, f'"{name}" has no assistant turn after a user turn; expected one')
        said = [one_answer(turns[i : i + 1], name) for i in at]
        return [UnpairedExample(prompt_turns(turns[:i]), one, True, row.where) for i, one in zip(at, said, strict=True)]

    return read_conversation


def _unpaired(row: Row, prompt: Text, name: str, desirable: bool) -> UnpairedExample:
    if (judged := judged_answer(row, as_turns(prompt), desirable, name)) is not None:
        return judged
    completion = answer(row.values, name, prompt)
    return UnpairedExample(_prompt_beside(prompt, completion), completion, desirable, row.where)


def _preference(row: Row, prompt: Text, better: str, worse: str) -> Preference:
    chosen, rejected = answer(row.values, better, prompt), answer(row.values, worse, prompt)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(reasons.WRONG_TYPE, "one completion is text and the other messages; expected the same of both")
    return Preference(_prompt_beside(prompt, chosen), chosen, rejected, row.where)


def _prompt_beside(prompt: Text, completion: Text) -> Text:
    """Text beside text, else turns."""
    return prompt if isinstance(completion, str) else as_turns(prompt)
