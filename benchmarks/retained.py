"""Does `mlxdpo eval --retained` find a drop, and leave an untouched model alone? `python -m benchmarks.retained`.

Simulated models answer the bundled set before and after. An untouched one still changes answers (rounding, another
batch, a tune that moves words about): `CHURN` of right or wrong answers turn over, as many each way, and the log-odds
of
right options move by a normal deviate. A drop is planted on top. Prints a table (`--json` for a machine); `--write
FILE`
puts it between the markers of a page. Exit status 1 when the drop everywhere is found in fewer than 80 % of the
repetitions, or when more than 5 % of untouched models are called worse (by two standard errors).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from mlxdpo.io.atomic import write_text
from mlxdpo_eval.metrics.areas import AreaScores, area_changes
from mlxdpo_eval.report.write import markdown_table
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.texts import PASSAGE_AREA

BEGIN, END = "<!-- retained: begin (python -m benchmarks.retained) -->", "<!-- retained: end -->"
CHURN = 0.10  # of right or wrong answers that turn over without any drop
LOGIT_NOISE = 0.5  # of the log-odds of a right option
TEXT_NOISE = 0.02  # of a passage's log-likelihood per token, nats
PASS_RATE = 0.6
DROP = 0.05


class Found(NamedTuple):
    """A scenario: how often the model was called worse, and how often because of the area that really fell."""

    scenario: str
    repetitions: int
    worse: float
    named: float | None
    detectable: float


def option_area(n: int, drop: float, rng: np.random.Generator) -> AreaScores:
    """(n,) probabilities of right options, the mean over many items lower by `drop` afterwards."""
    logits = rng.normal(1.0, 2.0, n)
    after = logits + option_shift(drop) + rng.normal(0, LOGIT_NOISE, n)
    return AreaScores(special.expit(logits), special.expit(after))


@functools.cache
def option_shift(drop: float) -> float:
    """The shift of log-odds that lowers the mean probability by `drop`, noise included.

    Noise alone pulls the mean of a bounded number towards the middle: what is planted is the whole change.
    """
    many = np.random.default_rng(0).normal(size=(2, 20_000)) * [[2.0], [LOGIT_NOISE]] + [[1.0], [0.0]]
    base = special.expit(many[0]).mean()
    return float(optimize.brentq(lambda s: special.expit(many.sum(0) + s).mean() - base + drop, -5, 5))


def answer_area(n: int, drop: float, rng: np.random.Generator) -> AreaScores:
    """(n,) right and wrong answers: churn both ways alike, `drop` of all items lost besides."""
    before = rng.random(n) < PASS_RATE
    lost, gained = (CHURN / 2 + drop) / PASS_RATE, CHURN / 2 / (1 - PASS_RATE)
    after = np.where(before, rng.random(n) >= lost, rng.random(n) < gained)
    return AreaScores(before.astype(float), after.astype(float))


def passage_area(n: int, drop: float, rng: np.random.Generator) -> AreaScores:
    """(n,) shares of a passage's likelihood per token that are left."""
    return AreaScores(np.ones(n), np.exp(rng.normal(np.log1p(-drop), TEXT_NOISE, n)), counted=False)


def simulate(fallen: Sequence[str], drop: float, rng: np.random.Generator) -> dict[str, AreaScores]:
    """One evaluation in which the areas `fallen` lose `drop`."""
    return {area: draw(n, drop if area in fallen else 0.0, rng) for area, (n, draw) in areas_of_checks().items()}


@functools.cache
def areas_of_checks() -> dict[str, tuple[int, Callable[[int, float, np.random.Generator], AreaScores]]]:
    """Area -> its number of items and what draws their scores, for the bundled set."""
    checks = retained_checks()
    found = {}
    for area, n in Counter(check.area for check in checks).items():
        first = next(check for check in checks if check.area == area)
        found[area] = (n, answer_area if first.passes else passage_area if area == PASSAGE_AREA else option_area)
    return found


def scenario(name: str, fallen: Sequence[str], repetitions: int, seed: int) -> Found:
    """`repetitions` evaluations, each with a generator of its own."""
    worse, named, detectable = 0, 0, 0.0
    for child in np.random.SeedSequence([seed, *name.encode()]).spawn(repetitions):
        found = area_changes(simulate(fallen, DROP, np.random.default_rng(child)))
        worse += found.verdict == "worse"
        named += any(area.worse for area in found.areas if area.area in fallen)
        one = next((area for area in found.areas if [area.area] == list(fallen)), None)
        detectable += (one.detectable if one else found.detectable) or 0.0
    share = named / repetitions if fallen else None
    return Found(name, repetitions, worse / repetitions, share, detectable / repetitions)


def scenarios(repetitions: int, untouched: int, seed: int) -> list[Found]:
    """Untouched models, a drop everywhere, and a drop in one area alone for each area."""
    areas = list(areas_of_checks())
    return [
        scenario("untouched", [], untouched, seed),
        scenario("5 points everywhere", areas, repetitions, seed),
        *(scenario(f"5 points in {area} alone", [area], repetitions, seed) for area in areas),
    ]


def table(found: Sequence[Found]) -> str:
    """Markdown: how often each scenario is called worse."""
    rows = [
        (
            one.scenario,
            f"{one.repetitions:,}",
            f"{100 * one.worse:.1f} %",
            "–" if one.named is None else f"{100 * one.named:.1f} %",
            f"{100 * one.detectable:.1f}",
        )
        for one in found
    ]
    header = (
        "what happened",
        "repetitions",
        "called worse",
        "names a fallen area",
        "drop found with power 0.8, points",
    )
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retained", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=200, help="evaluations with a drop, per scenario")
    parser.add_argument("--untouched", type=int, default=2000, help="evaluations without one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--write", type=Path, help="a page with the markers, such as docs/evidence/intervals.md")
    given = parser.parse_args(arguments)
    found = scenarios(given.repetitions, given.untouched, given.seed)
    print(json.dumps([one._asdict() for one in found], indent=1) if given.json else table(found))
    if given.write:
        old = given.write.read_text("utf-8")
        start, end = old.index(BEGIN), old.index(END)
        write_text(given.write, f"{old[:start]}{BEGIN}\n{table(found)}\n{old[end:]}")
    alarms, everywhere = found[0].worse, found[1].worse
    limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / given.untouched)
    if alarms > limit or everywhere < 0.8:
        print(f"untouched called worse: {alarms:.3f}; drop found: {everywhere:.3f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
