"""What a report is made of, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .plots import Figure

Result = Mapping[str, Any]


class Table(NamedTuple):
    """Rows of text under a header; `note` says what is read how. Numbers stand in all columns but the first."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


class Sample(NamedTuple):
    """One prompt with its first answer before and after, and what the judges said of them."""

    prompt: str
    before: str
    after: str
    note: str


class Section(NamedTuple):
    """A heading with what stands under it."""

    title: str
    blocks: list[str | Table | Figure | Sample]


class Document(NamedTuple):
    """`tiles` are the few numbers that matter: name, value, its interval."""

    title: str
    verdict: str
    sentence: str
    subtitle: str
    tiles: list[tuple[str, str, str]]
    sections: list[Section]


def number(value: float | None, sign: str = "") -> str:
    """Three significant places, or a dash."""
    return "–" if value is None else f"{value:{sign}.3f}"


def within(interval: Result | None, sign: str = "") -> str:
    """The bounds of an interval, or why there are none."""
    return "no interval" if interval is None else f"[{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def both(value: float | None, interval: Result | None, sign: str = "") -> str:
    """A number with its interval."""
    return number(value, sign) + (f" {within(interval, sign)}" if value is not None and interval is not None else "")


def percent(interval: Result | None) -> str:
    """The bounds of an interval of shares."""
    return "no interval" if interval is None else f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %"
