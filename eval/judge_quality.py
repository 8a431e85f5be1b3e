"""What human votes say about a judge: the judge is asked about the very pairs that people voted on.

The app samples its own answers, so the pairs voted on are seldom those of the evaluation. Agreement needs only the
judge's verdicts on the voted pairs. To correct the judge's win rate (PPI++) votes and evaluation have to be about
the same prompts, so only votes on prompts of the evaluation enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxdpo_eval.judges import BothOrders, Judge, ask_both
from mlxdpo_eval.judges.both import AnswerPair
from mlxdpo_eval.judges.votes import Ballots, Vote
from mlxdpo_eval.metrics.intervals import Interval
from mlxdpo_eval.metrics.judge_bias import Agreement, Debiased, agreement, debiased, repeat_agreement
from mlxdpo_eval.voting import is_about

if TYPE_CHECKING:
    from mlxdpo_eval.sampling import Answers  # it loads MLX


class Retest(NamedTuple):
    """The same comparisons asked a second time, past the cache: does the judge repeat itself?

    `n` comparisons are valid both times, out of `asked`; `same` is the share with the same winner. A judge may repeat
    itself 95 % of the time and still prefer a position (arXiv 2606.19544), so this alone proves no quality; but if it
    does not repeat itself, every other number of it is noise.
    `invalid` had no verdict the second time. `moved` is the mean absolute change of the averaged logit.
    """

    asked: int
    n: int
    invalid: int
    same: float | None
    interval: Interval | None
    moved: float | None


def ask_again(
    judge: Judge, pairs: Sequence[AnswerPair], found: Sequence[BothOrders], prompts: Sequence[str], count: int
) -> Retest | None:
    """Ask `count` of the comparisons again, evenly spaced over those with a verdict; None where there are none.

    `found` are the first verdicts, one per pair of answers. Equal answers were never asked about and are left
    out. A file of votes has nobody to ask.
    """
    known = [i for i, both in enumerate(found) if both.logit is not None and not both.equal]
    if not known or judge.identity.get("kind") == "votes":
        return None
    at = [known[k] for k in np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int))]
    again = ask_both(judge, [pairs[i] for i in at], cached=False)
    both = [(found[i].logit, b.logit, prompts[i]) for i, b in zip(at, again, strict=True)]
    usable = [(a, b, p) for a, b, p in both if a is not None and b is not None]
    invalid = len(at) - len(usable)
    if not usable:
        return Retest(len(at), 0, invalid, None, None, None)
    first, second, names = (list(column) for column in zip(*usable, strict=True))
    was, now = (np.sign(values).astype(int) for values in (first, second))
    same, interval = repeat_agreement(was, now, names)
    return Retest(len(at), len(usable), invalid, same, interval, float(np.abs(np.subtract(first, second)).mean()))


class HumanAgreement(NamedTuple):
    """Agreement on `agreement.n` votes, `unjudged` votes without a verdict of the judge, and the corrected win rate.

    `corrected` says how many of those votes are on prompts of the evaluation and enter the correction.
    """

    agreement: Agreement
    unjudged: int
    debiased: Debiased | None
    corrected: int


def human_agreement(
    judge: Judge, found: Sequence[BothOrders], before: Answers, ballots: Ballots, adapter: str | None = None
) -> HumanAgreement | None:
    """Judge against people. `found`: the judge's verdicts on the evaluation's pairs; None without a usable vote.

    Any vote tells whether the judge agrees; the correction takes those on answers of this `adapter` (its digest) alone.
    """
    votes = [vote for vote in ballots.votes if vote.tuned is not None]
    judged = ask_both(judge, [_answer_pair(vote) for vote in votes])
    both = [(vote, b.logit) for vote, b in zip(votes, judged, strict=True) if b.logit is not None]
    if not both:
        return None
    signs = [int(np.sign(logit)) for _, logit in both]
    truth = [vote.for_tuned or 0 for vote, _ in both]
    names = [vote.prompt_id for vote, _ in both]
    longer = [len(pair.after) - len(pair.before) for pair in (_answer_pair(vote) for vote, _ in both)]
    here = set(before.names)
    on_these = [i for i, (vote, _) in enumerate(both) if vote.prompt_id in here and is_about(vote, adapter)]
    return HumanAgreement(
        agreement(signs, truth, names, longer),
        len(votes) - len(both),
        _correct_by_votes([(names[i], signs[i], truth[i]) for i in on_these], found, before.names),
        len(on_these),
    )


def _answer_pair(vote: Vote) -> AnswerPair:
    before, after = (vote.b, vote.a) if vote.tuned == "a" else (vote.a, vote.b)
    return AnswerPair(vote.prompt, before, after)


def _correct_by_votes(
    voted: Sequence[tuple[str, int, int]], found: Sequence[BothOrders], names: Sequence[str]
) -> Debiased | None:
    """PPI++ with the judge alone on the prompts that nobody voted on."""
    seen = {name for name, _, _ in voted}
    alone = [
        (name, (np.sign(b.logit) + 1) / 2)
        for name, b in zip(names, found, strict=True)
        if b.logit is not None and not b.equal and name not in seen
    ]
    if not voted or not alone:
        return None
    prompts, judged, truth = zip(*voted, strict=True)
    rest, only = zip(*alone, strict=True)
    return debiased((np.array(truth) + 1) / 2, (np.array(judged) + 1) / 2, only, prompts, rest)
