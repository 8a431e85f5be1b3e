"""Two evaluated runs side by side: paired by prompt and pair, with what flipped. A regression is a finding, not a mood.

The second run is held against the first. A measure got worse when the whole interval of its paired change lies below
0; that is what the exit status of `mlxdpo compare` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxdpo import UserError
from mlxdpo.inner import as_written, read_json, read_lines
from mlxdpo_eval.metrics.intervals import Interval, paired_difference
from mlxdpo_eval.metrics.rewards import mcnemar

if TYPE_CHECKING:
    from mlxdpo import Run  # it loads MLX


class MeasureChange(NamedTuple):
    """One measure on the items that both runs have; an outcome is right (1), a tie (1/2) or wrong (0).

    `gained` items have the better outcome in the second run, `lost` ones in the first; `p` is the sign test's, which is
    McNemar's exact one where nothing is a tie. `verdict` is "better", "worse" or "cannot tell yet", from the paired
    interval clustered by prompt.
    """

    measure: str
    items: int
    first: float
    second: float
    change: float
    interval: Interval | None
    gained: int
    lost: int
    p: float
    verdict: str


class Comparison(NamedTuple):
    """All measures; `flips` lists items whose outcome changed; `only` counts items without a partner."""

    changes: list[MeasureChange]
    flips: list[dict[str, Any]]
    only: dict[str, int]
    same_start: bool

    @property
    def regressed(self) -> list[str]:
        """Names of the measures that got worse."""
        return [change.measure for change in self.changes if change.verdict == "worse"]


def compare_runs(first: Run, second: Run, level: float = 0.95) -> Comparison:
    """Hold the second run against the first, with intervals of `level`.

    Raises `UserError` when one is not evaluated or they share nothing.
    """
    with as_written(first.path / "eval", f"run `mlxdpo eval` on {first.path} and {second.path} again"):
        return _compare_files(first, second, level)


def compare_with_first(runs: Sequence[Run]) -> tuple[list[Comparison], float]:
    """Each further run against the first, and the level of their intervals: 95 % for all of a measure at once.

    Bonferroni over the runs that are compared. Raises `UserError` as `compare_runs`.
    """
    level = 1 - 0.05 / (len(runs) - 1)
    return [compare_runs(runs[0], run, level) for run in runs[1:]], level


def _compare_files(first: Run, second: Run, level: float) -> Comparison:
    pairs = [_keyed(run, "eval_pairs.jsonl", ("pair_id",)) for run in (first, second)]
    samples = [_keyed(run, "eval_samples.jsonl", ("prompt_id", "sample")) for run in (first, second)]
    pair_keys, sample_keys = (sorted(a.keys() & b.keys()) for a, b in (pairs, samples))
    if not pair_keys and not sample_keys:
        raise UserError(f"{first.path} and {second.path} were evaluated on different data; give both the same --data")
    if sample_keys:
        check_same_sampling(first, second)
    changes, flips = [], []
    if pair_keys:
        outcomes = [[_sign(side[key]["margin"]) for key in pair_keys] for side in pairs]
        changes.append(
            _paired_measure("held-out accuracy", outcomes, [pairs[0][key]["prompt_id"] for key in pair_keys], level)
        )
        flips += _flips("held-out accuracy", outcomes, [pairs[0][key] for key in pair_keys])
    for judge in _judges(samples):
        usable = [key for key in sample_keys if all(_logit(side[key], judge) is not None for side in samples)]
        if usable:
            outcomes = [[_sign(_logit(side[key], judge)) for key in usable] for side in samples]
            changes.append(_paired_measure(f"win-rate, {judge}", outcomes, [key[0] for key in usable], level))
            flips += _flips(f"win-rate, {judge}", outcomes, [samples[1][key] for key in usable])
    only = {
        "pairs": len(pairs[0].keys() ^ pairs[1].keys()),
        "answers": len(samples[0].keys() ^ samples[1].keys()),
    }
    starts = [run.manifest()["reference"]["digest"] for run in (first, second)]
    return Comparison(changes, flips, only, starts[0] == starts[1])


def check_same_sampling(first: Run, second: Run) -> None:
    """Raise `UserError` when the two runs' answers were drawn differently: they would differ by that alone."""
    settings = [latest_results(run)["settings"] for run in (first, second)]
    for name in ("max_tokens", "temperature", "seed"):
        a, b = (s[name] for s in settings)
        if a != b:
            raise UserError(
                f"{first.path} and {second.path} were evaluated with {name} {a} and {b}; use the same value for both"
            )


def _keyed(run: Run, name: str, fields: Sequence[str]) -> dict[tuple, dict[str, Any]]:
    file = run.path / "eval" / name
    if not file.exists():
        raise UserError(f"{run.path} has no evaluation; run `mlxdpo eval {run.path}` first")
    with as_written(file, f"run `mlxdpo eval {run.path}` again"):
        return {tuple(line[field] for field in fields): line for line in read_lines(file)}


def _judges(samples: Sequence[Mapping[tuple, Mapping[str, Any]]]) -> list[str]:
    """Judges that both runs were seen by, in the order of the first."""
    named = [dict.fromkeys(judge for line in side.values() for judge in line["verdicts"]) for side in samples]
    return [judge for judge in named[0] if judge in named[1]]


def _logit(line: Mapping[str, Any], judge: str) -> float | None:
    return line["verdicts"].get(judge, {}).get("logit")


def _sign(value: float | None) -> float:
    return 0.5 * (1 + np.sign(value or 0.0))


def _paired_measure(measure: str, outcomes: list[list[float]], prompts: list[str], level: float) -> MeasureChange:
    first, second = (np.array(side) for side in outcomes)
    gained, lost = int((second > first).sum()), int((second < first).sum())
    interval = paired_difference(first.tolist(), second.tolist(), prompts, level=level)
    verdict = "cannot tell yet"
    if interval is not None and not interval.low <= 0 <= interval.high:
        verdict = "better" if interval.estimate > 0 else "worse"
    return MeasureChange(
        measure,
        len(first),
        float(first.mean()),
        float(second.mean()),
        float((second - first).mean()),
        interval,
        gained,
        lost,
        mcnemar(gained, lost),
        verdict,
    )


def _flips(measure: str, outcomes: list[list[float]], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = ("where", "prompt_id", "sample", "prompt")
    return [
        {"measure": measure, "flip": "gained" if new > old else "lost"} | {k: line[k] for k in kept if k in line}
        for old, new, line in zip(*outcomes, lines, strict=True)
        if old != new
    ]


def comparison_sentence(comparison: Comparison) -> str:
    """The verdict in words."""
    worse = comparison.regressed
    better = [change.measure for change in comparison.changes if change.verdict == "better"]
    if worse:
        return f"Worse: {', '.join(worse)}" + (f"; better: {', '.join(better)}" if better else "") + "."
    if better:
        return f"Better: {', '.join(better)}; nothing got worse."
    counts = ", ".join(f"{change.measure} n = {change.items}" for change in comparison.changes)
    if not any(change.gained or change.lost for change in comparison.changes):
        return f"No difference shown ({counts})."
    half = [_detectable_change(change) for change in comparison.changes if change.interval is not None]
    seen = f"; the smallest change these n can show is about {100 * min(half):.1f} points" if half else ""
    return f"Cannot tell yet: {counts}{seen}."


def _detectable_change(change: MeasureChange) -> float:
    """Half the interval times (1.96 + 0.84) / 1.96: the change seen with power 0.8."""
    assert change.interval is not None
    return (change.interval.high - change.interval.low) / 2 * 2.8 / 1.96


def latest_results(run: Run) -> dict[str, Any]:
    """The newest results file. Raises `UserError` when there is none."""
    files = sorted((run.path / "eval").glob("results_*.json"))
    if not files:
        raise UserError(f"{run.path} has no evaluation; run `mlxdpo eval {run.path}` first")
    return read_json(files[-1])
