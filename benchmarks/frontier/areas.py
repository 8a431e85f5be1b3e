"""Frontiers and what lies between them, with intervals over openings and seeds.

A frontier is the upper concave hull of a method's points and of the untuned model: the most reward for each amount of
drift. The highest of many noisy points is too high, the more so the more points there are, and methods here have
unequal numbers of them. So points are chosen on one half of the openings and read on the other, and vice versa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frontier.points import UNTUNED
from benchmarks.frontier.runs import JUDGE
from mlxdpo_eval.metrics.frontier import Point, pareto_front
from mlxdpo_eval.metrics.intervals import Interval

GRID, RESAMPLES, SEED = 100, 1000, 0
Index = np.ndarray


class Cloud(NamedTuple):
    """K points of one method and seed on P openings: rewards by the first and second judge, KL in nats; each (K, P)."""

    reward: np.ndarray
    second: np.ndarray
    kl: np.ndarray


class Start(NamedTuple):
    """The untuned model's rewards by both judges, each (P,)."""

    reward: np.ndarray
    second: np.ndarray


class Gap(NamedTuple):
    """Mean difference of reward between two frontiers over drifts from 0 to `reach` nats."""

    estimate: float
    reach: float
    interval: Interval | None


def start_of(lines: Iterable[Mapping[str, Any]], second: str) -> Start:
    """From the lines of the untuned model."""
    own = [line for line in lines if line["method"] == UNTUNED]
    return Start(*(np.mean([line[judge] for line in own], axis=0) for judge in (JUDGE, second)))


def clouds(lines: Iterable[Mapping[str, Any]], method: str, second: str) -> dict[int, Cloud]:
    """A method's points by seed: all its strengths and checkpoints together."""
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["method"] == method:
            by_seed.setdefault(line["seed"], []).append(line)
    return {
        seed: Cloud(*(np.array([np.mean(line[key], axis=0) for line in own]) for key in (JUDGE, second, "kl")))
        for seed, own in sorted(by_seed.items())
    }


def curve(
    cloud: Cloud, start: Start, choose: Index, read: Index, judge: str = "reward"
) -> tuple[np.ndarray, np.ndarray]:
    """(KL, reward) of the corners that openings `choose` make the frontier, as openings `read` see them.

    Corners are chosen by the first judge, whoever reads them. Ascending in KL, from the untuned model on.
    """
    kl, reward = cloud.kl[:, choose].mean(axis=1), cloud.reward[:, choose].mean(axis=1)
    points = [Point("", 0.0, float(start.reward[choose].mean()))]
    points += [Point(str(i), float(k), float(r)) for i, (k, r) in enumerate(zip(kl, reward, strict=True))]
    corners = [int(p.name) for p in hull(points) if p.name]
    seen = getattr(cloud, judge)[corners][:, read].mean(axis=1)
    drift = cloud.kl[corners][:, read].mean(axis=1)
    order = np.argsort(drift)
    origin = getattr(start, judge)[read].mean()
    return np.concatenate([[0.0], drift[order]]), np.concatenate([[origin], seen[order]])


def between(ours: Cloud, theirs: Cloud, start: Start, halves: Sequence[Index], judge: str) -> tuple[float, float]:
    """Mean of ours minus theirs over the drifts that both reach, and how far that is; crossed over the halves."""
    gaps, reaches = [], []
    for choose, read in (halves, halves[::-1]):
        a, b = (curve(cloud, start, choose, read, judge) for cloud in (ours, theirs))
        reach = min(a[0][-1], b[0][-1])
        grid = np.linspace(0.0, reach, GRID)
        gaps.append(float(np.mean(np.interp(grid, *a) - np.interp(grid, *b))))
        reaches.append(float(reach))
    return float(np.mean(gaps)), float(np.mean(reaches))


def gap(
    ours: Mapping[int, Cloud], theirs: Mapping[int, Cloud], start: Start, judge: str = "reward", n: int = RESAMPLES
) -> Gap:
    """The gap averaged over seeds. The interval resamples seeds and openings, each by themselves (crossed, like the
    data: every seed met every opening); 95 %, percentiles; None below two seeds or two openings in a half."""
    seeds = sorted(ours.keys() & theirs.keys())
    half = [np.arange(len(start.reward))[part::2] for part in (0, 1)]

    def mean(chosen: Iterable[int], halves: Sequence[Index]) -> tuple[float, float]:
        """Over seeds."""
        found = [between(ours[seed], theirs[seed], start, halves, judge) for seed in chosen]
        return float(np.mean([f[0] for f in found])), float(np.mean([f[1] for f in found]))

    estimate, reach = mean(seeds, half)
    if len(seeds) < 2 or min(map(len, half)) < 2:
        return Gap(estimate, reach, None)
    rng = np.random.default_rng(SEED)
    drawn = [
        mean(rng.choice(seeds, len(seeds)).tolist(), [rng.choice(part, len(part)) for part in half])[0]
        for _ in range(n)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Gap(estimate, reach, Interval(estimate, float(low), float(high), len(seeds)))


def crossed(values: np.ndarray, n: int = RESAMPLES, statistic: Callable[[np.ndarray], float] = np.mean) -> Interval:
    """`statistic` of (seeds, openings) values; 95 % percentiles of resampled seeds and openings."""
    rng = np.random.default_rng(SEED)
    seeds, openings = values.shape
    drawn = [
        statistic(values[rng.integers(seeds, size=seeds)][:, rng.integers(openings, size=openings)]) for _ in range(n)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(values)), float(low), float(high), openings)


def hull(points: Sequence[Point]) -> list[Point]:
    """The Pareto points on the upper concave hull: what mixing two of the models by chance could not beat either."""
    corners: list[Point] = []
    for point in pareto_front(points):
        while len(corners) > 1 and _lies_under(corners[-2], corners[-1], point):
            corners.pop()
        if not corners or point[1:3] != corners[-1][1:3]:
            corners.append(point)
    return corners


def _lies_under(left: Point, middle: Point, right: Point) -> bool:
    """Whether the middle point lies on or under the line from left to right."""
    rise = (right.reward - left.reward) * (middle.kl - left.kl)
    return (middle.reward - left.reward) * (right.kl - left.kl) <= rise
