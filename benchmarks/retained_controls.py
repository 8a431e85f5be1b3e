"""Does `mlxdpo eval --retained` call SmolLM2 worse when nothing was learned?

    python -m benchmarks.retained_controls --limit 10

Each model is SmolLM2 with adapters of random numbers, which change answers and teach nothing. Two questions are asked:

- the model as it is against each of them: harmless as long as the numbers are small;
- each of them against the next. They are drawn alike, so neither of two is worse than the other on average, however
  large the numbers are: what is called worse here is a false alarm.

A line for each model goes to OUT/models.jsonl; stopped at any time, the same command goes on. Prints the counts.
"""

from __future__ import annotations

import mlxdpo  # isort: skip  (before mlx: it puts the fast BLAS in front)

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo import Run, open_trained_run
from mlxdpo.demo.material import bundled
from mlxdpo.inference.trained_run import TrainedRun
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo_eval.metrics.areas import area_changes
from mlxdpo_eval.retained.check import RetainedCheck
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.run import ModelScores, areas_of, score_checks
from mlxdpo_eval.retained.texts import PASSAGE_AREA


class Found(NamedTuple):
    """How many of these comparisons were called worse, and how far the models were apart."""

    comparisons: int
    worse: int
    answers_changed: float
    items_turned: float
    text_nats: float


def open_model(out: Path) -> TrainedRun:
    """SmolLM2 with the default adapters after one step, whose numbers are then drawn instead."""
    if not (out / "run" / "adapter" / "adapters.safetensors").exists():
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in bundled("pairs")[:8]]
        mlxdpo.tune("smollm2", rows, steps=1, lr=1e-5, eval_fraction=0.0, out=str(out / "run"))
    return open_trained_run(Run.open(out / "run"))


def draw_adapters(opened: TrainedRun, size: float, seed: int) -> None:
    """Every `lora_b` from N(0, size^2); `size` 0 is the untouched model."""
    model = opened.policy.model
    names = [(name, array) for name, array in tree_flatten(model.trainable_parameters()) if name.endswith("lora_b")]
    keys = mx.random.split(mx.random.key(seed), len(names))
    drawn = [
        (name, size * mx.random.normal(array.shape, array.dtype, key=key))
        for (name, array), key in zip(names, keys, strict=True)
    ]
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())


def models(out: Path, count: int, limit: int | None, size: float) -> list[dict[str, Any]]:
    """The scores of the untouched model and of `count` drawn ones, measured where OUT does not have them."""
    file = out / "models.jsonl"
    asked = {"limit": limit, "size": size}
    found = {line["seed"]: line for line in read_lines(file)} if file.exists() else {}
    if other := [line for line in found.values() if {name: line[name] for name in asked} != asked]:
        raise SystemExit(f"{file} has {other[0]['limit']} items of each area at size {other[0]['size']}; give --out")
    missing = [seed for seed in range(count + 1) if seed not in found]
    if missing:
        opened, checks = open_model(out), retained_checks(limit)
        for seed in missing:
            started = time.monotonic()
            draw_adapters(opened, size if seed else 0.0, seed)
            scores, answers = score_checks(opened, opened.policy.model, checks)
            found[seed] = asked | {"seed": seed, "scores": scores.tolist(), "answers": answers}
            append_line(file, found[seed] | {"seconds": time.monotonic() - started})
            print(f"model {seed} of {count}: {time.monotonic() - started:.0f} s", flush=True)
    return [found[seed] for seed in range(count + 1)]


def compare(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], checks: Sequence[RetainedCheck]) -> Found:
    """Verdicts over pairs of models, the first as the one before."""
    worse, changed, turned, nats = 0, [], [], []
    text = np.array([check.area == PASSAGE_AREA for check in checks])
    for first, second in pairs:
        sides = [ModelScores(np.array(side["scores"]), side["answers"]) for side in (first, second)]
        worse += area_changes(areas_of(checks, *sides)).verdict == "worse"
        written = [
            (a, b) for a, b in zip(first["answers"], second["answers"], strict=True) if a is not None and b is not None
        ]
        changed.append(np.mean([a != b for a, b in written]))
        turned.append(np.mean((sides[0].scores[~text] > 0.5) != (sides[1].scores[~text] > 0.5)))
        nats.append(np.mean(np.log(sides[1].scores[text] / sides[0].scores[text])))
    return Found(len(pairs), worse, float(np.mean(changed)), float(np.mean(turned)), float(np.mean(nats)))


def main() -> None:
    """Measure what is missing and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/controls"))
    parser.add_argument("--controls", type=int, default=40)
    parser.add_argument("--limit", type=int, help="items of each area; all without it")
    parser.add_argument("--size", type=float, default=1e-3, help="standard deviation of the drawn numbers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    untouched, *drawn = models(given.out, given.controls, given.limit, given.size)
    checks = retained_checks(given.limit)
    print(f"{len(checks)} items")
    for name, pairs in (
        ("untouched against drawn", [(untouched, one) for one in drawn]),
        ("drawn against drawn", list(itertools.pairwise([*drawn, drawn[0]]))),
    ):
        found = compare(pairs, checks)
        print(f"{name}: {found.worse} of {found.comparisons} called worse")
        shares = (
            f"{100 * found.answers_changed:.0f} % of written answers changed, {100 * found.items_turned:.1f} % of items"
        )
        print(f"  {shares} turned, text {found.text_nats:+.4f} nats a token")


if __name__ == "__main__":
    main()
