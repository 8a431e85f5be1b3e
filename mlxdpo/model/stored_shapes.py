"""What a model's config.json says of its size, held against the arrays that are stored, before anything is made of it.

A definition builds its layers one by one: a billion of them is a program that never ends, whatever the weights are.
Widths need no look here: arrays are made without being computed, and have to fit the stored ones before they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxdpo.types import UserError

COUNTED = re.compile(r"layer|block|expert|depth")
USUAL = 1000  # of a kind; the largest models have a hundred layers and half a thousand experts
ROPE_BY_LAYER = {"step3p5"}  # definitions that take a list of `rope_theta`, a number for each layer
NUMBER = re.compile(r"(?:^|\.)(\d{1,6})(?=\.|$)")


def check_counts(config: Mapping[str, Any], stored: Mapping[str, Sequence[int]], name: str) -> None:
    """Raise `UserError` where `config` counts more layers, blocks or experts than any of the stored arrays, by name and
    shape, has."""
    check_kinds(config, name)
    layers = max([USUAL, *(int(number) + 1 for array in stored for number in NUMBER.findall(array))])
    others = max([layers, *(side for shape in stored.values() for side in shape)])
    for key, value in _numbers(config):
        most = layers if "layer" in key else others
        if COUNTED.search(key) and value > most:
            raise UserError(f"{name}: config.json says `{key}` {value:.6g}, its weights have {most} at most")


def check_kinds(config: Mapping[str, Any], name: str) -> None:
    """Raise `UserError` for a number of `config` that is none, or no token id, and is used once the model computes."""
    for key in ("rope_theta", "rope_local_base_freq"):
        value = config.get(key)
        bases = [] if value is None else [value]
        if isinstance(value, list) and config.get("model_type") in ROPE_BY_LAYER:
            bases = value
        if any(isinstance(base, bool) or not isinstance(base, int | float) for base in bases):
            raise UserError(f"{name}: config.json says `{key}` {str(value)[:40]!r}, expected a number")
    ends = config.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not (isinstance(end, int) and 0 <= end < 1 << 31):
            raise UserError(f"{name}: config.json says `eos_token_id` {str(end)[:40]!r}, expected the id of a token")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a config with the key that it stands under, however deep."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
