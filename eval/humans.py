"""What human votes say about a judge: the judge is asked about the very pairs that people voted on.

The app draws answers of its own, so the pairs voted on are seldom those of the evaluation. Agreement needs no more than
the judge's opinion on the voted pairs. To correct the judge's win rate (PPI++) votes and evaluation have to be about
the same prompts, so only votes on prompts of the evaluation enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .judges import Both, Judge, ask_both
from .judges.both import Trio
from .judges.votes import Ballots, Vote
from .ppi import Debiased, debiased
from .report_card import Agreement, agreement
from .sampling import Answers
from .voting import is_of


class Humans(NamedTuple):
    """Agreement on `agreement.n` votes, `unjudged` votes without a verdict of the judge, and the corrected win rate.

    `corrected` says how many of those votes are on prompts of the evaluation and enter the correction.
    """

    agreement: Agreement
    unjudged: int
    debiased: Debiased | None
    corrected: int


def humans(
    judge: Judge, found: Sequence[Both], before: Answers, ballots: Ballots, adapter: str | None = None
) -> Humans | None:
    """Judge against people. `found`: the judge's verdicts on the evaluation's pairs; None without a usable vote.

    Any vote tells whether the judge agrees; the correction takes those on answers of this `adapter` (its digest) alone.
    """
    votes = [vote for vote in ballots.votes if vote.tuned is not None]
    judged = ask_both(judge, [_trio(vote) for vote in votes])
    both = [(vote, b.logit) for vote, b in zip(votes, judged, strict=True) if b.logit is not None]
    if not both:
        return None
    signs = [int(np.sign(logit)) for _, logit in both]
    truth = [vote.for_tuned or 0 for vote, _ in both]
    names = [vote.prompt_id for vote, _ in both]
    longer = [len(trio.after) - len(trio.before) for trio in (_trio(vote) for vote, _ in both)]
    here = set(before.names)
    on_these = [i for i, (vote, _) in enumerate(both) if vote.prompt_id in here and is_of(vote, adapter)]
    return Humans(
        agreement(signs, truth, names, longer),
        len(votes) - len(both),
        _corrected([(names[i], signs[i], truth[i]) for i in on_these], found, before.names),
        len(on_these),
    )


def _trio(vote: Vote) -> Trio:
    before, after = (vote.b, vote.a) if vote.tuned == "a" else (vote.a, vote.b)
    return Trio(vote.prompt, before, after)


def _corrected(voted: Sequence[tuple[str, int, int]], found: Sequence[Both], names: Sequence[str]) -> Debiased | None:
    """PPI++ with the judge alone on the prompts that nobody voted on."""
    seen = {name for name, _, _ in voted}
    alone = [
        (name, (np.sign(b.logit) + 1) / 2)
        for name, b in zip(names, found, strict=True)
        if b.logit is not None and name not in seen
    ]
    if not voted or not alone:
        return None
    prompts, judged, truth = zip(*voted, strict=True)
    rest, only = zip(*alone, strict=True)
    return debiased((np.array(truth) + 1) / 2, (np.array(judged) + 1) / 2, only, prompts, rest)
