"""What the implicit reward says about held-out pairs: accuracy, margins, rankings, displacement.

The implicit reward of a completion is beta (log pi(y | x) - log ref(y | x)), arXiv 2305.18290 section 5. It judges
*held-out human pairs* only. A policy's own samples win by their own reward whatever was learned, because the
mean log-ratio of its samples is a KL divergence and never negative: show that as drift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special, stats

from mlxdpo_eval.metrics.intervals import Interval, clustered_mean, clustered_share

if TYPE_CHECKING:
    from mlxdpo.inner import PairLogps


class MeanAndQuartiles(NamedTuple):
    """A mean with its interval, and the quartiles."""

    mean: float
    interval: Interval | None
    low_quartile: float
    median: float
    high_quartile: float


class Rankings(NamedTuple):
    """Whose log-prob is higher, by the policy and by the reference; the 2x2 table holds pairs without ties.

    `gained` pairs only the policy ranks rightly, `lost` only the reference; `p` is McNemar's exact p-value of
    gained against lost. `ties` pairs, which one of the two cannot rank, are left out of the table.
    """

    policy: float
    reference: float
    both: int
    gained: int
    lost: int
    neither: int
    ties: int
    p: float


class RewardReport(NamedTuple):
    """Held-out pairs under one policy. Margins are rewards; `displacement` is log pi - log ref of the chosen in nats.

    `fell` is the share of pairs whose chosen completion lost probability. `loss`, `nll` and `brier` read
    sigmoid(margin) as the probability that the chosen one is preferred; `loss` is `nll`: the DPO objective.
    """

    n: int
    ties: int
    accuracy: float
    accuracy_interval: Interval | None
    margin: MeanAndQuartiles
    token_margin: MeanAndQuartiles
    rankings: Rankings
    displacement: MeanAndQuartiles
    fell: float
    fell_interval: Interval | None
    loss: float
    nll: float
    brier: float


def reward_report(logps: PairLogps, prompts: np.ndarray, beta: float, level: float = 0.95) -> RewardReport:
    """Every pair metric of a non-empty set of pairs; (B,) `prompts` name the clusters.

    Raises `ValueError` for no pairs, bad shapes or numbers.
    """
    check_logps(logps, prompts)
    d = margins(logps, beta)
    won = outcomes(d)
    moved = logps.chosen - logps.ref_chosen
    fell = (moved < 0).astype(np.float64)
    loss = float(np.logaddexp(0, -d).mean())
    return RewardReport(
        n=len(d),
        ties=int((d == 0).sum()),
        accuracy=float(won.mean()),
        accuracy_interval=clustered_share(won, prompts, level),
        margin=summarize(d, prompts, level),
        token_margin=summarize(token_margins(logps, beta), prompts, level),
        rankings=rankings(logps),
        displacement=summarize(moved, prompts, level),
        fell=float(fell.mean()),
        fell_interval=clustered_share(fell, prompts, level),
        loss=loss,
        nll=loss,
        brier=float((special.expit(-d) ** 2).mean()),
    )


def check_logps(logps: PairLogps, prompts: np.ndarray) -> None:
    """Raise `ValueError` unless there are pairs, fields of one length, finite log-probs and lengths above 0."""
    shapes = {name: np.shape(field) for name, field in (logps._asdict() | {"prompts": prompts}).items()}
    if len(set(shapes.values())) > 1 or len(np.shape(logps.chosen)) != 1 or not len(logps.chosen):
        raise ValueError(f"pair scores have shapes {shapes}; expected one length of at least 1")
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        finite = np.isfinite(getattr(logps, name))
        if not finite.all():
            raise ValueError(f"{name}[{int(np.argmin(finite))}] is not finite; drop such pairs and count them")
    if min(np.min(logps.chosen_len), np.min(logps.rejected_len)) < 1:
        raise ValueError("a completion has no tokens; drop such pairs and count them")


def margins(logps: PairLogps, beta: float) -> np.ndarray:
    """(B,) beta ((log pi - log ref)(chosen) - (log pi - log ref)(rejected)): arXiv 2305.18290, equation 7."""
    return beta * ((logps.chosen - logps.ref_chosen) - (logps.rejected - logps.ref_rejected))


def token_margins(logps: PairLogps, beta: float) -> np.ndarray:
    """(B,) the margin of rewards per token, so that a long completion gains nothing by its length alone."""
    chosen = (logps.chosen - logps.ref_chosen) / logps.chosen_len
    rejected = (logps.rejected - logps.ref_rejected) / logps.rejected_len
    return beta * (chosen - rejected)


def outcomes(margins: np.ndarray) -> np.ndarray:
    """(B,) 1 where the chosen completion wins, 1/2 for a tie, 0 where it loses."""
    return (np.sign(margins) + 1) / 2


def summarize(values: np.ndarray, clusters: np.ndarray, level: float = 0.95) -> MeanAndQuartiles:
    """Mean with its clustered t interval, quartiles by linear interpolation."""
    low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return MeanAndQuartiles(float(np.mean(values)), clustered_mean(values, clusters, level), low, median, high)


def rankings(logps: PairLogps) -> Rankings:
    """Ranking accuracy of policy and reference (arXiv 2405.19534; a tie is 1/2), and the change.

    Rows are taken as independent by McNemar's test; with several pairs a prompt read it beside
    `intervals.paired_difference`, which resamples prompts.
    """
    policy, reference = outcomes(logps.chosen - logps.rejected), outcomes(logps.ref_chosen - logps.ref_rejected)
    clear = (policy != 0.5) & (reference != 0.5)
    right, before = policy[clear] == 1, reference[clear] == 1
    gained, lost = int((right & ~before).sum()), int((~right & before).sum())
    return Rankings(
        policy=float(policy.mean()),
        reference=float(reference.mean()),
        both=int((right & before).sum()),
        gained=gained,
        lost=lost,
        neither=int((~right & ~before).sum()),
        ties=int((~clear).sum()),
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that changes go both ways alike (McNemar 1947); 1 without any change.

    The binomial test of the smaller count in gained + lost at 1/2. The table's other two cells do not enter.
    """
    return float(stats.binomtest(min(gained, lost), gained + lost).pvalue) if gained + lost else 1.0
