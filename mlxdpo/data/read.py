"""From a source to preferences: rename, detect, convert, leave out and count; and the split by prompt.

A row that does not fit the detected shape is a bad row, never a reason to detect again: a set has one shape.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.context import scores_of, unread_columns
from mlxdpo.data.fields import Row, as_turns, column_names, describe_type, printable
from mlxdpo.data.formats import Format, check_columns, convert, detect, detect_by_names, named_format
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.sources import READERS, Found, heldout_split, is_hub_dataset, read_rows
from mlxdpo.io.words import counted
from mlxdpo.types import LONGEST_SENTENCE, Preference, Text, UnpairedExample, UserError

Item = Preference | UnpairedExample
One = TypeVar("One", Preference, UnpairedExample)
Rows = Callable[[Iterable[Item], Report], Iterator[Item]]
"""What is made of clean rows: some are taken as they are, some as others, some left out and counted."""

ROWS_TO_DETECT = 100
"""Rows looked at for one that fits a known shape: the first may be a bad one."""


def all_rows(items: Iterable[Item], report: Report) -> Iterator[Item]:
    """Pairs and opinions alike."""
    return iter(items)


def stream_rows(
    data: DataConfig, take: Rows, path: str | None = None, split: str | None = None
) -> tuple[Iterator[Item], Report]:
    """Read, convert and clean the rows of `path` (default `data.path`), as `data` says, one at a time, and `take` them.

    The report is filled as the rows are taken. It counts rows read, pairs (or opinions) kept, and every refused row
    under its reason; identical, tied and duplicate rows are left out even where `data.on_bad_row` is stop (see
    `reasons.NO_PREFERENCE`). Raises `UserError` for an unknown shape, and while the rows are taken at the first bad
    one (stop), or at the end when none was left. In memory are 16 bytes a row, by which duplicates are known.
    """
    source, part = path or data.path, split or data.split
    found = _renamed(read_rows(source, part), data.columns)
    files = itertools.groupby(found, key=lambda one: one[0].rpartition(":")[0])
    shape, first = _shape_of(next(files)[1], data.format, None, source)
    report = Report(format=shape.name)
    if data.eval is None and path == data.path and part != data.split:
        report.notes.append(f'using split "{part}" (next to {data.split} in {path}) as held-out pairs')
    rest = (_shape_of(rows, data.format, shape, source) for _, rows in files)
    converted = (
        item
        for shape, rows in itertools.chain([(shape, first)], rest)
        for item in _converted(shape, _fitting(shape, rows, report, data), report, data)
    )
    found = converted if data.credit is None else _with_trajectories(converted, report, data.credit)
    clean = distinct_pairs(found, report, "the same pair as in an earlier row")
    return _counted_kept(take(clean, report), report, source), report


def stream_preferences(
    data: DataConfig, path: str | None = None, split: str | None = None
) -> tuple[Iterator[Item], Report]:
    """`stream_rows` as they are."""
    return stream_rows(data, all_rows, path, split)


def _counted_kept(items: Iterable[Any], report: Report, source: str) -> Iterator[Any]:
    for item in items:
        report.kept += 1
        yield item
    if not report.kept:
        first = next(iter(report.first.values()), "nothing to read")
        raise UserError(f"{source}: none of its {counted(report.read, 'row')} can be used; the first says: {first}")


def read_preferences(
    data: DataConfig, path: str | None = None, split: str | None = None
) -> tuple[list[Preference] | list[UnpairedExample], Report]:
    """`stream_preferences` in a list. Raises the same `UserError`s."""
    items, report = stream_preferences(data, path, split)
    rows: list[Any] = list(items)
    return rows, report


def stream_pairs(
    data: DataConfig, path: str | None = None, split: str | None = None
) -> tuple[Iterator[Preference], Report]:
    """`stream_rows` for whom only pairs will do."""
    return stream_rows(data, pairs_only, path, split)  # type: ignore[return-value]


def pairs_only(items: Iterable[Item], report: Report) -> Iterator[Preference]:
    """Pairs; `UserError` at the end for single answers."""
    thumb = None
    for item in items:
        if isinstance(item, Preference):
            yield item
        elif thumb is None:
            thumb = item.where  # not raised yet: a bad row further down is the better news
    if thumb is not None:
        raise UserError(
            f"{thumb}: a single answer; pairs of two answers are needed (stage sft takes single ones, "
            f"loss.name kto those with a thumb up or down)"
        )


def read_pairs(data: DataConfig, path: str | None = None, split: str | None = None) -> tuple[list[Preference], Report]:
    """`stream_pairs` in a list. Raises the same `UserError`s."""
    pairs, report = stream_pairs(data, path, split)
    return list(pairs), report


def heldout_source(data: DataConfig) -> tuple[str, str] | None:
    """(path, split) of the held-out pairs that `data.eval` names: a file, a folder, or a split of `data.path`; where
    it names none and pairs are held out at all, of the split of a folder that is there for it (mlx-lm's `valid`).

    Raises `UserError` where it is the name of a split and `data.path` a file.
    """
    if data.eval is None:
        beside = heldout_split(data.path, data.split) if data.eval_fraction else None
        return None if beside is None else (data.path, beside)
    a_file = os.path.exists(Path(data.eval).expanduser()) or Path(data.eval.removesuffix(".gz")).suffix in READERS
    a_split = is_hub_dataset(data.path) or os.path.isdir(data.path)
    if not a_file and "/" not in data.eval and os.path.isfile(data.path):
        raise UserError(f"data.eval {data.eval} is not a file, and {data.path} has no splits; give --data.eval FILE")
    return (data.path, data.eval) if a_split and not a_file else (data.eval, data.split)


def _renamed(found: Iterable[Found], columns: Mapping[str, str]) -> Iterator[Found]:
    for where, row in found:
        yield where, row if isinstance(row, BadRow) else _rename(row, columns)


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | BadRow:
    """The row under the format's names; `columns` is {format's name: own name}, and may swap two names."""
    missing = [own for own in columns.values() if own not in row]
    if missing:
        return BadRow(
            reasons.MISSING_COLUMN,
            f'"{missing[0]}" (from data.columns) is missing; the row has the columns {column_names(row)}',
        )
    moved = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {name: row[own] for name, own in columns.items()}


def _shape_of(found: Iterator[Found], name: str, before: Format | None, source: str) -> tuple[Format, Iterator[Found]]:
    """The row shape of a file, and its rows again from the first one; `before` is the shape of the file before it."""
    if name != "auto":
        return named_format(name), found
    looked: list[Found] = []
    shape = None
    for where, row in itertools.islice(found, ROWS_TO_DETECT):
        looked.append((where, row))
        shape = None if isinstance(row, BadRow) else detect(row)
        if shape:
            break
    return shape or before or _shape_by_names(looked, source), itertools.chain(looked, found)


def _shape_by_names(looked: Sequence[Found], source: str) -> Format:
    """No row fits: take the shape whose columns are there, so that the rows say what is wrong with them."""
    rows = [(where, row) for where, row in looked if not isinstance(row, BadRow)]
    if not rows:
        where, bad = looked[0]
        raise UserError(f"{where}: {bad.sentence}; no readable row among the first {len(looked)}")  # type: ignore[union-attr]
    where, row = rows[0]
    if shape := detect_by_names(row):
        return shape
    seen = column_names(f"{name} ({describe_type(value)})" for name, value in row.items())
    remedy = _remedy(row, source)
    room = max(40, LONGEST_SENTENCE - len(f"{where}: the columns  match no known row shape; {remedy}"))
    shown = seen if len(seen) <= room else f"{seen[: room - 3]}..."
    raise UserError(f"{where}: the columns {shown} match no known row shape; {remedy}")


ASKING = (
    "prompt",
    "question",
    "instruction",
    "input",
    "query",
    "messages",
    "conversation",
    "context",
    "ask",
    "user",
    "q",
)
BETTER = ("chosen", "better", "good", "preferred", "winner", "win", "accepted", "positive", "best", "pos", "yes")
WORSE = ("rejected", "worse", "bad", "dispreferred", "loser", "lose", "declined", "negative", "worst", "neg", "no")


def _remedy(row: Mapping[str, Any], source: str) -> str:
    """The command that names a row's columns, where three of them can be prompt, chosen and rejected."""
    texts = [name for name, value in row.items() if isinstance(value, str) or describe_type(value) == "messages"]
    found: dict[str, str] = {}
    for wanted, words in (("prompt", ASKING), ("rejected", WORSE), ("chosen", BETTER)):
        left = [name for name in texts if name not in found.values()]
        if name := min(
            (n for n in left if _rank_of(n, words) < len(words)), key=lambda n: _rank_of(n, words), default=""
        ):
            found[wanted] = name
    guessed = len(found) == 3
    left = iter([name for name in texts if name not in found.values()])
    found |= {
        wanted: name for wanted in ("prompt", "chosen", "rejected") if wanted not in found and (name := next(left, ""))
    }
    if len(found) < 3 or any(not name.isprintable() for name in found.values()):
        return "a pair needs a prompt, a chosen and a rejected answer; `mlxdpo data formats` lists all shapes"
    named = " ".join(
        f"--data.columns.{wanted}{'=' if found[wanted].startswith('-') else ' '}{shlex.quote(found[wanted])}"
        for wanted in ("prompt", "chosen", "rejected")
        if found[wanted] != wanted
    )
    whole = f"mlxdpo data check {shlex.quote(source)} {named}"
    command = whole if len(whole) < 250 and source.isprintable() else f"mlxdpo data check FILE {named}"
    said = "say which is which" if guessed else "say which is which (here in the order of the file)"
    return f"{said}, as in `{command}`; train takes the same options"


def _rank_of(name: str, words: Sequence[str]) -> int:
    """The place of the first word that is part of a column's name; `len(words)` where none is."""
    parts = set("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return next((at for at, word in enumerate(words) if word in parts), len(words))


def _with_trajectories(items: Iterable[Item], report: Report, credit: str) -> Iterator[Item]:
    """The items; `UserError` at the end where `data.credit` had nothing to decide."""
    several = False
    for item in items:
        several |= item.context is not None
        yield item
    if report.read and not several:
        raise UserError(
            f"data.credit {credit} is for conversations in which several turns are judged, and no row is one "
            f"(format {report.format}); leave it out"
        )


def _fitting(shape: Format, found: Iterable[Found], report: Report, data: DataConfig) -> Iterator[Row]:
    if shape.name not in report.format.split(", "):
        report.format += f", {shape.name}"
    for where, row in found:
        report.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            flat = shape.flattened(row)
            check_columns(shape, flat)
        except BadRow as bad:
            report.refuse(where, bad, data.on_bad_row)
        else:
            yield Row(where, flat, data.credit)


def _converted(shape: Format, rows: Iterable[Row], report: Report, data: DataConfig) -> Iterator[Item]:
    for group in _groups(shape, rows):
        try:
            found = convert(shape, group, data)
            items = [item for item in found if not isinstance(item, BadRow)]
            _note_columns(shape, group, items, report, data)
            parts = [part for part in found if isinstance(part, BadRow)]
            if parts and not items:
                raise parts[0]
            for part in parts:  # the rest of the row is kept
                report.change(group[0].where, part.reason)
            yield from items
        except BadRow as bad:
            for row in group:
                report.refuse(row.where, bad, "skip" if bad.reason in reasons.NO_PREFERENCE else data.on_bad_row)


def _note_columns(shape: Format, group: Sequence[Row], items: Sequence[Item], report: Report, data: DataConfig) -> None:
    """Count the unused columns, and scores that contradict the label of a row's one pair."""
    for row in group:
        for name in unread_columns(row.values, shape.reads, shape.inner, data):
            report.unread[printable(name)] = report.unread.get(printable(name), 0) + 1
    if len(items) == 1 and any(high < low for _, _, high, low in scores_of(group[0].values, data)):
        report.change(group[0].where, reasons.INVERTED)


def _groups(shape: Format, rows: Iterable[Row]) -> Iterator[list[Row]]:
    if shape.gather is None:
        return ([row] for row in rows)
    return (list(group) for _, group in itertools.groupby(rows, key=lambda row: row.values["prompt"]))


def distinct_pairs(items: Iterable[Item], report: Report, sentence: str) -> Iterator[Item]:
    """Leave out repetitions, of which `sentence` says what they are; keep and count a row whose label is the reverse
    of an earlier one's."""
    seen: set[bytes] = set()
    for item in items:
        this, reverse = _pair_keys(item)
        if this in seen:
            report.refuse(item.where, BadRow(reasons.DUPLICATE, sentence), "skip")
            continue
        if reverse in seen:
            report.change(item.where, reasons.CONTRADICTION)
        seen.add(this)
        yield item


def _pair_keys(item: Item) -> tuple[bytes, bytes]:
    if isinstance(item, UnpairedExample):
        labels = item.desirable, not item.desirable
        return tuple(_pair_digest(repr((item.prompt, item.tools, item.completion, label))) for label in labels)  # type: ignore[return-value]
    orders = (item.chosen, item.rejected), (item.rejected, item.chosen)
    return tuple(_pair_digest(repr((item.prompt, item.tools, *order))) for order in orders)  # type: ignore[return-value]


def _pair_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def unpaired(pairs: Iterable[Preference]) -> list[UnpairedExample]:
    """Each pair as two opinions, for unpaired objectives: the chosen desirable, the rejected not."""
    return [
        UnpairedExample(
            pair.prompt, completion, desirable, pair.where, pair.tools, pair.columns, pair.extras, pair.context
        )
        for pair in pairs
        for completion, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def prompt_key(prompt: Text) -> bytes:
    """What makes two prompts the same: roles and words. White space, or text for one user turn, do not matter."""
    return _pair_digest(repr([(turn.role, turn.content.split()) for turn in as_turns(prompt)]))


def split_heldout(rows: Sequence[One], fraction: float, seed: int) -> tuple[list[One], list[One]]:
    """(train, held-out) by prompt: no prompt is in both, and about `fraction` of the prompts are held out.

    A prompt's side depends on the prompt and the seed alone, so appending or reordering rows moves none. Only
    where that leaves a side empty does one prompt cross over; a single prompt stays in training.
    """
    heldout = heldout_prompts({prompt_key(row.prompt) for row in rows}, fraction, seed)
    sides: tuple[list[One], list[One]] = [], []
    for row in rows:
        sides[prompt_key(row.prompt) in heldout].append(row)
    return sides


def heldout_prompts(prompts: Collection[bytes], fraction: float, seed: int) -> set[bytes]:
    """Which of the distinct `prompts` (their `prompt_key`s) are held out, by the rule of `split_heldout`."""
    if fraction <= 0 or len(prompts) < 2:
        return set()
    heldout = {key for key in prompts if _draw_heldout(key, seed) < fraction}
    if not heldout:
        return {min(prompts, key=lambda key: (_draw_heldout(key, seed), key))}
    if len(heldout) == len(prompts):
        heldout.remove(max(prompts, key=lambda key: (_draw_heldout(key, seed), key)))
    return heldout


def _draw_heldout(key: bytes, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(key + str(seed).encode()).digest()[:8], "big") / 2**64


def prompts_in_both(a: Iterable[Item], b: Iterable[Item]) -> int:
    """How many distinct prompts two sets share: held-out numbers on them are too good."""
    return len({prompt_key(row.prompt) for row in a} & {prompt_key(row.prompt) for row in b})
