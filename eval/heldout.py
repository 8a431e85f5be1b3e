"""What the run says about pairs it never saw: rewards, lengths, calibration, slices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import Opened, PairLogps, Preference, prompt_name, prompt_text

from .calibration import Calibration, calibration
from .length import LengthReport, length_report
from .rewards import PairScores, RewardReport, margins, outcomes, reward_report
from .sequential import minimum_detectable
from .slices import Slices, slice_report


class Heldout(NamedTuple):
    """Every number about held-out pairs. `detectable` is the accuracy that this many prompts show with power 0.8."""

    prompts: int
    rewards: RewardReport
    length: LengthReport
    calibration: Calibration
    slices: dict[str, Slices]
    detectable: float | None


def heldout(
    opened: Opened, rows: Sequence[Preference], logps: PairLogps, columns: Mapping[str, Sequence[Hashable]]
) -> Heldout:
    """All metrics of scored pairs, sliced by `columns` (one entry per pair). Raises `ValueError` for none."""
    beta, names = opened.config.loss.beta, np.array([prompt_name(row.prompt) for row in rows])
    scores = PairScores(*logps, names)
    d = margins(scores, beta)
    prompts = len(set(names.tolist()))
    return Heldout(
        prompts,
        reward_report(scores, beta),
        length_report(d, scores.chosen_len, scores.rejected_len, names),
        calibration(d, names),
        {name: slice_report(outcomes(d), column, names) for name, column in columns.items()},
        minimum_detectable(prompts),
    )


def pair_lines(opened: Opened, rows: Sequence[Preference], logps: PairLogps) -> list[dict[str, Any]]:
    """One line per pair with everything its metrics come from."""
    fields = [name for name in logps._fields]
    lines = []
    for i, row in enumerate(rows):
        values = {name: float(getattr(logps, name)[i]) for name in fields}
        gained = (values["chosen"] - values["ref_chosen"]) - (values["rejected"] - values["ref_rejected"])
        lines.append(
            {
                "where": row.where,
                "prompt_id": prompt_name(row.prompt),
                "pair_id": prompt_name(
                    f"{prompt_text(row.prompt)}\n{answer_text(row.chosen)}\n{answer_text(row.rejected)}"
                ),
                "prompt": prompt_text(row.prompt),
                **values,
                "margin": opened.config.loss.beta * gained,
            }
        )
    return lines


def answer_text(answer: Any) -> str:
    """An answer for a reader."""
    return answer if isinstance(answer, str) else "\n".join(turn.content for turn in answer)
