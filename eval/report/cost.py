"""What a better answer cost, in words: longer answers, a model further from its reference, money for judges.

For the first screen of the report; the numbers with their intervals stand further down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]


def cost_sentences(results: Result) -> list[str]:
    """Length, endings and repetition of the answers, distance, displacement, and what the judges used."""
    drift = results["drift"]
    return [
        *_about_texts(drift["before"], drift["after"], drift["length_ratio"]["value"]),
        *(sentence for one in results["winrates"][:1] for sentence in _about_cut_off(one)),
        f"The model is {drift['kl']:.2f} nats an answer from its reference (KL); "
        f"{100 * drift['same']:.0f} % of its answers are identical to before.",
        *_about_pairs(results["pairs"]["rewards"]["displacement"]["mean"]),
        *(sentence for name, spent in results["when"]["judges"].items() for sentence in _about_judge(name, spent)),
    ]


def _about_texts(before: Result, after: Result, ratio: float | None) -> Iterator[str]:
    old, new = (side["length"]["value"] for side in (before, after))
    if ratio is not None and old is not None and new is not None:
        yield f"Answers are {ratio:.2f} times as long as before: {old:.0f} tokens became {new:.0f}."
    ends, loops = ([side[name]["value"] for side in (before, after)] for name in ("stopped", "repetition"))
    if None not in ends:
        yield f"{100 * ends[1]:.0f} % of them end with an end token, {100 * ends[0]:.0f} % before."
    if None not in loops and max(loops) > 0:
        yield f"{100 * loops[1]:.1f} % of their 3-grams are repetitions, {100 * loops[0]:.1f} % before."


def _about_cut_off(judged: Result) -> Iterator[str]:
    """Verdicts on parts of answers, of the first judge; results before 0.2 do not count them."""
    if not judged.get("cut_off"):
        return
    rate, known = judged["complete"], judged["answered"]
    others = "; none has two complete answers"
    if judged["cut_off"] < known:
        span = "" if rate is None else f" ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"
        share = "not known" if rate is None else f"{100 * rate['estimate']:.1f} %{span}"
        others = f"; over the others the win rate is {share}"
    yield (
        f"{judged['cut_off']} of {known} verdicts of {judged['judge']} are on an answer cut off at the limit of tokens"
        f"{others}."
    )


def _about_pairs(moved: float | None) -> Iterator[str]:
    if moved is not None:
        than = "more" if moved >= 0 else "less"
        yield f"The chosen answers of held-out pairs are {abs(moved):.2f} nats {than} likely than before."


def _about_judge(name: str, spent: Result) -> Iterator[str]:
    """What one judge used; of a panel, what each member did."""
    if "requests" not in spent:
        for member, own in spent.items():
            yield from _about_judge(member, own)
        return
    tokens = f"{spent['prompt_tokens']:,} + {spent['completion_tokens']:,} tokens"
    thought = f", {spent['reasoning_tokens']:,} of them reasoning" if spent["reasoning_tokens"] else ""
    money = "" if spent["dollars"] is None else f", {spent['dollars']:.2f} dollars"
    yield (
        f"{name} ({spent['asked_by']}): {spent['requests']:,} answers, {spent['retries']:,} requests repeated, "
        f"{spent['failed']:,} failed; {tokens}{thought}{money}."
    )
