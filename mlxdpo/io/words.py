"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 pair`, `2,000 pairs`. `plural` is for nouns that take more than an s."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {plural or noun + 's'}" if number >= 10_000 else f"{number} {plural or noun + 's'}"
