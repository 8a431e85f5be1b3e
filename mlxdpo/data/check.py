"""The data doctor's findings, as a value: what was read, what was left out and why, lengths, length bias, overlap.

Lengths in tokens are given by the caller as plain numbers, so that a check without a model needs no tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdpo.data import reasons
from mlxdpo.data.formats import FORMATS
from mlxdpo.data.read import prompt_key, prompts_in_both
from mlxdpo.data.report import Report
from mlxdpo.data.transforms import balance
from mlxdpo.io.words import counted
from mlxdpo.types import Preference, Text, UnpairedExample

Rows = Sequence[Preference] | Sequence[UnpairedExample]


@dataclass(frozen=True)
class LengthSpread:
    """A distribution of lengths by nearest rank: half are at most `median`, 95 % at most `p95`."""

    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class DataFindings:
    """What a preference set holds. Shares are between 0 and 1; None means not asked for or not defined.

    longer           share of pairs whose chosen completion is the longer one, in `unit`
    always_longer    accuracy of always choosing the longer completion, equal lengths counting one half
    over_limit       rows whose prompt and longer completion together exceed `limit` tokens
    overlap          distinct prompts that the held-out rows share with these
    heldout_prompts  distinct prompts that are held out, named or drawn
    detectable       the win-rate that so many prompts tell from 50 % with power 0.8
    """

    source: str
    format: str
    kind: str
    read: int
    kept: int
    refused: dict[str, int]
    changed: dict[str, int]
    first: dict[str, str]
    duplicates: int
    ties: int
    prompts: int
    most_per_prompt: int
    characters: dict[str, LengthSpread]
    tokens: dict[str, LengthSpread] | None
    unit: str
    longer: float | None
    always_longer: float | None
    desirable: float | None
    limit: int | None
    over_limit: int | None
    heldout: int | None
    overlap: int | None
    unread: dict[str, int]
    notes: list[str]
    heldout_prompts: int | None
    detectable: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def check_rows(
    rows: Rows,
    report: Report,
    source: str,
    heldout: Rows | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    limit: int | None = None,
    heldout_prompts: int | None = None,
    detectable: float | None = None,
) -> DataFindings:
    """The findings on `rows` (one or more) as `read_preferences` gave them together with `report`.

    `tokens` holds, per row, the lengths (prompt, chosen, rejected), or (prompt, completion) for opinions, before
    any truncation; `limit` is the most tokens that prompt and completion may have together. The rows measured may
    be fewer than `rows`. Raises `ValueError` for no rows.
    """
    if not rows:
        raise ValueError("no rows to examine")
    characters = [_characters(row) for row in rows]
    pairs, kind = isinstance(rows[0], Preference), _row_kind(rows[0], report)
    per_prompt = Counter(prompt_key(row.prompt) for row in rows)
    measured = tokens or characters
    over = None if tokens is None or limit is None else sum(n[0] + max(n[1:]) > limit for n in tokens)
    return DataFindings(
        source=source,
        format=report.format,
        kind=kind,
        read=report.read,
        kept=len(rows),
        refused=dict(report.refused),
        changed=dict(report.changed),
        first=dict(report.first),
        duplicates=report.refused.get(reasons.DUPLICATE, 0),
        ties=report.refused.get(reasons.TIED, 0),
        prompts=len(per_prompt),
        most_per_prompt=max(per_prompt.values()),
        characters=_spreads(characters),
        tokens=_spreads(tokens) if tokens else None,
        unit="tokens" if tokens else "characters",
        longer=_share_text([chosen > rejected for _, chosen, rejected in measured]) if pairs else None,
        always_longer=_share_text([_longer_wins(a, b) for _, a, b in measured]) if pairs else None,
        desirable=_share_text([row.desirable for row in rows]) if kind == "opinions" else None,  # type: ignore[union-attr]
        limit=limit,
        over_limit=over,
        heldout=None if heldout is None else len(heldout),
        overlap=None if heldout is None else prompts_in_both(rows, heldout),
        unread=dict(report.unread),
        notes=list(report.notes),
        heldout_prompts=heldout_prompts,
        detectable=detectable,
    )


def _row_kind(row: Preference | UnpairedExample, report: Report) -> str:
    """pairs; opinions where rows say whether they are liked; else demonstrations, which are to be imitated."""
    if isinstance(row, Preference):
        return "pairs"
    shapes = [FORMATS[name] for name in report.format.split(", ") if name in FORMATS]
    labelled = any({"label", "kto_tag"} & shape.columns.keys() for shape in shapes)
    return "opinions" if labelled or not shapes else "demonstrations"


def _characters(row: Preference | UnpairedExample) -> tuple[int, ...]:
    if isinstance(row, UnpairedExample):
        return _lengths_line(row.prompt), _lengths_line(row.completion)
    return _lengths_line(row.prompt), _lengths_line(row.chosen), _lengths_line(row.rejected)


def _lengths_line(text: Text) -> int:
    """Characters of a text, or of all turns with what else they hold (calls as JSON)."""
    if isinstance(text, str):
        return len(text)
    beside = (json.dumps(value, default=str) for turn in text for value in turn.extra.values())
    return sum(len(turn.content) for turn in text) + sum(map(len, beside))


def _spreads(lengths: Sequence[Sequence[int]]) -> dict[str, LengthSpread]:
    names = ("prompt", "chosen", "rejected") if len(lengths[0]) == 3 else ("prompt", "completion")
    return {name: length_spread(column) for name, column in zip(names, zip(*lengths, strict=True), strict=True)}


def length_spread(lengths: Sequence[int]) -> LengthSpread:
    """Median, 95th percentile and maximum of one or more lengths, each one of the lengths (nearest rank)."""
    ordered = sorted(lengths)
    median, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return LengthSpread(median, p95, ordered[-1])


def _longer_wins(chosen: int, rejected: int) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _share_text(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def finding_lines(found: DataFindings) -> list[str]:
    """The findings as plain sentences, the most general first."""
    report = Report(found.read, found.kept, found.refused, found.changed, found.first, found.format, found.unread)
    report.notes = found.notes
    said = [
        f"{found.source}: {_kept(found)} from {counted(found.read, 'row')}, read as {_format(found.format)}.",
        *(f"{line[0].upper()}{line[1:]}." for line in report.lines()),
        *_swapped(found),
        _prompts(found),
        *_size(found),
        _length_line("Characters", found.characters),
    ]
    if found.tokens:
        said.append(_length_line("Tokens", found.tokens))
    return [*said, *_limits(found), *_bias(found), *_overlap(found)]


def _kept(found: DataFindings) -> str:
    return counted(found.kept, found.kind.removesuffix("s"))


def _format(name: str) -> str:
    about = [FORMATS[one].about for one in name.split(", ") if one in FORMATS]
    return f"{name} ({'; '.join(about)})" if about else name or "an unnamed shape"


def _swapped(found: DataFindings) -> list[str]:
    """What to do where scores contradict most labels: the columns are the wrong way round."""
    inverted = found.changed.get(reasons.INVERTED, 0)
    if 2 * inverted <= found.kept:
        return []
    swap = "--data.columns.chosen rejected --data.columns.rejected chosen"
    return [
        f"The scores say the opposite of the labels in {inverted} of {_kept(found)}; if the better answer "
        f"is in the other column, train with {swap}, which exchanges the two."
    ]


def _prompts(found: DataFindings) -> str:
    mean = found.kept / found.prompts
    prompts = counted(found.prompts, "distinct prompt")
    return f"{prompts}, {mean:.2f} {found.kind} each on average, {found.most_per_prompt} at most."


FEW_PROMPTS = 100
"""Held-out prompts below which only effects of more than 14 points are visible."""


def _size(found: DataFindings) -> list[str]:
    """How many prompts are held out and which effect they can show."""
    if found.heldout_prompts is None or found.kind != "pairs":
        return []
    held = "1 prompt is held out" if found.heldout_prompts == 1 else f"{found.heldout_prompts} prompts are held out"
    if found.detectable is None:
        return [f"{held}: too few to show any effect; add data, or set data.eval to other prompts."]
    seen = f"{held}: the smallest win rate distinguishable from 50% is {found.detectable:.0%} (power 0.8, level 0.05)"
    few = found.heldout_prompts < FEW_PROMPTS
    return [f"{seen}; a smaller effect needs more prompts or a larger data.eval_fraction." if few else f"{seen}."]


def _length_line(unit: str, spreads: dict[str, LengthSpread]) -> str:
    parts = [f"{name} {s.median} / {s.p95} / {s.longest}" for name, s in spreads.items()]
    return f"{unit} (median / 95 % / longest): {', '.join(parts)}."


def _limits(found: DataFindings) -> list[str]:
    if found.over_limit is None:
        return []
    return [f"{found.over_limit} of {_kept(found)} are longer than {found.limit} tokens."]


def _bias(found: DataFindings) -> list[str]:
    if found.desirable is not None:
        ups = round(found.desirable * found.kept)
        weighed = balance(np.repeat([1.0, 0.0], [ups, found.kept - ups]), 1, 1)
        return [f"{found.desirable:.0%} of the completions are desirable: {weighed}."]
    if found.longer is None or found.always_longer is None:
        return []
    rule = "longer" if found.always_longer >= 0.5 else "shorter"
    right = max(found.always_longer, 1 - found.always_longer)
    return [
        f"The chosen completion is the longer one in {found.longer:.0%} of the pairs ({found.unit}); always choosing "
        f"the {rule} one is right in {right:.0%}, so an accuracy near that may reflect length alone."
    ]


def _overlap(found: DataFindings) -> list[str]:
    if found.overlap is None:
        return []
    if found.overlap == 0:
        return [f"None of the prompts is among the {found.heldout} held-out {found.kind}."]
    return [
        f"Also among the {found.heldout} held-out {found.kind}: {found.overlap} of the prompts; held-out numbers will "
        "be too good, so take these prompts out of one side, or let data.eval_fraction split by prompt."
    ]
