"""Votes on disk: one durable line each in RUN/votes.jsonl, and what they say so far.

A vote is {"schema", "id", "time", "prompt", "a", "b", "winner": a | b | tie | both_bad, "tuned": a | b, ...}: what the
evaluation reads as human votes. It is on the disk before the page says so; a second one with the same id is not
written.
"""

from __future__ import annotations

import datetime
import time
from html import escape
from pathlib import Path
from typing import Any

from filelock import FileLock

from mlxdpo.inference.run_prompts import text_to_json
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.votes_to_pairs import FILE, count_of_votes, votes_of
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui.variants import RunVariants
from mlxdpo.ui.vote.blind_round import Round
from mlxdpo_eval.judges.votes import read_ballots
from mlxdpo_eval.voting import VoteRun, vote_run

SCHEMA = 1
WINNERS = {"a": "A is better", "b": "B is better", "tie": "Equally good", "both_bad": "Both bad"}
FEW = 20  # votes below which nothing is said about how many more it takes


def record(loaded: RunVariants, game: Round, winner: str, session: str) -> dict[str, Any]:
    """The line of a vote."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": SCHEMA,
        "id": game.id,
        "time": now.isoformat(timespec="milliseconds"),
        "prompt": text_to_json(game.prompt),
        "a": game.side("a").text,
        "b": game.side("b").text,
        "winner": winner,
        "tuned": game.tuned,
        "blind": True,
        "source": game.source,
        "finish": {side: game.side(side).finish for side in ("a", "b")},
        "sampling": game.settings.model_dump(),
        "model": loaded.policy.identity["digest"],
        "adapter": {"before": loaded.before.digest, "after": loaded.after.digest},
        "session": session,
        "seconds": round(time.monotonic() - game.shown_at, 3),  # the clock may be set meanwhile
    }


def append_vote(run: Run, line: dict[str, Any]) -> None:
    """Write a vote to disk. Raises `UserError` for an unknown winner and for a round that has its vote already."""
    if line["winner"] not in WINNERS:
        raise UserError(f"{line['winner']!r} is no vote; known: {', '.join(WINNERS)}")
    with FileLock(run.path / f".{FILE}.lock"):  # one writer at a time, in this process and among others
        if any(old.get("id") == line["id"] for old in read_lines(run.path / FILE)):
            raise UserError("this pair has its vote already; go on to the next pair")
        append_line(run.path / FILE, line)


def asked(run: Run, source: str) -> int:
    """How many votes are on prompts of a source: where to go on in its list."""
    return sum(line.get("source") == source for line in votes_of(run))


def standing(file: Path) -> tuple[VoteRun | None, int]:
    """What the votes say about prompts that training did not see, and how many are on those that it did."""
    if not file.exists():
        return None, 0
    ballots = read_ballots(file)
    seen = {vote.prompt_id for vote in ballots.votes if vote.trained}
    fresh = tuple(vote for vote in ballots.votes if vote.prompt_id not in seen)
    return vote_run(ballots._replace(votes=fresh)), len(ballots.votes) - len(fresh)


def standing_html(file: Path) -> str:
    """The running win rate in a sentence, with the interval that may be looked at after every vote."""
    found, trained = standing(file)
    if found is None or found.n + trained == 0:
        return '<p class="standing">No votes yet. The win rate appears here after the first one.</p>'
    extra = f" {count_of_votes(trained)} on training prompts: they teach, but are no evidence." if trained else ""
    if found.n == 0:
        return f'<p class="standing">{escape(extra.strip())}</p>'
    last = found.looks[-1]
    more = "" if found.needed is None or found.n < 3 else f", about {found.needed} more votes at this rate"
    verdict = {
        "cannot tell yet": f"Cannot tell yet{more}.",
        "better": f"The tuned model is better (decided after {found.decided_at} votes).",
        "worse": f"The tuned model is worse (decided after {found.decided_at} votes).",
    }[found.verdict]
    if found.verdict == "cannot tell yet" and found.needed is None:
        hopeless = "Cannot tell yet, and at this rate no number of votes will: there may be no difference."
        verdict = "Cannot tell yet." if found.n < FEW else hopeless
    repeated = sum(found.uncounted.values())
    extra += f" {count_of_votes(repeated)} on prompts voted on before: they do not count twice." if repeated else ""
    if broken := sum(found.left_out.values()):
        extra += f" {broken} lines of {file.name} are no votes and are left out."
    return (
        f'<div class="standing" role="status"><strong>{escape(verdict)}</strong>{_bar(last.low, last.rate, last.high)}'
        f"<span>Tuned preferred in {last.rate:.0%} of {count_of_votes(found.n)} ({found.wins} won, "
        f"{found.losses} lost, {found.ties} equal, half each); 95 % interval {last.low:.0%} to {last.high:.0%}, valid "
        f"however often you look.{escape(extra)}</span></div>"
    )


def _bar(low: float, rate: float, high: float) -> str:
    return (
        '<div class="interval" aria-hidden="true"><span class="half"></span>'
        f'<span class="range" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></span>'
        f'<span class="rate" style="left:{100 * rate:.1f}%"></span></div>'
    )
