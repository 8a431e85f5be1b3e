"""From steps to figures: medians, ratios of medians with their spread, and whether the sides did the same at all.

The JSON file holds {"workloads": {name: {"what", "shape", "same", "scored", "beta", "machine", "date", "sides": {side:
Record}}}}; everything printed or drawn is computed from it again.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

TOLERANCE = 1e-3  # relative, of one loss
ROUNDING = 1e-5  # nats by which float32 may be off in one token's log-prob; a loss is a sum over all of a pair's
FIRST_STEPS = 5  # compared: later ones carry the rounding of all before
OURS, EXACT = "mlxdpo", "exact"


class Row(NamedTuple):
    """One side of one workload.

    seconds    median of a step, for an epoch all of it with its reference, or None when there is no figure
    low, high  the fastest and slowest step (an epoch has none)
    ratio      our median / this side's median: 0.5 is half as fast as ours; its lowest and highest value over rounds
    pairs_per_second, peak_gb, rss_gb
    trouble    why there is no figure, or ""
    """

    side: str
    seconds: float | None
    low: float | None
    high: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    pairs_per_second: float | None
    peak_gb: float | None
    rss_gb: float | None
    trouble: str


def rows(workload: dict[str, Any]) -> list[Row]:
    """A row for each trainer, in the order measured. Ratios are to our side as it is by default, else to our first."""
    sides = workload["sides"]
    base = next((s for s in (OURS, *sides) if s in sides and s.startswith(OURS) and _timed(workload, sides[s])), None)
    return [_row(workload, name, base) for name in sides if name != EXACT]


def disagreement(workload: dict[str, Any]) -> str | None:
    """Why the workload is void, or None. Every side's losses must be those of the first one that ran, to `TOLERANCE`.

    Where the exact ones were computed, they are what must be met, and what `ROUNDING` of a pair's tokens comes to in
    its loss is allowed too: only there is it known that it is rounding.

    Where the sides batch their own way (an epoch) only the first loss can be compared, with what it must be: ln 2,
    because policy and reference are still the same (arXiv 2305.18290 eq. 7 at pi = ref).
    """
    losses = _compared(workload)
    if not losses:
        return "no side finished a step"
    against, expected = _expected(workload, losses)
    # |d loss / d log-prob| <= beta, and all the tokens of both completions may be off the same way.
    rounding = ROUNDING * workload["beta"] * workload["scored"] if against == EXACT else 0.0
    for name, found in losses.items():
        for step, (loss, other) in enumerate(zip(found, expected, strict=False), 1):
            if not abs(loss - other) <= max(TOLERANCE * abs(other), rounding):
                return f"loss of step {step}: {name} {loss:.6f}, {against} {other:.6f}"
    return None


def gaps(workload: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What losses are held against, and for each other side the largest relative difference of one of its losses."""
    losses = _compared(workload)
    if not losses:
        return "", {}
    against, expected = _expected(workload, losses)
    return against, {
        name: max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=False))
        for name, found in losses.items()
        if name != against
    }


def _compared(workload: dict[str, Any]) -> dict[str, list[float]]:
    """The losses of each side that are held against each other."""
    return {name: side["losses"][:FIRST_STEPS] for name, side in workload["sides"].items() if side["losses"]}


def _expected(workload: dict[str, Any], losses: dict[str, list[float]]) -> tuple[str, list[float]]:
    """What the others are held against, and its name."""
    if not workload["same"]:
        return "ln 2", [math.log(2)]
    name = EXACT if EXACT in losses else next(iter(losses))
    return name, losses[name]


def mean_loss(side: dict[str, Any]) -> float:
    """Mean over all pairs a side has seen, nats."""
    pairs = side["pairs"]
    return sum(loss * n for loss, n in zip(side["losses"], pairs, strict=False)) / sum(pairs)


def _timed(workload: dict[str, Any], side: dict[str, Any]) -> list[float]:
    """The steps that count: all but the warm-up, or one figure for a whole epoch."""
    if workload["same"]:
        return side["seconds"][1:]
    return [] if side["error"] or not side["seconds"] else [side["reference_seconds"] + sum(side["seconds"])]


def _row(workload: dict[str, Any], name: str, base: str | None) -> Row:
    side = workload["sides"][name]
    void, timed = disagreement(workload), _timed(workload, side)
    trouble = side["error"] or (f"void: {void}" if void else "" if timed else "no step after the warm-up")
    peak, rss = (side[k] / 1e9 or None for k in ("peak_bytes", "peak_rss_bytes"))
    if not timed or void:
        return Row(name, None, None, None, None, None, None, None, peak, rss, trouble)
    seconds, epoch = median(timed), not workload["same"]
    ratios = _ratios(timed, _timed(workload, workload["sides"][base])) if base else (None, None, None)
    pairs = sum(side["pairs"]) if epoch else side["pairs"][-1]
    low, high = (None, None) if epoch else (min(timed), max(timed))
    return Row(name, seconds, low, high, *ratios, pairs / seconds, peak, rss, trouble)


def _ratios(timed: list[float], ours: list[float]) -> tuple[float, float | None, float | None]:
    """Ratio of medians, and the extremes of the rounds' own ratios: both sides of a round met the same machine."""
    each = [b / a for a, b in zip(timed, ours, strict=False)]
    whole = median(ours) / median(timed)
    return (whole, None, None) if len(each) < 2 else (whole, min(each), max(each))
