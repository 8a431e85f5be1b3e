"""The figure, the table and the generated part of docs/evidence/frontier.md, from the points alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frontier.areas import Cloud, Gap, Start, clouds, crossed, gap, hull, start_of
from benchmarks.frontier.best_of_n import kl_bound, selection
from benchmarks.frontier.plan import METHODS, Budget
from benchmarks.frontier.points import UNTUNED
from benchmarks.frontier.runs import JUDGE, SECOND
from mlxdpo_eval.metrics.frontier import Point
from mlxdpo_eval.metrics.intervals import Interval

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
PAGE, FIGURE = EVIDENCE / "frontier.md", EVIDENCE / "frontier.svg"
BEGIN, END = "<!-- generated: frontier begin -->", "<!-- generated: frontier end -->"
COLOURS = {
    "dpo": "#0b6e4f", "ipo": "#5aa469", "kto": "#8a6d3b", "preferred": "#5b6c8f", "ppo": "#d17a22", "rloo": "#b5323e",
    "shuffled": "#888888", "best of n": "#2f4858",
}  # fmt: skip
Lines = Sequence[Mapping[str, Any]]
LEAST = 0.05  # nats: below it there is no common drift worth a comparison
HEAD = ("method", "beta or KL cost", "runs", "KL, nats", "VADER", "change", "TextBlob, change", "tokens", "repeats")


class Row(NamedTuple):
    """An arm's last checkpoint, over its seeds."""

    method: str
    strength: float
    seeds: int
    kl: float
    reward: float
    change: Interval
    second: Interval
    tokens: float
    repetition: float


def rows(lines: Lines) -> list[Row]:
    """One for each method and strength: its last checkpoint, changes against the untuned model on the same openings."""
    start, found = start_of(lines, SECOND), []
    arms: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line["method"] != UNTUNED:
            own = arms.setdefault((line["method"], line["strength"]), {})
            if line["seed"] not in own or own[line["seed"]]["step"] < line["step"]:
                own[line["seed"]] = line
    for (method, strength), own in arms.items():
        last = [own[seed] for seed in sorted(own)]
        mean = {key: np.array([np.mean(line[key], axis=0) for line in last]) for key in (JUDGE, SECOND, "kl")}
        changes = [crossed(mean[judge] - before) for judge, before in ((JUDGE, start.reward), (SECOND, start.second))]
        plain = [float(np.mean([line[key] for line in last])) for key in ("tokens", "repetition")]
        found.append(
            Row(method, strength, len(last), float(mean["kl"].mean()), float(mean[JUDGE].mean()), *changes, *plain)
        )
    return found


class Best(NamedTuple):
    """Best of n by the first judge: its KL's upper bound and both judges' rewards, (P,) each."""

    n: int
    bound: float
    reward: np.ndarray
    second: np.ndarray


def best_of(lines: Lines) -> list[Best]:
    """Best of 2, 4, ... of the untuned model's continuations, averaged over all subsets of them."""
    own = sorted((line for line in lines if line["method"] == UNTUNED), key=lambda line: line["number"])
    first, second = (np.array([line[judge] for line in own]).T for judge in (JUDGE, SECOND))  # (P, N)
    result, n = [], 2
    while n <= len(own):
        chance = np.array([selection(of_opening, n) for of_opening in first])
        result.append(Best(n, kl_bound(n), (chance * first).sum(axis=1), (chance * second).sum(axis=1)))
        n *= 2
    return result


def markdown(lines: Lines, budget: Budget) -> str:
    """What stands between the markers: verdict, figure, table, controls."""
    start, table = start_of(lines, SECOND), rows(lines)
    body = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    body += [_untuned(start)] + [_row(row) for row in table]
    body += [_best_row(best, start) for best in best_of(lines)]
    amount = (
        f"Seeds: {len(budget.seeds)}. Held-out openings: {budget.openings}, continuations of each at a checkpoint: "
        f"{budget.samples}. Steps of 8 pairs: {budget.steps}; batches of 32 own continuations: {budget.rounds}."
    )
    return "\n\n".join(
        [
            verdict(lines),
            "![reward against sequence KL](frontier.svg)",
            amount + " Changes are against the untuned model on the same openings; intervals are 95 %, resampling "
            "openings and seeds.",
            "\n".join(body),
        ]
    )


def _untuned(start: Start) -> str:
    return f"| untuned | - | - | 0 | {start.reward.mean():.3f} | - | - | - | - |"


def _best_row(best: Best, start: Start) -> str:
    changes = (best.reward - start.reward, best.second - start.second)
    first, second = (_interval(crossed(change[None])) for change in changes)
    return f"| best of {best.n} | - | - | ≤ {best.bound:.2f} | {best.reward.mean():.3f} | {first} | {second} | - | - |"


def _row(row: Row) -> str:
    cells = (
        METHODS[row.method].title,
        f"{row.strength:g}" if row.strength else "-",
        str(row.seeds),
        f"{row.kl:.2f}",
        f"{row.reward:.3f}",
        _interval(row.change),
        _interval(row.second),
        f"{row.tokens:.1f}",
        f"{row.repetition:.1%}",
    )
    return "| " + " | ".join(cells) + " |"


def _interval(value: Interval) -> str:
    return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def verdict(lines: Lines) -> str:
    """In words: whose frontier lies higher at equal KL, by both judges."""
    ours, sentences = clouds(lines, "dpo", SECOND), []
    for rival in ("ppo", "rloo"):
        theirs = clouds(lines, rival, SECOND)
        if ours.keys() & theirs.keys():
            found = [gap(ours, theirs, start_of(lines, SECOND), judge) for judge in ("reward", "second")]
            sentences.append(_said(METHODS[rival].title, *found))
    return " ".join(sentences) or "Not enough has been measured to compare DPO with PPO."


def _said(rival: str, first: Gap, second: Gap) -> str:
    if first.reach < LEAST:
        return f"The frontiers of DPO and {rival} reach no drift in common, so nothing can be compared."
    if first.interval is None:
        tail = "one seed carries no interval"
    elif first.interval.low > 0:
        tail = f"**DPO's frontier lies above {rival}'s**"
    elif first.interval.high < 0:
        tail = f"**DPO's frontier lies below {rival}'s**"
    else:
        tail = f"**no difference between DPO's frontier and {rival}'s can be seen**"
    return (
        f"At equal KL (0 to {first.reach:.1f} nats) DPO's mean reward minus {rival}'s is {_bounded(first)} by VADER "
        f"and {_bounded(second)} by TextBlob, on which nothing was tuned: {tail}."
    )


def _bounded(found: Gap) -> str:
    return f"{found.estimate:+.3f}" if found.interval is None else _interval(found.interval)


def write_page(lines: Lines, budget: Budget, page: Path = PAGE) -> None:
    """Replace what stands between the markers. Raises `ValueError` for a page without them."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one `{BEGIN}` and one `{END}`")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(lines, budget)}\n\n{END}{rest.split(END)[1]}", "utf-8")


def write_figure(lines: Lines, file: Path = FIGURE) -> None:
    """Reward against KL: a dot for each checkpoint of each run, a line for each method's frontier over all its runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "mlxdpo"}):
        figure, axis = pyplot.subplots(figsize=(7.2, 4.4))
        start, widest = start_of(lines, SECOND), 1.0
        for method in METHODS:
            if own := clouds(lines, method, SECOND):
                _draw(axis, method, list(own.values()), float(start.reward.mean()))
                widest = max(widest, *(float(cloud.kl.mean(axis=1).max()) for cloud in own.values()))
        best = best_of(lines)
        if best:
            axis.plot(
                [b.bound for b in best], [b.reward.mean() for b in best],
                "--", marker="D", markersize=4, color=COLOURS["best of n"], label="best of n (KL: upper bound)",
            )  # fmt: skip
        axis.axhline(start.reward.mean(), color="#bbbbbb", linewidth=0.8)
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ticks = [t for t in (0, 0.25, 1, 2, 4, 8, 16, 32, 64) if t <= 1.3 * widest]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xlabel("sequence KL from the untuned model, nats (square-root scale)")
        axis.set_ylabel("VADER, held-out openings")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _draw(axis: Any, method: str, own: Sequence[Cloud], untuned: float) -> None:
    colour = COLOURS[method]
    kl, reward = (np.concatenate([getattr(c, key).mean(axis=1) for c in own]) for key in ("kl", "reward"))
    axis.plot(kl, reward, "o", markersize=3.5, alpha=0.7, color=colour, label=METHODS[method].title)
    corners = hull([Point("", 0.0, untuned), *(Point("", float(k), float(r)) for k, r in zip(kl, reward, strict=True))])
    if METHODS[method].labels == "bundled_labels":
        axis.plot([p.kl for p in corners], [p.reward for p in corners], linewidth=1, color=colour)
