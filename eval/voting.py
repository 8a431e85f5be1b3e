"""Human votes in the order they came: does the tuned model win, for someone who looks after every single vote?

A vote counts for the evidence if it is the first on its prompt: two votes on one prompt share what makes it easy or
hard, and the e-process needs votes that the earlier ones do not foretell. The others are counted apart.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from mlxdpo_eval.judges.votes import Ballots, Vote
from mlxdpo_eval.metrics.sequential import anytime_interval, log_e_value, votes_needed

ALPHA = 0.05


class RunningRate(NamedTuple):
    """A look after `n` votes: the rate (ties 1/2), its always-valid interval, the e-value (cut off at e^700)."""

    n: int
    rate: float
    low: float
    high: float
    e_value: float


class VoteRun(NamedTuple):
    """The votes that count: wins of the tuned model, losses, ties (`both_bad` among them), and every look.

    `decided_at` is the first look at which the e-value had reached 20, and the decision stands from then on, whatever
    follows; `verdict` is what it said. `needed` more votes would decide at the rate seen so far, None where too many.
    `uncounted` holds usable votes that are no evidence, by reason; `left_out` lines that are no votes.
    """

    file: str
    n: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    looks: tuple[RunningRate, ...]
    e_value: float
    decided_at: int | None
    verdict: str
    needed: int | None
    uncounted: dict[str, int]
    left_out: dict[str, int]


def vote_run(ballots: Ballots, adapter: str | None = None, alpha: float = ALPHA) -> VoteRun:
    """The running verdict over a file of votes.

    `adapter` is the digest of the one in question: votes on answers of another are no evidence. None takes them all.
    """
    counted, uncounted = _votes_that_count(ballots.votes, adapter)
    signs = np.array([vote.for_tuned for vote in counted], float)
    wins, losses = np.cumsum((1 + signs) / 2), np.cumsum((1 - signs) / 2)
    looks = tuple(_running_rate(float(w), float(l), alpha) for w, l in zip(wins, losses, strict=True))
    decided = next((look for look in looks if look.e_value >= 1 / alpha), None)
    total = (float(wins[-1]), float(losses[-1])) if looks else (0.0, 0.0)
    verdict = "cannot tell yet" if decided is None else "better" if decided.rate > 0.5 else "worse"
    return VoteRun(
        file=ballots.name,
        n=len(looks),
        wins=int((signs > 0).sum()),
        losses=int((signs < 0).sum()),
        ties=int((signs == 0).sum()),
        both_bad=sum(vote.winner == "both_bad" for vote in counted),
        looks=looks,
        e_value=looks[-1].e_value if looks else 1.0,
        decided_at=None if decided is None else decided.n,
        verdict=verdict,
        needed=0 if decided else votes_needed(*total, alpha),
        uncounted=uncounted,
        left_out=dict(ballots.left_out),
    )


def _running_rate(wins: float, losses: float, alpha: float) -> RunningRate:
    low, high = anytime_interval(wins, losses, alpha)
    e_value = float(np.exp(min(log_e_value(wins, losses), 700.0)))
    return RunningRate(round(wins + losses), wins / (wins + losses), low, high, e_value)


def is_about(vote: Vote, adapter: str | None) -> bool:
    """Whether a vote is about answers of this adapter, as far as the two digests are known."""
    return adapter is None or vote.adapter is None or vote.adapter == adapter


def _votes_that_count(votes: tuple[Vote, ...], adapter: str | None) -> tuple[list[Vote], dict[str, int]]:
    trained = {vote.prompt_id for vote in votes if vote.trained}
    seen: set[str] = set()
    counted: list[Vote] = []
    uncounted: Counter[str] = Counter()
    for vote in votes:
        if vote.tuned is None:
            uncounted["the tuned model's answer is not marked"] += 1
        elif not is_about(vote, adapter):
            uncounted["the tuned answer is of another adapter or checkpoint"] += 1
        elif vote.prompt_id in trained:
            uncounted["on a prompt of the training data"] += 1
        elif vote.prompt_id in seen:
            uncounted["not the first vote on its prompt"] += 1
        else:
            seen.add(vote.prompt_id)
            counted.append(vote)
    return counted, dict(uncounted)
