"""How often are the tuned model's answers preferred, and how sure is that? Invalid, tie and loss are three things.

An item is a win where the averaged logit of both orders is above 0, a loss below, a tie at 0 (a judge that only
repeats a place, equal answers). The rate is wins + ties / 2 over valid verdicts. Answers to one prompt are not
independent, so intervals are clustered by prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

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
from mlxdpo_eval.sampling import Answers


class Rewards(NamedTuple):
    """Mean scores of a judge that scores answers one by one; `change` is paired by answer. All clustered by prompt."""

    before: Interval | None
    after: Interval | None
    change: Interval | None
    left_out: int


class WinRate(NamedTuple):
    """One judge's verdict on `n` pairs of answers to `prompts` prompts; `interval` is Wilson's with a clustered error.

    `same` pairs are equal word for word: ties. `invalid` verdicts are counted by reason and left out; `worst`
    and `best` are the rate were they all losses or all wins. `absent` were not voted on. `soft` is the mean
    probability of a win. `detectable` is the win rate that this many prompts show with power 0.8. `slices` are win
    rates by the values of the prompts' columns.
    """

    judge: str
    n: int
    prompts: int
    wins: int
    ties: int
    losses: int
    same: int
    invalid: dict[str, int]
    absent: int
    rate: float | None
    interval: Interval | None
    bootstrap: Interval | None
    worst: float | None
    best: float | None
    soft: float | None
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
        """Of the verdicts that were asked for."""
        failed, asked = sum(self.invalid.values()), self.n - self.absent
        return failed / asked if asked else 0.0


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
    logits = np.array([both.logit if both.logit is not None else 0.0 for both in found])
    signs, names = np.sign(logits[valid]).astype(int), np.array(before.names)[valid]
    won = (signs + 1) / 2
    longer = np.array([len(a) - len(b) for a, b in zip(after.texts, before.texts, strict=True)], float)
    reasons = Counter(b.reason for b in found if b.logit is None and not b.absent)
    prompts, some = len(set(names.tolist())), bool(valid.any())
    low, high = _bounds(won, reasons.total())
    return WinRate(
        judge=judge.name,
        n=len(found),
        prompts=prompts,
        wins=int((signs > 0).sum()),
        ties=int((signs == 0).sum()),
        losses=int((signs < 0).sum()),
        same=sum(both.same for both in found),
        invalid=dict(sorted(reasons.items())),
        absent=sum(both.absent for both in found),
        rate=float(won.mean()) if some else None,
        interval=clustered_share(won, names) if some else None,
        bootstrap=cluster_bootstrap(won.tolist(), names.tolist()) if some else None,
        worst=low,
        best=high,
        soft=float(special.expit(logits[valid]).mean()) if some else None,
        detectable=minimum_detectable(prompts),
        controlled=length_controlled(won, longer[valid], names) if some else None,
        position=_position(found, before.names),
        longer=preference_for_longer(signs, longer[valid], names) if some else None,
        rewards=_rewards(judge, before, after) if isinstance(judge, Scalar) else None,
        slices={
            name: slice_report(won, [v for v, kept in zip(column, valid, strict=True) if kept], names)
            for name, column in (columns or {}).items()
        },
    )


def _bounds(won: np.ndarray, failed: int) -> tuple[float | None, float | None]:
    total = len(won) + failed
    return (float(won.sum() / total), float((won.sum() + failed) / total)) if total else (None, None)


def _position(found: Sequence[BothOrders], names: Sequence[str]) -> Position | None:
    asked = [
        (b.first, b.second, name) for b, name in zip(found, names, strict=True) if b.logit is not None and not b.same
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
