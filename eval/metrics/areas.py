"""Did a model get worse anywhere? Paired changes over areas, each measured on its own items before and after.

Items are drawn once and asked of both models, so their difficulty cancels. Right or wrong answers are two by two
counts; probabilities of the right answer among its options are numbers, whose paired differences vary less. Alarms are
shared out (Bonferroni), so an untouched model is called worse in 5 % of evaluations at most: 1.5 % for the change
over all items, 1.5 % among the areas alike, and 2 % among the areas by need, most to where a drop of 5 points is
hardest to see (weighted Bonferroni, Spjotvoll 1972; the need depends on standard errors alone, which are the same in
both directions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, special

from mlxdpo_eval.metrics.intervals import Interval

OVERALL_ALARMS = 0.015  # one-sided, for the overall change
EQUAL_ALARMS = 0.015  # for the areas together, each the same
NEEDED_ALARMS = 0.02  # for the areas together, so that all find a drop of SOUGHT equally often
SOUGHT = 0.05
POWER = 0.8
SMALLEST = 0.01  # a drop below it may be real, but is no cost


class AreaScores(NamedTuple):
    """One area's items, (n,) each in the same order: right answers as 0 and 1, or probabilities, or likelihoods.

    `counted` areas have right answers that enter the overall change; a likelihood is another unit.
    """

    before: np.ndarray
    after: np.ndarray
    counted: bool = True


class AreaChange(NamedTuple):
    """`change` is after - before; `interval` holds for all areas at once, `detectable` is found with power 0.8.

    `gained` and `lost` count the items that crossed 1/2. The interval is None below two items or where nothing moved.
    """

    area: str
    n: int
    before: float
    after: float
    change: float
    interval: Interval | None
    detectable: float | None
    gained: int
    lost: int
    worse: bool


class Changes(NamedTuple):
    """Areas from worst to best, and the change over all counted items, each item weighing the same."""

    areas: tuple[AreaChange, ...]
    n: int
    change: float
    interval: Interval | None
    detectable: float | None
    verdict: Literal["worse", "no worse", "unchanged"]


class _Spread(NamedTuple):
    """Centre and standard error of a mean paired difference."""

    centre: float
    error: float


def area_changes(scores: Mapping[str, AreaScores]) -> Changes:
    """What changed in each area and over all. Raises `ValueError` for no area or items, or sides that differ in length.

    The overall change is the mean over the counted items, its variance the sum of the areas' (a stratified sample:
    which areas there are was not drawn).
    """
    if not scores:
        raise ValueError("no areas; expected at least one with items")
    for name, one in scores.items():
        if one.before.shape != one.after.shape or not len(one.before):
            raise ValueError(
                f"{name}: {len(one.before)} items before, {len(one.after)} after; expected the same, at least 1"
            )
    alarms = area_alarms([_change_spread(one) for one in scores.values()])
    areas = [_area_change(name, one, own) for (name, one), own in zip(scores.items(), alarms, strict=True)]
    counted = [(one, _change_spread(one)) for one in scores.values() if one.counted]
    n = sum(len(one.before) for one, _ in counted)
    change = float(sum((one.after - one.before).sum() for one, _ in counted) / n) if n else 0.0
    known = [(len(one.before) / n, spread) for one, spread in counted if spread is not None]
    centre = sum(weight * spread.centre for weight, spread in known)
    error = float(np.sqrt(sum((weight * spread.error) ** 2 for weight, spread in known)))
    interval = _change_interval(change, _Spread(centre, error), n, OVERALL_ALARMS) if error else None
    worse = any(area.worse for area in areas) or _is_drop(change, interval)
    moved = any(not np.array_equal(one.before, one.after) for one in scores.values())
    return Changes(
        tuple(sorted(areas, key=lambda area: (not area.worse, area.change))),
        n,
        change,
        interval,
        _detectable(error, n, OVERALL_ALARMS) if error else None,
        "worse" if worse else "no worse" if moved else "unchanged",
    )


def area_alarms(spreads: Sequence[_Spread | None]) -> list[float]:
    """The one-sided error that each area may make, `EQUAL_ALARMS` + `NEEDED_ALARMS` together at most.

    Of the second part an area gets the normal tail beyond SOUGHT / error - k, where k makes the sum right: a drop of
    SOUGHT then exceeds each bound by the same k standard errors. Areas where nothing moved need none.
    """
    effects = np.array([SOUGHT / spread.error for spread in spreads if spread is not None])
    equal = EQUAL_ALARMS / len(spreads)
    if not len(effects):
        return [equal] * len(spreads)
    k = optimize.brentq(lambda k: special.ndtr(k - effects).sum() - NEEDED_ALARMS, -9.0, effects.max() + 9.0)
    needed = iter(special.ndtr(k - effects))
    return [equal + (0.0 if spread is None else float(next(needed))) for spread in spreads]


def _area_change(name: str, one: AreaScores, alarms: float) -> AreaChange:
    change, spread, n = float(np.mean(one.after - one.before)), _change_spread(one), len(one.before)
    interval = None if spread is None else _change_interval(change, spread, n, alarms)
    return AreaChange(
        name,
        n,
        float(one.before.mean()),
        float(one.after.mean()),
        change,
        interval,
        None if spread is None else _detectable(spread.error, n, alarms),
        int(((one.before < 0.5) & (one.after >= 0.5)).sum()),
        int(((one.before >= 0.5) & (one.after < 0.5)).sum()),
        _is_drop(change, interval),
    )


def _is_drop(change: float, interval: Interval | None) -> bool:
    return interval is not None and interval.high < 0 and change <= -SMALLEST


def _change_spread(one: AreaScores) -> _Spread | None:
    """Of right and wrong answers with half an item more in each of the four cells (Agresti and Min 2005, Statistics in
    Medicine 24): few answers that changed do not look certain, and all that changed alike still have an interval.
    """
    difference, n = one.after - one.before, len(one.before)
    if n < 2:
        return None
    if np.isin(one.before, (0, 1)).all() and np.isin(one.after, (0, 1)).all():
        gained, lost = (difference > 0).sum() + 0.5, (difference < 0).sum() + 0.5
        centre = (gained - lost) / (n + 2)
        return _Spread(float(centre), float(np.sqrt((gained + lost) / (n + 2) - centre**2) / np.sqrt(n + 2)))
    error = float(difference.std(ddof=1) / np.sqrt(n))
    return _Spread(float(difference.mean()), error) if error > 1e-12 else None


def _change_interval(change: float, spread: _Spread, n: int, alarms: float) -> Interval:
    half = float(special.stdtrit(n - 1, 1 - alarms)) * spread.error
    return Interval(change, spread.centre - half, spread.centre + half, n)


def _detectable(error: float, n: int, alarms: float) -> float:
    return float(special.stdtrit(n - 1, 1 - alarms) + special.ndtri(POWER)) * error


def area_scores(
    areas: Sequence[str], before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, uncounted: str
) -> dict[str, AreaScores]:
    """(n,) each: items by area, in order of first appearance; `uncounted` names the area of another unit."""
    at: dict[str, list[int]] = {}
    for i, area in enumerate(areas):
        at.setdefault(area, []).append(i)
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    return {area: AreaScores(old[rows], new[rows], area != uncounted) for area, rows in at.items()}
