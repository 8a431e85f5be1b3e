"""What the registry knows of an objective besides its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

StepStatistics = tuple[mx.array, ...]
"""What an objective must know of all pairs of an optimizer step at once: vectors (B,), one entry for each pair."""

Family = Literal["difference", "separate", "ranked", "reference-free", "unpaired"]


@dataclass(frozen=True)
class Objective:
    """An objective: its function, its paper, and everything that tests, tables and the start of a run ask of it.

    title, paper, use  what tables say: its name, its arXiv id, and when to take it
    start            its value while policy and reference agree, as a function of its knobs; None where lengths or the
                     policy's own log-probs decide
    step_statistics  what it takes from all pairs of a step, None where each pair stands alone; `over` says from what:
                     their lengths, or log-probs, for which the step scores all its pairs once before it
                     differentiates; `entries`: how many vectors it takes
    opposite         its slopes by the two log-probs are opposite: it depends on their difference alone
    lifts            it pulls the chosen completion's likelihood up, or holds it: it counters falling chosen log-probs
    per_token        it compares means over tokens
    mismatched       it needs completions of other prompts (the KL term of KTO)
    reads_label      a row's probability stands in its formula; for others the loss is the expectation over the label
    reports          what it logs besides rewards and log-probs
    refuses          modifiers that make no sense for it, with the reason
    """

    function: Callable[..., mx.array]
    title: str
    paper: str
    family: Family
    start: Callable[..., float | None] | None
    use: str
    step_statistics: Callable[..., StepStatistics] | None = None
    entries: int = 1
    over: Literal["", "lengths", "log-probs"] = ""
    opposite: bool = False
    lifts: bool = False
    per_token: bool = False
    mismatched: bool = False
    reads_label: bool = False
    reports: Callable[[Any], dict[str, float]] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, pairs: Any, **knobs: Any) -> mx.array:
        """One loss per pair, (B,)."""
        return self.function(pairs, **knobs)

    def statistics_of(self, pairs: Any, knobs: Mapping[str, Any]) -> StepStatistics:
        """What it takes from all pairs of a step, under those of its knobs that decide it; () for nothing."""
        if self.step_statistics is None:
            return ()
        asked = inspect.signature(self.step_statistics).parameters
        return self.step_statistics(pairs, **{name: value for name, value in knobs.items() if name in asked})

    @property
    def knobs(self) -> tuple[str, ...]:
        """Names of the knobs it takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "step_statistics")

    @property
    def paired(self) -> bool:
        """Whether it reads pairs; else single completions with a thumb."""
        return self.family != "unpaired"

    @property
    def reference(self) -> bool:
        """Whether it reads the reference's log-probs."""
        return self.family != "reference-free"
