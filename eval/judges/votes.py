"""Human votes: lines of `votes.jsonl` as the app writes them, or shorter ones written by hand.

    {"prompt": text or messages, "a": text, "b": text, "winner": "a" | "b" | "tie" | "both_bad", "tuned": "a" | "b",
     "blind": true, "source": "heldout" | "train" | "own", "adapter": {"before": digest, "after": digest}, ...}

`response_a` and `response_b` may stand for `a` and `b`; `tuned` says on which side the tuned model's answer was,
`adapter` whose it was. A line that is no vote is left out and counted under its reason, never dropped in silence. As a
judge, the file knows only the pairs voted on: a pair without a vote is absent, not invalid; several votes on one pair
are averaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo import Message, UserError
from mlxdpo_eval.judges.protocol import Judge, Question, Verdict, certain

OUTCOMES = {"a": 1, "b": -1, "tie": 0, "both_bad": 0}
SIDES = ("a", "b")


class Vote(NamedTuple):
    """One vote. `sign` is 1 where answer `a` won, -1 where `b` did, 0 for a tie; `tuned` is the tuned answer's side.

    `adapter` is the digest of the adapter that gave the tuned answer, `trained` says that its prompt is a training one;
    None and False where the line does not say.
    """

    prompt_id: str
    prompt: str
    a: str
    b: str
    winner: str
    tuned: str | None
    adapter: str | None = None
    trained: bool = False

    @property
    def sign(self) -> int:
        """Whether `a` won."""
        return OUTCOMES[self.winner]

    @property
    def for_tuned(self) -> int | None:
        """1 where the tuned answer won, -1 where it lost, 0 for a tie; None where nothing says which one it was."""
        return None if self.tuned is None else self.sign * (1 if self.tuned == "a" else -1)


class Ballots(NamedTuple):
    """The votes of a file in order; `left_out` counts the other lines by reason, `first` has an example of each."""

    name: str
    votes: tuple[Vote, ...]
    left_out: dict[str, int]
    first: dict[str, str]


class NoVote(Exception):
    """A line that is no vote, with the reason it is counted under."""


@dataclass(frozen=True)
class VotesJudge:
    """Answers from a file of votes: `votes` by (prompt, one answer, the other), for the one; both orders are there."""

    name: str
    identity: Mapping[str, Any]
    votes: Mapping[Question, Sequence[int]]
    cached: bool = False

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """The majority of the votes on each pair, whichever side its answers were on."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        found = self.votes.get(question)
        return certain(sum(found)) if found else Verdict(None, "no vote", absent=True)


def votes_judge(file: str) -> Judge:
    """Open `votes:FILE`. Raises `UserError` as `read_ballots`."""
    path = Path(file)
    by_pair: dict[Question, list[int]] = {}
    for vote in read_ballots(path).votes:
        by_pair.setdefault(Question(vote.prompt, vote.a, vote.b), []).append(vote.sign)
        by_pair.setdefault(Question(vote.prompt, vote.b, vote.a), []).append(-vote.sign)
    identity = {"kind": "votes", "digest": hashlib.sha256(path.read_bytes()).hexdigest()}
    return VotesJudge(f"votes:{path.name}", identity, by_pair)


def read_ballots(path: Path) -> Ballots:
    """All votes of a file. Raises `UserError` for a missing file, and for one whose lines are all no votes."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file of votes; the app writes RUN/votes.jsonl")
    votes: list[Vote] = []
    left_out: dict[str, int] = {}
    first: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            votes.append(_vote_of_line(_parse_line(line)))
        except NoVote as bad:
            left_out[str(bad)] = left_out.get(str(bad), 0) + 1
            first.setdefault(str(bad), f"{path.name}:{number}")
    if left_out and not votes:
        reason, where = next(iter(first.items()))
        raise UserError(f"{where}: {reason}; none of the {sum(left_out.values())} lines is a vote that can be used")
    return Ballots(path.name, tuple(votes), left_out, first)


def _parse_line(line: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # also what is no UTF-8; the last line may be torn by a killed writer
        raise NoVote("a line that is not JSON") from None
    if not isinstance(found, Mapping):
        raise NoVote("a line that is not an object")
    return found


def problem_with(line: Mapping[str, Any]) -> str | None:
    """Why a line is no vote; None for one that is."""
    try:
        _vote_of_line(line)
    except NoVote as bad:
        return str(bad)
    return None


def _vote_of_line(line: Mapping[str, Any]) -> Vote:
    if line.get("blind") is False:
        raise NoVote("a vote that was not blind")
    a, b = (line.get(f"response_{side}", line.get(side)) for side in ("a", "b"))
    if not isinstance(a, str) or not isinstance(b, str):
        raise NoVote('a vote without text under "a" and "b"')
    if not all(map(_is_whole_text, (a, b, line.get("prompt")))):
        raise NoVote("a vote whose text has half a character")
    from mlxdpo.inner import prompt_name, prompt_text  # they load MLX

    winner, tuned = line.get("winner"), line.get("tuned")
    if not isinstance(winner, str) or winner not in OUTCOMES:
        raise NoVote(f'a vote whose "winner" is not one of {", ".join(OUTCOMES)}')
    if tuned not in (None, *SIDES):
        raise NoVote('a vote whose "tuned" is neither a nor b')
    prompt = _vote_prompt(line.get("prompt"))
    adapter = line.get("adapter")
    after = adapter.get("after") if isinstance(adapter, Mapping) else None
    trained = line.get("source") == "train"
    return Vote(prompt_name(prompt), prompt_text(prompt), a, b, winner, tuned, after, trained)


def _is_whole_text(value: Any) -> bool:
    """Whether UTF-8 can hold all text in a JSON value; JSON lets half a surrogate pair through."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text == text.encode("utf-8", "ignore").decode()


def _vote_prompt(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    turns = value if isinstance(value, list) else []
    if turns and all(
        isinstance(t, Mapping) and all(isinstance(t.get(k), str) for k in ("role", "content")) for t in turns
    ):
        return tuple(Message(turn["role"], turn["content"]) for turn in turns)
    raise NoVote('a vote whose "prompt" is neither text nor messages')
