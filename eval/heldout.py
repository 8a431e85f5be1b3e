"""What the run says about pairs it never saw: rewards, lengths, calibration, slices; and about best-of-k records.

Of records: how often is the best score a right completion's? A record's completions are scored once each, through its
pairs of right and wrong ones; the reward is log pi - log ref, as RewardBench scores a DPO model (without beta, which
moves no maximum).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import Preference
from mlxdpo.inner import BestOfK, PairLogps, TrainedRun, prompt_name, prompt_text
from mlxdpo_eval.metrics.best_of_k import BestOf, Ties, best_of, first_is_right, ties_score
from mlxdpo_eval.metrics.calibration import Calibration, calibration_report
from mlxdpo_eval.metrics.length import LengthReport, length_report
from mlxdpo_eval.metrics.rewards import RewardReport, margins, outcomes, reward_report
from mlxdpo_eval.metrics.sequential import minimum_detectable
from mlxdpo_eval.metrics.slices import Slices, slice_report

TIED = "Ties"  # RewardBench 2's subset with several right answers, scored by its own rule


class RecordPairs(NamedTuple):
    """The pairs of all records; `indices` of each pair are (record, right completion, wrong completion).

    `first` is the first pair of each record.
    """

    rows: list[Preference]
    indices: list[tuple[int, int, int]]
    first: list[Preference]


class BestOfKReport(NamedTuple):
    """`best` over all scored records; `longest` the control that scores tokens; `sizes` counts records by k.

    `left_out` records have a completion that could not be scored; in `tied` ones all score alike. `ties` is RewardBench
    2's score of its subset of that name, None without it.
    """

    best: BestOf
    longest: BestOf
    sizes: dict[str, int]
    left_out: int
    tied: int
    slices: dict[str, Slices]
    ties: Ties | None


def pair_records(records: Sequence[BestOfK]) -> RecordPairs:
    """Every right completion against every wrong one of its record."""
    found = [((r, i, j), pair) for r, record in enumerate(records) for i, j, pair in record.pairs()]
    first = [pair for (r, i, j), pair in found if (i, j) == (0, records[r].right)]
    return RecordPairs([pair for _, pair in found], [index for index, _ in found], first)


def best_of_k_report(
    records: Sequence[BestOfK],
    paired: RecordPairs,
    rows: Sequence[Preference],
    logps: PairLogps,
    columns: Mapping[str, Sequence[Hashable]],
) -> BestOfKReport | None:
    """Best-of-k over the records whose completions were all scored.

    `rows` and `logps` are the scored pairs, one for one; `columns` are metadata, one entry per record.
    None when no record is whole.
    """
    rewards, lengths = _completion_rewards(records, paired, rows, logps)
    whole = [r for r in range(len(records)) if np.isfinite(rewards[r]).all()]
    if not whole:
        return None
    prompts = [prompt_name(records[r].prompt) for r in whole]
    right = [records[r].right for r in whole]
    outcomes = [first_is_right(rewards[r], records[r].right) for r in whole]
    sizes = [f"{len(records[r].completions)}" for r in whole]
    return BestOfKReport(
        best_of([rewards[r].tolist() for r in whole], right, prompts),
        best_of([lengths[r].tolist() for r in whole], right, prompts),
        {k: sizes.count(k) for k in sorted(set(sizes), key=int)},
        len(records) - len(whole),
        sum(float(np.ptp(rewards[r])) == 0.0 for r in whole),
        {name: slice_report(outcomes, [column[r] for r in whole], prompts) for name, column in columns.items()},
        _ties_report([(records[r], rewards[r]) for r in whole]),
    )


def _completion_rewards(
    records: Sequence[BestOfK], paired: RecordPairs, rows: Sequence[Preference], logps: PairLogps
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per record the reward and the tokens of each completion; NaN where it was in no scored pair."""
    index_of = {id(row): index for row, index in zip(paired.rows, paired.indices, strict=True)}
    rewards, lengths = ([np.full(len(record.completions), np.nan) for record in records] for _ in range(2))
    for n, row in enumerate(rows):
        r, right, wrong = index_of[id(row)]
        rewards[r][right], lengths[r][right] = logps.chosen[n] - logps.ref_chosen[n], logps.chosen_len[n]
        rewards[r][wrong], lengths[r][wrong] = logps.rejected[n] - logps.ref_rejected[n], logps.rejected_len[n]
    return rewards, lengths


def _ties_report(scored: Sequence[tuple[BestOfK, np.ndarray]]) -> Ties | None:
    """RewardBench 2 names a tied question "tied:7" and its version with one right answer "ref:7"."""
    kinds: dict[str, dict[str, tuple[Any, int]]] = {"tied": {}, "ref": {}}
    for record, rewards in scored:
        kind, _, number = str(record.columns.get("id", "")).partition(":")
        if record.columns.get("subset") == TIED and kind in kinds:
            kinds[kind][number] = (rewards.tolist(), record.right)
    shared = sorted(kinds["tied"].keys() & kinds["ref"].keys())
    if not any(kinds["tied"][n][1] > 1 for n in shared):
        return None
    return ties_score([kinds["tied"][n] for n in shared], [kinds["ref"][n] for n in shared])


class Heldout(NamedTuple):
    """Every number about held-out pairs. `detectable` is the accuracy that this many prompts show with power 0.8."""

    prompts: int
    rewards: RewardReport
    length: LengthReport
    calibration: Calibration
    slices: dict[str, Slices]
    detectable: float | None


def heldout_report(
    opened: TrainedRun, rows: Sequence[Preference], logps: PairLogps, columns: Mapping[str, Sequence[Hashable]]
) -> Heldout:
    """All metrics of scored pairs, sliced by `columns` (one entry per pair). Raises `ValueError` for none."""
    beta, names = opened.config.loss.beta, np.array([prompt_name(row.prompt) for row in rows])
    d = margins(logps, beta)
    prompts = len(set(names.tolist()))
    return Heldout(
        prompts,
        reward_report(logps, names, beta),
        length_report(d, logps.chosen_len, logps.rejected_len, names),
        calibration_report(d, names),
        {name: slice_report(outcomes(d), column, names) for name, column in columns.items()},
        minimum_detectable(prompts),
    )


def pair_lines(opened: TrainedRun, rows: Sequence[Preference], logps: PairLogps) -> list[dict[str, Any]]:
    """One line per pair with everything its metrics come from."""
    lines = []
    for i, row in enumerate(rows):
        values = {name: float(getattr(logps, name)[i]) for name in logps._fields}
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
