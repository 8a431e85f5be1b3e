"""What the tune cost elsewhere, in words: better at what was asked, and worse or no worse besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxdpo_eval.report.blocks import Headline, Part, Result, Table
from mlxdpo_eval.results import to_json


def first_screen(headline: Headline, retained: Any, sentences: Sequence[str]) -> list[str]:
    """The sentences of an evaluation with what was retained behind the first one."""
    first, *others = sentences
    asked = f"{headline.verdict.capitalize()} at what was asked, {elsewhere(to_json(retained)['changes'])}"
    return [first, asked, *others]


def elsewhere(changes: Result) -> str:
    """The end of a sentence: worse elsewhere, and where most; or no worse, and which drop would have been found."""
    n, span = changes["n"], _points_span(changes["interval"])
    if changes["verdict"] == "unchanged":
        return f"unchanged elsewhere: all {n} checks are answered exactly as before."
    if changes["verdict"] == "worse":
        fallen = [f"{a['area']} by {-_in_points(a['change']):.1f} points" for a in changes["areas"] if a["worse"]]
        where = f"; most in {', '.join(fallen)}" if fallen else ""
        return f"worse elsewhere: {_in_points(changes['change']):+.1f} points over {n} checks ({span}){where}."
    seen = changes["detectable"]
    least = "" if seen is None else f"; a drop of {_in_points(seen):.1f} points would have been found (power 0.8)"
    return f"no worse elsewhere: {_in_points(changes['change']):+.1f} points over {n} checks ({span}){least}."


def retained_part(retained: Result) -> Part:
    """Areas from worst to best, what each number is, and what could have been found."""
    changes, (before, after) = retained["changes"], retained["perplexity"]
    rows = [_area_row(area) for area in changes["areas"]]
    rows.append(
        (
            "all exact answers",
            "",
            f"{_in_points(changes['change']):+.1f} ({_points_span(changes['interval'])})",
            "–" if changes["detectable"] is None else f"{_in_points(changes['detectable']):.1f}",
            str(changes["n"]),
        )
    )
    note = (
        "The same items before and after. Arithmetic, facts and refusals: mean probability of the right answers "
        "among four; instructions and formats: share of answers that keep them; neutral text: share of its likelihood "
        f"per token that is left (perplexity {before:.2f} to {after:.2f}). Intervals of areas hold for all at once: an "
        "untouched model is called worse in 5 % of evaluations at most; a drop below 1 point is never called one."
    )
    header = ("area, worst first", "before to after, %", "change, points", "found with power 0.8", "items")
    return Part("What it cost elsewhere", [f"{elsewhere(changes).capitalize()}", Table(header, rows, note)])


def _area_row(area: Result) -> tuple[str, ...]:
    name = f"{area['area']} (worse)" if area["worse"] else area["area"]
    change = f"{_in_points(area['change']):+.1f} ({_points_span(area['interval'])})"
    seen = "–" if area["detectable"] is None else f"{_in_points(area['detectable']):.1f}"
    return name, f"{_in_points(area['before']):.1f} to {_in_points(area['after']):.1f}", change, seen, str(area["n"])


def _in_points(share: float) -> float:
    return 100 * share


def _points_span(interval: Result | None) -> str:
    return "no interval" if interval is None else f"{100 * interval['low']:+.1f} to {100 * interval['high']:+.1f}"
