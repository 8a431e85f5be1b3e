"""How often are the tuned model's answers preferred, and how sure is that? Invalid, tie and loss are three things.

Four numbers say what stands behind a rate: of the pairs of answers some are equal word for word, of the others the
judge was asked, and of those asked some were answered and some invalid. An answered pair is a win where the averaged
logit of both orders is above 0, a loss below, a tie at 0 (a judge that only repeats a place). The rate is wins + ties /
2 over answered pairs; equal ones say nothing about which answer is better, so they are in no rate and in no share.
Answers to one prompt are not independent, so intervals are clustered by prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special

from mlxdpo_eval.judge_quality import HumanAgreement, Retest
from mlxdpo_eval.judges import AnswerPair, BothOrders, Judge, Scalar, ask_both
from mlxdpo_eval.metrics.intervals import (
    Interval,
    cluster_bootstrap,
    clustered_mean,
    clustered_share,
    paired_difference,
)
from mlxdpo_eval.metrics.judge_bias import Longer, Position, position_bias, preference_for_longer
from mlxdpo_eval.metrics.length import Controlled, length_controlled
from mlxdpo_eval.metrics.sequential import minimum_detectable
from mlxdpo_eval.metrics.slices import Slices, slice_report

if TYPE_CHECKING:
    from mlxdpo_eval.sampling import Answers  # it loads MLX


class Rewards(NamedTuple):
    """Mean scores of a judge that scores answers one by one; `change` is paired by answer. All clustered by prompt."""

    before: Interval | None
    after: Interval | None
    change: Interval | None
    left_out: int


class WinRate(NamedTuple):
    """One judge's verdict on `n` pairs of answers; `interval` is Wilson's with a clustered error.

    n = equal + absent + asked, asked = answered + invalid: `equal` pairs are the same word for word, `absent` ones were
    not voted on, and about both nobody was asked. `reasons` counts invalid verdicts; `worst` and `best` are the rate
    were they all losses or all wins. `prompts` have an answered pair. `soft` is the mean probability of a win.
    `cut_off` answered pairs have an answer that ended at its limit of tokens; `complete` is the rate over the others.
    `overall` and its interval count equal pairs as ties, for points on the same prompts (the frontier). `detectable`
    is the win rate that this many prompts show with power 0.8. `slices` are win rates by the values of the prompts'
    columns.
    """

    judge: str
    n: int
    asked: int
    answered: int
    invalid: int
    equal: int
    absent: int
    reasons: dict[str, int]
    prompts: int
    wins: int
    ties: int
    losses: int
    rate: float | None
    interval: Interval | None
    bootstrap: Interval | None
    worst: float | None
    best: float | None
    cut_off: int
    complete: Interval | None
    soft: float | None
    overall: float | None
    overall_interval: Interval | None
    detectable: float | None
    controlled: Controlled | None
    position: Position | None
    longer: Longer | None
    rewards: Rewards | None
    slices: dict[str, Slices]
    humans: HumanAgreement | None = None
    retest: Retest | None = None

    @property
    def invalid_share(self) -> float:
        """Of the pairs that were asked about."""
        return self.invalid / self.asked if self.asked else 0.0

    def failed(self, max_invalid: float) -> bool:
        """Whether there is no verdict: too many invalid ones, or none at all on answers that differ."""
        return self.invalid_share > max_invalid or (self.answered == 0 and self.equal < self.n)


class VerdictCounts(NamedTuple):
    """Pairs of answers by what became of them; n = equal + absent + asked, asked = answered + invalid."""

    asked: int
    answered: int
    invalid: int
    equal: int
    absent: int


def count_verdicts(found: Sequence[BothOrders]) -> VerdictCounts:
    """The numbers behind a rate."""
    equal, absent = sum(both.equal for both in found), sum(both.absent for both in found)
    answered = sum(both.logit is not None and not both.equal for both in found)
    asked = len(found) - equal - absent
    return VerdictCounts(asked, answered, asked - answered, equal, absent)


def judge_answers(judge: Judge, before: Answers, after: Answers) -> list[BothOrders]:
    """The judge's verdicts on each pair of answers, both orders."""
    return ask_both(judge, answer_pairs(before, after))


def answer_pairs(before: Answers, after: Answers) -> list[AnswerPair]:
    """The pairs of answers as a judge is asked about them."""
    return [AnswerPair(*pair) for pair in zip(before.prompts, before.texts, after.texts, strict=True)]


def win_rate(
    judge: Judge,
    found: Sequence[BothOrders],
    before: Answers,
    after: Answers,
    columns: Mapping[str, Sequence[Hashable]] | None = None,
) -> WinRate:
    """Everything that verdicts in both orders say, one per pair of answers; `columns`: metadata, one entry per pair."""
    valid = np.array([both.logit is not None for both in found], bool)
    answered = valid & ~np.array([both.equal for both in found], bool)
    logits = np.array([both.logit if both.logit is not None else 0.0 for both in found])
    signs, names = np.sign(logits[answered]).astype(int), np.array(before.names)[answered]
    won, over_all = (signs + 1) / 2, (np.sign(logits[valid]) + 1) / 2
    ended = np.array([a and b for a, b in zip(before.stopped, after.stopped, strict=True)], bool)[answered]
    longer = np.array([len(a) - len(b) for a, b in zip(after.texts, before.texts, strict=True)], float)
    reasons = Counter(b.reason for b in found if b.logit is None and not b.absent)
    prompts, some = len(set(names.tolist())), bool(answered.any())
    low, high = _bounds(won, reasons.total())
    return WinRate(
        judge=judge.name,
        n=len(found),
        **count_verdicts(found)._asdict(),
        reasons=dict(sorted(reasons.items())),
        prompts=prompts,
        wins=int((signs > 0).sum()),
        ties=int((signs == 0).sum()),
        losses=int((signs < 0).sum()),
        rate=float(won.mean()) if some else None,
        interval=clustered_share(won, names) if some else None,
        bootstrap=cluster_bootstrap(won.tolist(), names.tolist()) if some else None,
        worst=low,
        best=high,
        cut_off=int((~ended).sum()),
        complete=clustered_share(won[ended], names[ended]) if ended.any() else None,
        soft=float(special.expit(logits[answered]).mean()) if some else None,
        overall=float(over_all.mean()) if len(over_all) else None,
        overall_interval=clustered_share(over_all, np.array(before.names)[valid]) if len(over_all) else None,
        detectable=minimum_detectable(prompts),
        controlled=length_controlled(won, longer[answered], names) if some else None,
        position=_position(found, before.names),
        longer=preference_for_longer(signs, longer[answered], names) if some else None,
        rewards=_rewards(judge, before, after) if isinstance(judge, Scalar) else None,
        slices={
            name: slice_report(won, [v for v, kept in zip(column, answered, strict=True) if kept], names)
            for name, column in (columns or {}).items()
        },
    )


def _bounds(won: np.ndarray, failed: int) -> tuple[float | None, float | None]:
    total = len(won) + failed
    return (float(won.sum() / total), float((won.sum() + failed) / total)) if total else (None, None)


def _position(found: Sequence[BothOrders], names: Sequence[str]) -> Position | None:
    asked = [
        (b.first, b.second, name) for b, name in zip(found, names, strict=True) if b.logit is not None and not b.equal
    ]
    if not asked:
        return None
    first, second, prompts = zip(*asked, strict=True)
    return position_bias(first, second, prompts)


def _rewards(judge: Scalar, before: Answers, after: Answers) -> Rewards:
    old, new = (np.array(judge.scores(a.prompts, a.texts)) for a in (before, after))
    kept = np.isfinite(old) & np.isfinite(new)
    old, new, names = old[kept], new[kept], np.array(before.names)[kept].tolist()
    change = paired_difference(old.tolist(), new.tolist(), names)
    return Rewards(clustered_mean(old, names), clustered_mean(new, names), change, int((~kept).sum()))
