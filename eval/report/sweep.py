"""The page of a sweep: which setting is best, which are indistinguishable, curves, and reward against KL."""

from __future__ import annotations

from pathlib import Path

from mlxdpo.inner import write_json, write_text
from mlxdpo_eval.metrics.frontier import Point, pareto_front
from mlxdpo_eval.metrics.intervals import Interval
from mlxdpo_eval.report.blocks import Document, Part, Table, bounded, bounds, decimal
from mlxdpo_eval.report.plots import Figure, heldout_curves, reward_over_drift
from mlxdpo_eval.report.write import html_page, markdown_page
from mlxdpo_eval.results import to_json
from mlxdpo_eval.sweep import RULE, ending
from mlxdpo_eval.sweep_results import CandidateResult, SweepResults, not_told_apart, sweep_results, sweep_sentence

POOLED = (
    "Intervals are 95 %, for new prompts and, with several seeds, new seeds (clustered by prompt plus by seed). With "
    "two seeds they are too narrow where seeds differ; use three or more. With one seed they hold for the trained "
    "models as they are."
)
CHOSEN = (
    "The held-out pairs chose the best setting, so its figure is optimistic. Evaluate it on unseen pairs: "
    "mlxdpo eval RUN --data OTHER."
)


def write_sweep(folder: Path) -> SweepResults:
    """Write results.json, report.html and report.md of a sweep, from its files alone."""
    found = sweep_results(folder)
    document = _sweep_document(found)
    write_json(folder / "results.json", to_json(found._asdict() | {"sentence": sweep_sentence(found)}))
    write_text(folder / "report.md", markdown_page(document))
    write_text(folder / "report.html", html_page(document))
    return found


SWEEP_COLUMNS = ("setting", "seeds", "held-out", "each seed", "KL, nats an answer", "rate", "outcome")


def sweep_cells(found: SweepResults) -> list[tuple[str, ...]]:
    """A line for each setting, for `SWEEP_COLUMNS`."""
    same = not_told_apart(found)
    return [_sweep_row(c, found, same) for c in found.candidates]


def _sweep_row(c: CandidateResult, found: SweepResults, same: list[str]) -> tuple[str, ...]:
    words = "best" if c.name == found.best else "indistinguishable from the best" if c.name in same else ""
    others = [ending(record) for record in c.endings if record["state"] != "finished"]
    if not words and not others:
        words = "significantly worse" if c.seeds else "not trained yet"
    rates = ", ".join(dict.fromkeys(f"{rate:g}" if isinstance(rate, float) else str(rate) for rate in c.lr))
    return (
        c.name,
        str(c.seeds),
        bounded(c.mean, _interval_fields(c.interval)),
        ", ".join(map(decimal, c.by_seed)) or "–",
        bounded(c.kl, _interval_fields(c.kl_interval)),
        rates or "–",
        "; ".join(filter(None, (words, *others))),
    )


def _interval_fields(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _sweep_document(found: SweepResults) -> Document:
    best = next((c for c in found.candidates if c.name == found.best), None)
    same, several = not_told_apart(found), len(found.candidates) > 1
    verdict = "better" if best is not None and not same and several else "cannot tell yet"
    axes = "; ".join(f"{name} {', '.join(values)}" for name, values in found.settings.items()) or "the recipe alone"
    tiles = (
        []
        if best is None
        else [(f"held-out {found.measure}", decimal(best.mean), bounds(_interval_fields(best.interval)))]
    )
    if best is not None and best.kl is not None:
        tiles.append(("KL to the reference", f"{best.kl:.2f} nats", bounds(_interval_fields(best.kl_interval))))
    curves = heldout_curves({c.name: c.curve for c in found.candidates}, found.best, found.measure)
    sections = [
        Part("Settings side by side", [Table(SWEEP_COLUMNS, sweep_cells(found), f"{POOLED} {CHOSEN}")]),
        Part("Which differ significantly", [_pairs_table(found)]),
        Part("Held-out curves", [curves]),
        Part("Held-out reward against KL", [*_frontier_of(found)]),
        Part("How runs are stopped", [RULE, _why_measure(found)]),
    ]
    seeds = f"{found.seeds} seed{'s' * (found.seeds > 1)} each"
    return Document(found.name, verdict, sweep_sentence(found), f"{axes}; {seeds}", tiles, sections)


def _why_measure(found: SweepResults) -> str:
    if found.measure == "loss":
        return "Runs share their objective and are compared by held-out loss."
    return (
        "Runs differ in their objective, whose losses have different scales, and are compared by held-out accuracy: "
        "the share of pairs in which chosen gained more over the reference than rejected."
    )


def _pairs_table(found: SweepResults) -> str | Table:
    if not found.pairs:
        return "No two settings have finished a common seed."
    rows = [
        (f"{p.first} against {p.second}", bounded(p.difference, _interval_fields(p.interval), "+"), p.verdict)
        for p in found.pairs
    ]
    note = (
        f"Difference in held-out {found.measure}, pair by pair on common seeds; positive: the first is better. "
        f"Intervals of {100 * found.level:.1f} % each, so that all {len(rows)} hold at once with 95 % (Bonferroni)."
    )
    return Table(("settings", "difference", "verdict"), rows, note)


def _frontier_of(found: SweepResults) -> list[str | Figure]:
    sign = 1 if found.measure == "accuracy" else -1
    points = []
    for c in found.candidates:
        if c.mean is not None and c.kl is not None:
            i = c.interval
            reward = i if i is None or sign == 1 else Interval(-i.estimate, -i.high, -i.low, i.clusters)
            points.append(Point(c.name, c.kl, sign * c.mean, c.kl_interval, reward))
    if not points:
        return ["KL was not measured (--answers 0, or a stage without answers)."]
    best, label = pareto_front(points), "held-out accuracy" if sign == 1 else "held-out loss, negated"
    note = (
        f"No other setting has as little KL and as good a held-out {found.measure}: {', '.join(p.name for p in best)}."
    )
    return [note, reward_over_drift(points, best, label, 0.5 if sign == 1 else None)]
