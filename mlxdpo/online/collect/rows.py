"""Rows of a collection: which answers can stand in a pair, which make one by a rule on their scores, what made them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mlxdpo.config import Drawing
from mlxdpo.io.digest import json_digest

Row = dict[str, Any]
Rule = Callable[[Sequence[float], float], list[tuple[int, int]]]
"""(scores, least difference) -> (better, worse); equal scores make no pair."""

FEW = "prompts with fewer than two usable answers"
TIED = "prompts whose answers all score the same"
CLOSE = "prompts whose answers score less than the margin apart"


def best_worst(scores: Sequence[float], margin: float) -> list[tuple[int, int]]:
    """The highest score against the lowest; the first of equals."""
    places = range(len(scores))
    best, worst = max(places, key=lambda i: scores[i]), min(places, key=lambda i: scores[i])
    return [(best, worst)] if _apart(scores[best], scores[worst], margin) else []


def every(scores: Sequence[float], margin: float) -> list[tuple[int, int]]:
    """Every two answers that score differently, at least `margin` apart; best first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [(a, b) for a, b in itertools.combinations(order, 2) if _apart(scores[a], scores[b], margin)]


def _apart(high: float, low: float, margin: float) -> bool:
    return high > low and high - low >= margin


RULES: dict[str, Rule] = {"best-worst": best_worst, "all": every, "margin": every, "ranked": every}
"""By the name of `collect.pairs`. A ranked row stands for every pair it holds."""


def why_none(scores: Sequence[float], margin: float) -> str:
    """The reason that a prompt gave no pair."""
    if len(scores) < 2:
        return FEW
    return TIED if max(scores) == min(scores) or not margin else CLOSE


def made_of(identity: Mapping[str, Any]) -> Row:
    """What stands in every row: whose answers, ranked by whom, drawn how."""
    judge, source = identity["judge"], identity["source"]
    digest = json_digest(judge)[:16]
    drawing = {name: identity["drawing"][name] for name in ("seed", "samples", "max_tokens", "temperature", "top_p")}
    model = {**source, "model": source["model"]["digest"]}
    return {**model, "judge": judge["name"], "judge_digest": digest, **drawing}


def pair_rows(line: Mapping[str, Any], how: Drawing) -> tuple[list[Row], str]:
    """The rows that a prompt's answers give, or the reason for none."""
    usable = [answer for answer in line["answers"] if not answer["left_out"]]
    scores = [answer["score"] for answer in usable]
    pairs = RULES[how.pairs](scores, how.margin) if len(scores) > 1 else []
    if not pairs:
        return [], why_none(scores, how.margin)
    shared = {name: line[name] for name in ("prompt", "tools") if name in line}
    if how.pairs == "ranked":
        return [{**shared, "completions": [answer["text"] for answer in usable], "scores": scores}], ""
    return [shared | _pair_row(usable[better], usable[worse]) for better, worse in pairs], ""


def _pair_row(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> Row:
    sides = {"chosen": chosen, "rejected": rejected}
    row: Row = {name: side["text"] for name, side in sides.items()}
    for part in ("score", "finish", "tokens"):
        row |= {f"{part}_{name}": side[part] for name, side in sides.items()}
    return row | {"gap": chosen["score"] - rejected["score"]}


def written(row: Mapping[str, Any], turns: bool) -> Row:
    """The row as it is written: where one prompt of the file is a conversation, all are."""
    if not turns or not isinstance(row["prompt"], str):
        return dict(row)
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}


GRAM = 3  # words
EMPTY = "empty"
UNFINISHED = "unfinished: no end within max_tokens"
BROKEN = "cut inside a character"
SPECIAL = "a special token inside"
REPEATED = "nearly identical to an earlier answer to the prompt"
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
