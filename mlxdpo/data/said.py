"""What a row says of its pair besides texts: columns that `data.columns` names as probability, weight or margin.

Only a named column counts: published sets have columns of these names that mean something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlxdpo.data import reasons
from mlxdpo.data.report import BadRow
from mlxdpo.data.values import Row, describe, is_number
from mlxdpo.types import Extras, Opinion, Preference

Item = Preference | Opinion


class Said(NamedTuple):
    """A column: the field of `Extras` it fills, what its numbers must be, and a test of them."""

    field: str
    expected: str
    fits: Callable[[float], bool]


COLUMNS = {
    "probability": Said("label", "a probability from 0 to 1", lambda x: 0 <= x <= 1),
    "weight": Said("weight", "a number of at least 0", lambda x: x >= 0),
    "margin": Said("margin", "a number", lambda x: True),
}


def with_extras(items: Sequence[Item], rows: Sequence[Row], columns: Mapping[str, str]) -> Iterator[Item]:
    """The items of a row, or of the gathered rows of a prompt, with what its named columns say.

    Raises `BadRow` for a value that is none, and for a row that makes several pairs, of which none owns the number.
    """
    named = {name: own for name, own in columns.items() if name in COLUMNS}
    if not named:
        yield from items
        return
    if len(items) > 1 or len(rows) > 1:
        raise BadRow(
            reasons.WRONG_TYPE, f'the row makes several pairs, so "{next(iter(named.values()))}" belongs to none'
        )
    extras = Extras(
        **{COLUMNS[name].field: _number(rows[0].values[name], own, COLUMNS[name]) for name, own in named.items()}
    )
    yield from (dataclasses.replace(item, extras=extras) for item in items)


def _number(value: Any, name: str, said: Said) -> float:
    if not is_number(value):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {describe(value)}; expected {said.expected}')
    if not said.fits(float(value)):
        raise BadRow(reasons.WRONG_TYPE, f'"{name}" is {float(value):g}; expected {said.expected}')
    return float(value)
