"""What a report is made of, and how its numbers are written.

Headlines put numbers in words: better, worse, or cannot tell yet, and what effect would have been seen. Nothing is
called a trend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlxdpo_eval.report.plots import Figure

if TYPE_CHECKING:  # the first loads MLX
    from mlxdpo_eval.heldout import BestOfKReport, Heldout
    from mlxdpo_eval.judged_answers import WinRate
    from mlxdpo_eval.voting import VoteRun

Verdict = Literal["better", "worse", "cannot tell yet", "no difference shown", "no verdict"]


class Headline(NamedTuple):
    """The verdict, and the sentence that carries its numbers."""

    verdict: Verdict
    sentence: str


def share(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def span(interval: Any) -> str:
    """The bounds of an interval of shares."""
    return "no interval" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def answers_headline(result: WinRate, max_invalid: float) -> Headline:
    """What one judge's win rate says: no verdict where a larger share of what was asked than `max_invalid` failed."""
    if result.failed(max_invalid):
        return Headline("no verdict", f"No verdict: {_why_no_verdict_on_answers(result, max_invalid)}.")
    equal = f"{result.equal} of {result.n} pairs of answers are identical"
    if not result.answered:
        text = f"No difference shown: all {result.n} pairs of answers are the same before and after."
        return Headline("no difference shown", text)
    assert result.rate is not None
    facts = (
        f"{result.judge} prefers the tuned answers in {share(result.rate)} of the {result.answered} pairs it judged "
        f"({span(result.interval)}; {result.prompts} prompts){f', {equal}' if result.equal else ''}"
    )
    if result.interval is None or result.interval.low <= 0.5 <= result.interval.high:
        return Headline(
            "cannot tell yet", f"Cannot tell yet: {facts}; {smallest_effect(result.prompts, result.detectable)}."
        )
    verdict: Verdict = "better" if result.rate > 0.5 else "worse"
    return Headline(verdict, f"{verdict.capitalize()}: {facts}.")


def _why_no_verdict_on_answers(result: WinRate, max_invalid: float) -> str:
    """Why a judge has no verdict, with the four numbers."""
    equal = f"{result.equal} of {result.n} pairs of answers are identical and were not judged"
    if not result.asked:
        return f"{result.judge} has no vote on any of {result.n} pairs of answers ({equal})"
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.reasons.items())
    above = f", more than {share(max_invalid)} of what was asked" if result.answered else ""
    return (
        f"{result.judge} was asked about {result.asked} pairs of answers, {result.answered} were answered and "
        f"{result.invalid} are invalid ({reasons}){above}; {equal}"
    )


def pairs_headline(result: Heldout, unchanged: int = 0) -> Headline:
    """What the implicit rewards of held-out pairs say: about ranking given answers, not about writing them.

    `unchanged` is the number of answers drawn before and after, where all of them are word for word the same: then
    nothing is called better, however pairs are ranked.
    """
    rewards = result.rewards
    if rewards.ties == rewards.n:
        text = f"No difference shown: on all {rewards.n} held-out pairs the model is its reference (accuracy 0.5)."
        return Headline("no difference shown", text)
    interval = rewards.accuracy_interval
    facts = (
        f"the tuned model ranks {share(rewards.accuracy)} of {rewards.n} held-out pairs correctly ({span(interval)})"
    )
    if unchanged:
        text = f"No difference shown: {facts}, and writes all {unchanged} answers exactly as before."
        return Headline("no difference shown", text)
    if interval is None or interval.low <= 0.5 <= interval.high:
        return Headline(
            "cannot tell yet", f"Cannot tell yet: {facts}; {smallest_effect(result.prompts, result.detectable)}."
        )
    verdict: Verdict = "better" if rewards.accuracy > 0.5 else "worse"
    than = "more often than chance" if verdict == "better" else "less often than chance"
    return Headline(
        verdict, f"{verdict.capitalize()} on held-out pairs: {facts}, {than}; n = {result.prompts} prompts."
    )


def best_of_k_headline(result: BestOfKReport) -> Headline:
    """What best-of-k records say: is a right completion put first more often than chance would?"""
    best = result.best
    if result.tied == best.n:
        text = f"No difference shown: in all {best.n} best-of-k records the model is its reference, all score alike."
        return Headline("no difference shown", text)
    facts = (
        f"the tuned model puts a right completion first in {share(best.accuracy)} of {best.n} records "
        f"({span(best.interval)}; chance {share(best.chance)})"
    )
    if best.interval is None or best.interval.low <= best.chance <= best.interval.high:
        return Headline("cannot tell yet", f"Cannot tell yet on best-of-k records: {facts}.")
    verdict: Verdict = "better" if best.accuracy > best.chance else "worse"
    return Headline(verdict, f"{verdict.capitalize()} than chance on best-of-k records: {facts}.")


def votes_headline(result: VoteRun) -> Headline:
    """What people's votes say at any time, whoever looked at them how often. Needs a vote."""
    now = result.looks[-1]
    facts = (
        f"people prefer the tuned answers in {share(now.rate)} of {result.n} votes "
        f"({span(now)} whenever one looks; e-value {e_value_text(result.e_value)})"
    )
    if result.verdict == "cannot tell yet":
        more = (
            "an impractical number of votes" if result.needed is None else f"about {roughly(result.needed)} more votes"
        )
        return Headline("cannot tell yet", f"Cannot tell yet: {facts}; at this rate {more} would decide.")
    verdict: Verdict = "better" if result.verdict == "better" else "worse"
    return Headline(verdict, f"{verdict.capitalize()}: {facts}; decided at vote {result.decided_at}.")


def e_value_text(e_value: float) -> str:
    """An e-value for a reader."""
    return f"{e_value:.2f}" if e_value < 1000 else f"{e_value:.1e}"


def roughly(count: int) -> str:
    """A forecast of votes: no more than two digits of it are worth anything."""
    return f"{int(float(f'{count:.2g}')):,}"


def smallest_effect(n: int, detectable: float | None) -> str:
    """The effect that this many prompts would have shown with power 0.8, in points above one half."""
    prompts = f"n = {n} prompt{'' if n == 1 else 's'}"
    if detectable is None:
        return f"{prompts} {'is' if n == 1 else 'are'} too few to show any effect"
    return f"an effect smaller than {100 * (detectable - 0.5):.0f} points would not have been seen ({prompts})"


Result = Mapping[str, Any]


class Table(NamedTuple):
    """Rows of text under a header; `note` says what is read how. Numbers stand in all columns but the first."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


class SampleBlock(NamedTuple):
    """One prompt with its first answer before and after, and what the judges said of them."""

    prompt: str
    before: str
    after: str
    note: str


class Part(NamedTuple):
    """A heading with what stands under it."""

    title: str
    blocks: list[str | Table | Figure | SampleBlock]


class Document(NamedTuple):
    """`tiles` are the few numbers that matter: name, value, its interval."""

    title: str
    verdict: str
    sentence: str
    subtitle: str
    tiles: list[tuple[str, str, str]]
    sections: list[Part]


def decimal(value: float | None, sign: str = "") -> str:
    """Three significant places, or a dash."""
    return "–" if value is None else f"{value:{sign}.3f}"


def bounds(interval: Result | None, sign: str = "") -> str:
    """The bounds of an interval, or why there are none."""
    return "no interval" if interval is None else f"[{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def bounded(value: float | None, interval: Result | None, sign: str = "") -> str:
    """A number with its interval."""
    return decimal(value, sign) + (f" {bounds(interval, sign)}" if value is not None and interval is not None else "")


def percent(interval: Result | None) -> str:
    """The bounds of an interval of shares."""
    return "no interval" if interval is None else f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %"
