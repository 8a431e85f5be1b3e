"""Answers before and after as a report shows them: three at the top, more further down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxdpo_eval.report.blocks import SampleBlock

Result = Mapping[str, Any]
AT_THE_TOP, SHOWN = 3, 8  # the first ones, not the best ones


def three_samples(samples: Sequence[Result]) -> tuple[str, list[SampleBlock]]:
    """Which answers they are, and the first three that training changed, in the order of the data."""
    first = [line for line in samples if line["sample"] == 0]
    changed = [line for line in first if line["before"] != line["after"]]
    if not changed:
        return f"The first answers to all {len(first)} prompts are the same word for word.", []
    told = (
        f"The first of {len(changed)} prompts with another answer, in the order of the data, not a selection; "
        f"{len(first) - len(changed)} of {len(first)} prompts have the same answer as before."
    )
    return told, [_sample_block(line) for line in changed[:AT_THE_TOP]]


def more_samples(samples: Sequence[Result]) -> list[Any]:
    """The first prompts in the order of the data, without those at the top."""
    first = [line for line in samples if line["sample"] == 0]
    above = [line for line in first if line["before"] != line["after"]][:AT_THE_TOP]
    shown = [line for line in first if line not in above][: SHOWN - len(above)]
    told = "The first prompts in the order of the data that are not at the top; the same noise before and after."
    return [told, *map(_sample_block, shown)] if shown else ["All samples are at the top."]


def _sample_block(line: Result) -> SampleBlock:
    note = ", ".join(f"{name}: {_verdict_word(v)}" for name, v in line["verdicts"].items())
    return SampleBlock(line["prompt"], line["before"], line["after"], note)


def _verdict_word(verdict: Result) -> str:
    if verdict["logit"] is None:
        return f"no verdict ({verdict['reason']})"
    return (
        "same" if verdict["equal"] else "after" if verdict["logit"] > 0 else "before" if verdict["logit"] < 0 else "tie"
    )
