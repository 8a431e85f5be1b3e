"""The win rate of anybody's verdicts: `import mlxdpo_eval; mlxdpo_eval.winrate("annotations.json")`.

Needs NumPy and SciPy only. Rows that share a prompt are one cluster; a verdict that is missing is no loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxdpo_eval.annotations import Annotation, Row, Theirs, read_annotations
from mlxdpo_eval.metrics.intervals import Interval, cluster_bootstrap, clustered_mean, clustered_share
from mlxdpo_eval.metrics.judge_bias import Debiased, Longer, Position, debiased, position_bias, preference_for_longer
from mlxdpo_eval.metrics.length import Controlled, length_controlled
from mlxdpo_eval.metrics.sequential import anytime_interval, log_e_value, minimum_detectable


class PairwiseResult(NamedTuple):
    """Verdicts on a model's answers against a baseline's.

    `rows` count, of `prompts` prompts with a verdict; `left_out` were on prompts that the model was trained on.
    `invalid` ones have no verdict, by reason, and are left out: `worst` and
    `best` are the rate were they all losses or all wins. `rate` is wins + ties / 2 over valid verdicts (soft verdicts
    count as they are), `interval` Wilson's with an error clustered by prompt, `bootstrap` over resampled prompts.
    `cut_off` verdicts are on an answer that ended at its limit of tokens, where the file says so (lines, inspect);
    `complete` is the rate over the others. `subsets` are the rates of a benchmark's parts, where every row names its
    own, and `macro` their mean, each part counting the same whatever its size. `controlled` is the rate at equal
    length. `position` and `longer` are the judge's report card, where both orders or both answers are there. `e_value`
    is evidence against 1/2 from one outcome per prompt, `anytime` its interval.
    `corrected` is PPI++ with human verdicts. `theirs` is what the file's own harness says.
    """

    format: str
    rows: int
    left_out: int
    prompts: int
    wins: int
    ties: int
    losses: int
    invalid: dict[str, int]
    rate: float | None
    interval: Interval | None
    bootstrap: Interval | None
    worst: float | None
    best: float | None
    cut_off: int
    complete: Interval | None
    subsets: dict[str, Interval | None]
    macro: Interval | None
    controlled: Controlled | None
    position: Position | None
    longer: Longer | None
    e_value: float | None
    anytime: tuple[float, float] | None
    detectable: float | None
    corrected: Debiased | None
    theirs: Theirs | None


def winrate(
    source: str | Path | Iterable[Row],
    format: str = "auto",
    *,
    model: str | None = None,
    scorer: str | None = None,
    humans: Mapping[str, float] | None = None,
    trained_on: Collection[str] = (),
) -> PairwiseResult:
    """Everything that a file of verdicts says. `read_annotations` has the formats and raises `UserError`.

    `humans` maps prompts to human outcomes (1 for the model, 0 for the baseline, 1/2 a tie): where they are a sample of
    the prompts, the judge's rate is corrected by them (PPI++, arXiv 2311.01453). Verdicts on prompts in `trained_on`
    are left out and counted: a model may know their answers by heart.
    """
    read = read_annotations(source, format, model, scorer)
    rows = [row for row in read.rows if row.prompt not in trained_on]
    valid = [(row, row.outcome) for row in rows if row.outcome is not None]
    won = np.array([outcome for _, outcome in valid], np.float64)
    names = np.array([row.prompt for row, _ in valid])
    reasons = Counter(row.reason for row in rows if row.outcome is None)
    total = len(won) + reasons.total()
    by_prompt = _prompt_means(names.tolist(), won)
    evidence = float(sum(by_prompt.values())), float(len(by_prompt) - sum(by_prompt.values()))
    some = bool(len(won))
    parts = [row.subset for row, _ in valid]
    subsets, macro = macro_mean(won, parts, names) if some and None not in parts else ({}, None)
    ended = np.array([not row.cut_off for row, _ in valid], bool)
    lengths = [row.longer for row, _ in valid]
    longer = np.array(lengths, np.float64) if some and None not in lengths else None
    return PairwiseResult(
        format=read.format,
        rows=len(rows),
        left_out=len(read.rows) - len(rows),
        prompts=len(by_prompt),
        wins=int((won > 0.5).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won < 0.5).sum()),
        invalid=dict(sorted(reasons.items())),
        rate=float(won.mean()) if some else None,
        interval=clustered_share(won, names) if some else None,
        bootstrap=cluster_bootstrap(won.tolist(), names.tolist()) if some else None,
        worst=float(won.sum() / total) if total else None,
        best=float((won.sum() + reasons.total()) / total) if total else None,
        cut_off=int((~ended).sum()),
        complete=clustered_share(won[ended], names[ended]) if ended.any() else None,
        subsets=subsets,
        macro=macro,
        controlled=None if longer is None else length_controlled(won, longer, names),
        position=_position_of(rows),
        longer=None if longer is None else preference_for_longer(np.sign(won - 0.5).astype(int), longer, names),
        e_value=float(np.exp(min(700.0, log_e_value(*evidence)))) if some else None,
        anytime=anytime_interval(*evidence) if some else None,
        detectable=minimum_detectable(len(by_prompt)) if some else None,
        corrected=None if humans is None else _corrected(by_prompt, humans),
        theirs=read.theirs,
    )


def macro_mean(
    won: np.ndarray, parts: Sequence[Hashable], names: np.ndarray
) -> tuple[dict[str, Interval | None], Interval | None]:
    """The rate of each part, and the mean of the parts with a 95 % t interval clustered by prompt.

    The mean is linear in the rows, so its standard error is that of the rows' influences, a prompt in several parts
    being one cluster. None for fewer than two parts.
    """
    at = {str(part): np.array([p == part for p in parts]) for part in dict.fromkeys(parts)}
    shares = {part: clustered_share(won[rows], names[rows]) for part, rows in at.items()}
    if len(at) < 2:
        return shares, None
    influence, mean = np.zeros(len(won)), float(np.mean([won[rows].mean() for rows in at.values()]))
    for rows in at.values():
        influence[rows] = (won[rows] - won[rows].mean()) * len(won) / (len(at) * rows.sum())
    found = clustered_mean(influence, names)
    return shares, None if found is None else Interval(mean, mean + found.low, mean + found.high, found.clusters)


def _prompt_means(names: list[str], won: np.ndarray) -> dict[str, float]:
    outcomes: dict[str, list[float]] = {}
    for name, outcome in zip(names, won.tolist(), strict=True):
        outcomes.setdefault(name, []).append(outcome)
    return {name: float(np.mean(values)) for name, values in outcomes.items()}


def _position_of(rows: list[Annotation]) -> Position | None:
    """Outcomes as signs: 1 for the model, -1 for the baseline."""
    asked = [(2 * row.orders[0] - 1, 2 * row.orders[1] - 1, row.prompt) for row in rows if row.orders is not None]
    if not asked:
        return None
    first, second, prompts = zip(*asked, strict=True)
    return position_bias(first, second, prompts)


def _corrected(judged: Mapping[str, float], humans: Mapping[str, float]) -> Debiased | None:
    both = [prompt for prompt in judged if prompt in humans]
    alone = [prompt for prompt in judged if prompt not in humans]
    if not both or not alone:
        return None
    return debiased([humans[p] for p in both], [judged[p] for p in both], [judged[p] for p in alone], both, alone)
