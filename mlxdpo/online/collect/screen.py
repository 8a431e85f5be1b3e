"""Which answers can stand in a pair: not empty, not cut off, not said before. Every one left out has its reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

GRAM = 3  # words
EMPTY = "empty"
UNFINISHED = "unfinished: no end within max_tokens"
BROKEN = "cut inside a character"
SPECIAL = "a special token inside"
REPEATED = "nearly the same as an earlier answer to its prompt"
UNJUDGED = "could not be judged"

Grams = frozenset[tuple[str, ...]]


def grams(text: str) -> Grams:
    """The word triples of a text, case and punctuation aside; a shorter text is one gram, one without words itself."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return frozenset({(text.strip(),)})
    if len(words) < GRAM:
        return frozenset({tuple(words)})
    return frozenset(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def jaccard(a: Grams, b: Grams) -> float:
    """Shared grams over all grams of two texts, in [0, 1] (Broder 1997's resemblance)."""
    return len(a & b) / len(a | b)


def fault(text: str, tokens: Sequence[int], ended: bool, keep_unfinished: bool, special: Collection[int]) -> str:
    """Why an answer by itself cannot stand in a pair; "" where it can."""
    if not text.strip():
        return EMPTY
    if not ended and not keep_unfinished:
        return UNFINISHED
    if "\N{REPLACEMENT CHARACTER}" in text:
        return BROKEN
    return "" if set(tokens).isdisjoint(special) else SPECIAL


def repeats(texts: Sequence[str], faults: Sequence[str], near: float) -> list[str]:
    """`faults`, and `REPEATED` for each faultless answer at least `near` an earlier faultless one. Order matters: the
    first stays."""
    kept: list[Grams] = []
    result = []
    for text, why in zip(texts, faults, strict=True):
        mine = grams(text) if not why else frozenset()
        if not why and any(jaccard(mine, other) >= near for other in kept):
            why = REPEATED
        elif not why:
            kept.append(mine)
        result.append(why)
    return result
