"""Where is the model worse? Results by the values of a metadata column, with intervals that hold for all at once.

Of twenty slices one lies outside its own 95 % interval by luck alone, and the worst of them always looks bad.
So the intervals are simultaneous, and the comparisons of each slice with the rest are corrected together.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from mlxdpo import UserError
from mlxdpo_eval.metrics.intervals import Interval, clustered_se, clustered_share, number_clusters

# Distinct values of a column that is worth slicing by unasked, and of numbers that are not cut into bins.
MOST_VALUES = 20
BINS = 4
FEWEST = 20  # rows of a slice that is shown


def slice_columns(rows: Sequence[Mapping[str, Any]], named: Sequence[str] = ()) -> dict[str, list[Hashable]]:
    """Metadata columns to slice by, name -> one value per row: the named ones, or those that are clearly categories.

    `rows` are the other columns of each row. Of the `named` columns, numbers of more than `MOST_VALUES` distinct values
    are cut into quarters, and lists and objects are taken as their JSON. With none named: columns of text, whole
    numbers or yes/no with 2 to `MOST_VALUES` distinct values. Raises `UserError` for a named column that no row has.
    """
    there = sorted({name for row in rows for name in row})
    if unknown := [name for name in named if name not in there]:
        known = f"their columns are {', '.join(there)}" if there else "they have no columns besides prompt and answers"
        raise UserError(f"--slice {unknown[0]}: the held-out rows have no such column; {known}")
    if named:
        return {name: _slice_values([row.get(name) for row in rows]) for name in dict.fromkeys(named)}
    found: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in there}
    return {name: values for name, values in found.items() if _is_category(values)}


def select_columns(
    columns: Mapping[str, Sequence[Hashable]], rows: Sequence[Any], some: Sequence[Any]
) -> dict[str, list[Hashable]]:
    """The columns of `rows` at some of these very rows."""
    at = {id(row): i for i, row in enumerate(rows)}
    return {name: [values[at[id(row)]] for row in some] for name, values in columns.items()}


def _is_category(values: Sequence[Any]) -> bool:
    plain = all(value is None or isinstance(value, str | int | bool) for value in values)
    return plain and 2 <= len(set(values)) <= MOST_VALUES


def _slice_values(values: Sequence[Any]) -> list[Hashable]:
    numbers = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v)})
    if len(numbers) > MOST_VALUES and all(v is None or v in numbers for v in values if not isinstance(v, list | dict)):
        return _quarters(values)
    return [json.dumps(v, sort_keys=True, ensure_ascii=False) if isinstance(v, list | dict) else v for v in values]


def _quarters(values: Sequence[Any]) -> list[Hashable]:
    """Four bins of about as many rows, named by their least and greatest number."""
    numbers = np.array([v for v in values if v is not None], float)
    cuts = np.quantile(numbers, np.arange(1, BINS) / BINS, method="inverted_cdf")
    codes = np.searchsorted(cuts, numbers, side="left")
    names = {int(c): f"{numbers[codes == c].min():g} to {numbers[codes == c].max():g}" for c in np.unique(codes)}
    at = iter(codes)
    return [None if v is None else names[int(next(at))] for v in values]


class Slice(NamedTuple):
    """Rows of one value of the column.

    `interval` holds for all shown slices at once. `difference` is this slice's mean less that of all other
    rows; `q` its p-value corrected by Benjamini and Hochberg, None where the data cannot carry a test.
    """

    name: str
    n: int
    share: float
    interval: Interval | None
    difference: float | None
    q: float | None


class Slices(NamedTuple):
    """Slices of at least `FEWEST` rows, from worst to best; `hidden` counts the slices and rows below that.

    `macro` is the unweighted mean over shown slices, None without any.
    """

    shown: tuple[Slice, ...]
    hidden: int
    hidden_rows: int
    macro: float | None
    worst: Slice | None


def slice_report(
    values: Sequence[float] | np.ndarray,
    column: Sequence[Hashable],
    clusters: Sequence[Hashable] | np.ndarray,
    level: float = 0.95,
    fewest: int = FEWEST,
) -> Slices:
    """Means of outcomes in [0, 1] by the values of `column`, all three of one length.

    Each interval has level 1 - (1 - level) / shown slices (Bonferroni), so that all of them cover together
    with probability `level` at least: the worst slice's too. A missing value (None) is a slice of its own.
    Raises `ValueError` for lengths that differ.
    """
    data, labels = number_clusters(values, clusters)
    if len(column) != len(data):
        raise ValueError(f"{len(data)} values and {len(column)} column entries; expected one entry per value")
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(column):
        rows.setdefault(name, []).append(i)
    kept = {name: np.array(at) for name, at in rows.items() if len(at) >= fewest}
    hidden = [len(at) for at in rows.values() if len(at) < fewest]
    each = 1 - (1 - level) / max(1, len(kept))
    tests = [_against_rest(data, labels, at) for at in kept.values()]
    corrected = iter(stats.false_discovery_control([p for _, p in tests if p is not None]))
    shown = [
        Slice(
            "(none)" if name is None else str(name),
            len(at),
            float(data[at].mean()),
            clustered_share(data[at], labels[at], each),
            difference,
            None if p is None else float(next(corrected)),
        )
        for (name, at), (difference, p) in zip(kept.items(), tests, strict=True)
    ]
    shown.sort(key=lambda s: (s.share, s.name))
    macro = float(np.mean([s.share for s in shown])) if shown else None
    return Slices(tuple(shown), len(hidden), sum(hidden), macro, shown[0] if shown else None)


def _against_rest(data: np.ndarray, labels: np.ndarray, at: np.ndarray) -> tuple[float | None, float | None]:
    """Difference of the slice's mean from the mean of all other rows, and its two-sided p-value.

    The difference is a linear statistic of the rows, so its clustered standard error is that of the mean of
    its influences; a prompt in both parts is thereby counted as one cluster. t with C - 1 degrees of freedom.
    """
    inside = np.zeros(len(data), bool)
    inside[at] = True
    if inside.all():
        return None, None
    means = np.where(inside, data[inside].mean(), data[~inside].mean())
    difference = float(data[inside].mean() - data[~inside].mean())
    share = inside.mean()
    influence = (data - means) * np.where(inside, 1 / share, -1 / (1 - share))
    error, count = clustered_se(influence, labels), int(labels.max()) + 1
    if error is None or error <= 1e-12:
        return difference, None
    return difference, 2 * float(special.stdtr(count - 1, -abs(difference) / error))
