"""The reward-KL frontier (arXiv 2305.18290, section 6.1): what reward each point bought with how much drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlxdpo_eval.metrics.intervals import Interval


class Point(NamedTuple):
    """One checkpoint or setting: its drift in nats per sequence and its reward; intervals where there are any."""

    name: str
    kl: float
    reward: float
    kl_interval: Interval | None = None
    reward_interval: Interval | None = None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none has as little KL and as much reward, and one of the two better.

    In order of KL; copies of a point all stay. Raises `ValueError` for a KL or reward that is not a number.
    """
    for point in points:
        if point.kl != point.kl or point.reward != point.reward:
            raise ValueError(f"point {point.name!r} has KL {point.kl} and reward {point.reward}; expected numbers")
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kl, -p.reward)):
        if not best or point.reward > best[-1].reward or point[1:3] == best[-1][1:3]:
            best.append(point)
    return best


def read_frontier(found: Mapping[str, Any]) -> tuple[list[Point], list[Point]]:
    """All points of a frontier.json, and those that no other beats."""
    points = [
        Point(p["name"], p["kl"], p["reward"], _read_interval(p["kl_interval"]), _read_interval(p["reward_interval"]))
        for p in found["points"]
    ]
    return points, pareto_front(points)


def _read_interval(found: Mapping[str, Any] | None) -> Interval | None:
    return None if found is None else Interval(**found)
