"""Human votes as a judge: lines of `votes.jsonl`, found again by what was voted on.

A line is {"prompt", "a", "b", "winner"} with winner "a", "b", "tie" or "both_bad"; other keys are kept out of it.
A pair without a vote is absent, not invalid. Several votes on one pair are averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdpo import UserError, read_lines

from .protocol import Judge, Question, Verdict, sure

OUTCOMES = {"a": 1.0, "b": -1.0, "tie": 0.0, "both_bad": 0.0}
Votes = dict[tuple[str, str, str], list[float]]
"""(prompt, one answer, the other) -> votes for the one: 1, 0, -1; both orders are there."""


@dataclass(frozen=True)
class VotesJudge:
    """Answers from a file of votes."""

    name: str
    identity: Mapping[str, Any]
    votes: Votes
    cached: bool = False

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """The majority of the votes on each pair, whichever side its answers were on."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        found = self.votes.get((question.prompt, question.first, question.second))
        return sure(sum(found)) if found else Verdict(None, "no vote", absent=True)


def votes_judge(file: str) -> Judge:
    """Open `votes:FILE`. Raises `UserError` for a missing file or a line that is no vote."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--judge votes:{file}: no such file; the app writes RUN/votes.jsonl")
    identity = {"kind": "votes", "digest": hashlib.sha256(path.read_bytes()).hexdigest()}
    return VotesJudge(f"votes:{path.name}", identity, read_votes(path))


def read_votes(path: Path) -> Votes:
    """The votes of a file under both orders. Raises `UserError` naming the line that is none."""
    votes: Votes = {}
    for number, line in enumerate(read_lines(path), 1):
        texts = [line.get(name) for name in ("prompt", "a", "b")]
        if not all(isinstance(text, str) for text in texts) or line.get("winner") not in OUTCOMES:
            raise UserError(
                f"{path}:{number}: expected text under prompt, a and b, and winner among {', '.join(OUTCOMES)}"
            )
        prompt, a, b = (str(text) for text in texts)
        value = OUTCOMES[line["winner"]]
        votes.setdefault((prompt, a, b), []).append(value)
        votes.setdefault((prompt, b, a), []).append(-value)
    return votes
