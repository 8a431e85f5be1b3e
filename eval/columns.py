"""Metadata columns to slice results by: those a user names, or those that obviously are categories."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mlxdpo import UserError

MOST_VALUES = (
    20  # distinct values of a column that is worth slicing by unasked, and of numbers that are not cut into bins
)
BINS = 4


def slicing(rows: Sequence[Mapping[str, Any]], named: Sequence[str] = ()) -> dict[str, list[Hashable]]:
    """Column name -> one value per row. `rows` are the other columns of each row.

    Of the `named` columns, numbers of more than `MOST_VALUES` distinct values are cut into quarters, and lists and
    objects are taken as their JSON. With none named: columns of text, whole numbers or yes/no with 2 to `MOST_VALUES`
    distinct values. Raises `UserError` for a named column that no row has.
    """
    there = sorted({name for row in rows for name in row})
    if unknown := [name for name in named if name not in there]:
        known = f"their columns are {', '.join(there)}" if there else "they have no columns besides prompt and answers"
        raise UserError(f"--slice {unknown[0]}: the held-out rows have no such column; {known}")
    if named:
        return {name: _values([row.get(name) for row in rows]) for name in dict.fromkeys(named)}
    found: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in there}
    return {name: values for name, values in found.items() if _is_category(values)}


def picked(
    columns: Mapping[str, Sequence[Hashable]], rows: Sequence[Any], some: Sequence[Any]
) -> dict[str, list[Hashable]]:
    """The columns of `rows` at some of these very rows."""
    at = {id(row): i for i, row in enumerate(rows)}
    return {name: [values[at[id(row)]] for row in some] for name, values in columns.items()}


def _is_category(values: Sequence[Any]) -> bool:
    plain = all(value is None or isinstance(value, str | int | bool) for value in values)
    return plain and 2 <= len(set(values)) <= MOST_VALUES


def _values(values: Sequence[Any]) -> list[Hashable]:
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
