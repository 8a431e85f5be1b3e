"""The dial: what a run is worth at each strength, on held-out pairs and prompts, and which strength to take.

At strength s the weights are w0 + s (w - w0): see `mlxdpo.model.strength` for what that is and is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import Run, UserError
from mlxdpo.inner import (
    TrainedRun,
    at_strengths,
    distinct_prompts,
    encode_pairs,
    heldout_pairs,
    pair_logps,
    prompt_name,
    write_json,
)
from mlxdpo_eval.judged_answers import VerdictCounts, count_verdicts, judge_answers
from mlxdpo_eval.judges import Judge
from mlxdpo_eval.metrics.intervals import Interval, clustered_mean, clustered_share, paired_difference
from mlxdpo_eval.metrics.rewards import margins, outcomes
from mlxdpo_eval.results import to_json
from mlxdpo_eval.sampling import (
    Answers,
    Sampling,
    default_max_tokens,
    first_answers,
    on_policy_kl,
    sample_start,
    sample_tuned,
)

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
Say = Callable[[str], None]


class DialPoint(NamedTuple):
    """A run at one strength; intervals are 95 %, clustered by prompt, None where the data cannot carry one.

    accuracy    share of held-out pairs whose chosen completion has the higher implicit reward, 0 to 1
    margin      mean implicit reward margin, beta times nats
    loss        mean -log sigmoid(margin), nats: DPO's loss (arXiv 2305.18290, equation 7)
    kl          KL(policy || reference) along the policy's own answers, nats a sequence
    win_rate    against the untuned answers, equal ones as ties; None without a judge, or without a valid verdict
    verdicts    how many pairs of answers were asked about, answered, invalid, equal; None without a judge
    """

    strength: float
    accuracy: float
    accuracy_interval: Interval | None
    margin: float
    margin_interval: Interval | None
    loss: float
    loss_interval: Interval | None
    kl: float
    kl_interval: Interval | None
    win_rate: float | None
    win_rate_interval: Interval | None
    verdicts: VerdictCounts | None


class _Measured(NamedTuple):
    """A point, with what one strength is held against another by: cost of each item, lower is better; NaN unknown."""

    point: DialPoint
    costs: np.ndarray
    clusters: list[str]


class Dialled(NamedTuple):
    """A sweep: its points, the strength to take, and why, in a sentence."""

    points: list[DialPoint]
    recommended: float
    reason: str


def sweep_strengths(
    run: Run,
    strengths: Sequence[float],
    sampling: Sampling,
    judge: Judge | None = None,
    data: str | None = None,
    say: Say = lambda text: None,
) -> Dialled:
    """Measure a run at several strengths; writes RUN/eval/dial.json.

    Prompts and pairs are held out, and every strength meets the same noise. Raises `UserError` where the run has no
    strength (DoRA, a reward model), or there are no held-out pairs.
    """
    wanted = sorted(set(strengths))
    if len(wanted) < 2:
        raise UserError("--strength: give at least two strengths, or none for the defaults")
    rows, _, where = heldout_pairs(run, data)
    found: list[_Measured] = []
    before: Answers | None = None
    for strength, opened in at_strengths(run, wanted):
        say(f"strength {strength:g}")
        kept, examples, _ = encode_pairs(opened, rows)
        if before is None:
            sampling = sampling if sampling.max_tokens else replace(sampling, max_tokens=default_max_tokens(examples))
            prompts = distinct_prompts(kept, sampling.prompts)
            before, _ = sample_start(opened, prompts, sampling, say)
        after = sample_tuned(opened, prompts, sampling, say)
        names = [prompt_name(row.prompt) for row in kept]
        margin = margins(pair_logps(opened, examples), opened.config.loss.beta)
        found.append(_measured(opened, strength, (margin, names), (before, after), sampling, judge))
        if (counts := found[-1].point.verdicts) is not None and counts.invalid:
            say(f"strength {strength:g}: {counts.invalid} of {counts.asked} verdicts asked for are invalid")
    recommended, reason = _recommend(found, judge)
    told = {"judge": judge and judge.name, "data": where, "pairs": len(names), "prompts": len(prompts)}
    points = [one.point for one in found]
    told |= {"samples": sampling.samples, "max_tokens": sampling.max_tokens, "seed": sampling.seed}
    write_json(
        run.path / "eval" / "dial.json",
        to_json(told | {"points": points, "recommended": recommended, "reason": reason}),
    )
    return Dialled(points, recommended, reason)


def _measured(
    opened: TrainedRun,
    strength: float,
    pairs: tuple[np.ndarray, list[str]],
    answers: tuple[Answers, Answers],
    sampling: Sampling,
    judge: Judge | None,
) -> _Measured:
    """One strength: `pairs` are the margins of the held-out pairs and their prompts, `answers` before and after."""
    (margin, names), (before, after) = pairs, answers
    won, loss, first = outcomes(margin), np.logaddexp(0.0, -margin), first_answers(after)
    kl = on_policy_kl(opened, first, sampling.temperature)
    rate, interval, costs, clusters, counts = None, None, loss, names, None
    if judge is not None:
        judged = judge_answers(judge, before, after)
        logits, counts = [both.logit for both in judged], count_verdicts(judged)
        wins = np.array([np.nan if logit is None else (np.sign(logit) + 1) / 2 for logit in logits])
        costs, clusters, valid = 1 - wins, before.names, ~np.isnan(wins)
        if valid.any():
            rate = float(wins[valid].mean())
            interval = clustered_share(wins[valid], np.array(before.names)[valid])
    point = DialPoint(
        strength,
        float(won.mean()), clustered_share(won, names),
        float(margin.mean()), clustered_mean(margin, names),
        float(loss.mean()), clustered_mean(loss, names),
        float(np.mean(kl)), clustered_mean(kl, first.names),
        rate, interval, counts,
    )  # fmt: skip
    return _Measured(point, costs, clusters)


def _recommend(found: Sequence[_Measured], judge: Judge | None) -> tuple[float, str]:
    """The smallest strength that no other is surely better than, and why.

    Better is a higher win rate where there is a judge, a lower held-out loss elsewhere. Accuracy would not do: a small
    strength ranks the pairs as well as a large one. Surely: the paired difference's interval leaves 0 out.
    """
    usable = [one for one in found if not np.isnan(one.costs).all()]
    if not usable:
        raise UserError(
            f"{judge.name if judge else 'the data'} returned no valid verdict, so nothing can be recommended"
        )
    best = min(usable, key=lambda one: float(np.nanmean(one.costs)))
    chosen = next(one for one in usable if one is best or not _surely_worse(one, best))
    what, value = ("win rate", "win_rate") if judge is not None else ("held-out loss", "loss")
    here, top = getattr(chosen.point, value), getattr(best.point, value)
    kl = f"KL {chosen.point.kl:.3g} nats a sequence"
    if chosen is best:
        smaller = " and significantly worse at every smaller one" if chosen is not usable[0] else ""
        return chosen.point.strength, f"{what} is best there ({here:.3f}, {kl}){smaller}"
    return chosen.point.strength, (
        f"{what} there is {here:.3f} ({kl}); the best of all, {top:.3f} at {best.point.strength:g} (KL "
        f"{best.point.kl:.3g}), is not significantly better, and this moves the model less"
    )


def _surely_worse(one: _Measured, best: _Measured) -> bool:
    both = ~(np.isnan(one.costs) | np.isnan(best.costs))
    names = np.array(one.clusters)[both].tolist()
    difference = paired_difference(best.costs[both].tolist(), one.costs[both].tolist(), names)
    return difference is not None and difference.low > 0


def dial_table(found: Dialled) -> list[dict[str, Any]]:
    """The points as rows of text, for a table."""
    rows = []
    for p in found.points:
        row = {"strength": f"{p.strength:g}" + (" *" if p.strength == found.recommended else "")}
        for name in ("accuracy", "margin", "loss", "kl", "win_rate"):
            value, interval = getattr(p, name), getattr(p, f"{name}_interval")
            bounds = "" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
            row[name] = "-" if value is None else f"{value + 0.0:.3f}{bounds}"
        rows.append(row)
    return rows
