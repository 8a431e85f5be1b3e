"""What a sweep showed: each setting's held-out figures pooled over its seeds, and which of them can be told apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo_eval.metrics.intervals import Interval
from mlxdpo_eval.metrics.seeds import pooled_mean, pooled_share
from mlxdpo_eval.sweep import HeldoutValues, evaluations, read_sweep, run_name


class CandidateResult(NamedTuple):
    """One setting. `mean` is its held-out measure over `seeds` finished seeds, `by_seed` each one's; `kl` is on its own
    answers to held-out prompts, nats a sequence. `curve` is (share of steps, measure) of all runs, means over seeds."""

    name: str
    seeds: int
    mean: float | None
    interval: Interval | None
    by_seed: list[float]
    kl: float | None
    kl_interval: Interval | None
    curve: list[tuple[float, float]]
    endings: list[Mapping[str, Any]]
    lr: list[Any]


class PairResult(NamedTuple):
    """Two settings on the seeds that both finished: `first` - `second`, positive where the first is better."""

    first: str
    second: str
    difference: float
    interval: Interval | None
    verdict: str


class SweepResults(NamedTuple):
    """`best` finished every seed with the best mean; `level` is of the intervals of `pairs`, 95 % for all at once."""

    name: str
    settings: Mapping[str, Sequence[str]]
    measure: str
    seeds: int
    candidates: list[CandidateResult]
    pairs: list[PairResult]
    level: float
    best: str | None


Items = dict[int, tuple[list[str], list[float]]]
"""Of a setting: seed -> prompts and values of its held-out pairs at the end."""


def sweep_results(folder: Path) -> SweepResults:
    """From the files of a sweep alone, finished or not. Raises `UserError` where they are missing or damaged."""
    found = read_sweep(folder)
    names, measure, seeds = list(found["configs"]), found["measure"], found["seeds"]
    items: dict[str, Items] = {name: {} for name in names}
    candidates = [_candidate(folder, found, name, items[name]) for name in names]
    compared = [pair for pair in itertools.combinations(names, 2) if items[pair[0]].keys() & items[pair[1]].keys()]
    level = 1 - 0.05 / max(1, len(compared))
    sign = 1 if measure == "accuracy" else -1
    pairs = [_compare_settings(a, b, items, sign, level) for a, b in compared]
    whole = [c for c in candidates if c.seeds == seeds and c.mean is not None]
    best = max(whole, key=lambda c: sign * (c.mean or 0.0), default=None)
    return SweepResults(
        folder.name, found["settings"], measure, seeds, candidates, pairs, level, best.name if best else None
    )


def _candidate(folder: Path, found: Mapping[str, Any], name: str, items: Items) -> CandidateResult:
    """Its figures; fills `items`."""
    curves, endings = [], []
    nats: tuple[list[float], list[str], list[int]] = ([], [], [])
    for seed in range(found["seeds"]):
        record = found["runs"].get(run_name(name, seed))
        if record is None:
            continue
        endings.append(record)
        prompts, seen = evaluations(folder / run_name(name, seed), found["measure"])
        curves.append(seen)
        if record["state"] == "finished":
            items[seed] = (prompts, seen[-1].values)
            drift = record.get("drift") or {"nats": [], "prompts": []}
            seeds: list[Any] = [seed] * len(drift["nats"])
            for column, values in zip(nats, (drift["nats"], drift["prompts"], seeds), strict=True):
                column.extend(values)
    by_seed = [float(np.mean(values)) for _, values in items.values()]
    flat = [(v, p, seed) for seed, (prompts, values) in items.items() for p, v in zip(prompts, values, strict=True)]
    columns: Any = list(map(list, zip(*flat, strict=True))) or [[], [], []]
    return CandidateResult(
        name,
        len(items),
        float(np.mean(columns[0])) if flat else None,
        _pooled(found["measure"])(*columns) if flat else None,
        by_seed,
        float(np.mean(nats[0])) if nats[0] else None,
        pooled_mean(*nats) if nats[0] else None,
        _mean_curve(curves),
        endings,
        [record["lr"] for record in endings if "lr" in record],
    )


def _pooled(measure: str) -> Any:
    return pooled_share if measure == "accuracy" else pooled_mean


def _mean_curve(curves: Sequence[Sequence[HeldoutValues]]) -> list[tuple[float, float]]:
    at: dict[float, list[float]] = {}
    for evaluation in itertools.chain.from_iterable(curves):
        at.setdefault(round(evaluation.share, 6), []).append(float(np.mean(evaluation.values)))
    return [(share, float(np.mean(at[share]))) for share in sorted(at)]


def _compare_settings(first: str, second: str, items: Mapping[str, Items], sign: int, level: float) -> PairResult:
    differences, prompts, seeds = [], [], []
    for seed in sorted(items[first].keys() & items[second].keys()):
        names, own = items[first][seed]
        differences += [sign * (a - b) for a, b in zip(own, items[second][seed][1], strict=True)]
        prompts += names
        seeds += [seed] * len(names)
    interval = pooled_mean(differences, prompts, seeds, level)
    verdict = "are indistinguishable"
    if interval is not None and not interval.low <= 0 <= interval.high:
        verdict = f"{first if interval.estimate > 0 else second} is better"
    return PairResult(first, second, float(np.mean(differences)), interval, verdict)


def not_told_apart(results: SweepResults) -> list[str]:
    """The settings that are indistinguishable from the best one."""
    sides = [(pair.first, pair.second) for pair in results.pairs if pair.verdict == "are indistinguishable"]
    return [other for a, b in sides for this, other in ((a, b), (b, a)) if this == results.best]


def sweep_sentence(results: SweepResults) -> str:
    """What came out, in a sentence."""
    best = next((c for c in results.candidates if c.name == results.best), None)
    if best is None or best.mean is None:
        return "Cannot tell yet: no setting has finished all its seeds."
    bounds = "" if best.interval is None else f" [{best.interval.low:.3f}, {best.interval.high:.3f}]"
    figure = f"held-out {results.measure} {best.mean:.3f}{bounds}, {results.seeds} seed{'s' * (results.seeds > 1)}"
    same = not_told_apart(results)
    if same:
        return f"Cannot tell yet: {best.name} has the best {figure}; indistinguishable from it: {', '.join(same)}."
    if len(results.candidates) == 1:
        return f"{best.name}: {figure}."
    return f"Better: {best.name}, {figure}; every other setting is significantly worse, was stopped, or diverged."
