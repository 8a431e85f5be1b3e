"""The demo's data and recipe: bundled pairs, as they are or with the labels of a control.

Two controls show that what the demo measures comes from the preferences: shuffled labels must change nothing, flipped
labels must turn the change round. Before and after are measured with the same noise and one loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.config import Config, load_config
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.inference.trained_run import heldout_pairs, open_trained_run
from mlxdpo.io.atomic import write_json
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.types import Preference, UserError
from mlxdpo_eval.metrics.drift import TextStats, text_stats
from mlxdpo_eval.metrics.intervals import Interval, cluster_bootstrap, paired_difference
from mlxdpo_eval.metrics.rewards import outcomes
from mlxdpo_eval.results import to_json, write_lines
from mlxdpo_eval.sampling import Answers, Sampling, on_policy_kl, sample_answers

Row = dict[str, Any]
Labels = Callable[[list[Row], int], list[Row]]

SHUFFLE = 1_000_003  # any number that no run has for its seed
HERE = resources.files("mlxdpo.demo")


def bundled_labels(rows: list[Row], seed: int) -> list[Row]:
    """The bundled pairs."""
    return rows


def flipped(rows: list[Row], seed: int) -> list[Row]:
    """Control: chosen and rejected exchanged in every pair."""
    return [_swap(row) for row in rows]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Control: chosen and rejected exchanged in a random half of the pairs."""
    # A stream of its own: `default_rng(seed)` gives the very permutation that orders the first epoch (NumPy takes the
    # seeds 0 and [0, 0] for the same), so half the epoch would be flipped first.
    half = set(np.random.default_rng([SHUFFLE, seed]).permutation(len(rows))[: len(rows) // 2].tolist())
    return [_swap(row) if i in half else row for i, row in enumerate(rows)]


def _swap(row: Row) -> Row:
    other = {"chosen": "rejected", "rejected": "chosen"}
    names = {f"{stem}_{side}": f"{stem}_{other[side]}" for stem in ("score", "finish") for side in other}
    return {name: row[(other | names).get(name, name)] for name in row}


def prepare_demo(out: Path, seed: int, labels: Labels) -> Config:
    """Write the demo's pairs, held-out pairs and prompts into `out` and return the run's configuration.

    Raises `UserError` when `out` holds a run already, or a judge is not installed.
    """
    if (out / "config.yaml").exists():
        raise UserError(f"{out} already holds a run; choose another --out")
    for judge in REWARDS.values():
        judge("fine")
    pairs = labels(bundled("pairs"), seed)
    for name, rows in (("pairs", pairs), ("heldout", bundled("heldout")), ("prompts", bundled("prompts"))):
        write_lines(out / "data" / f"{name}.jsonl", rows)
    data = {"path": str(out / "data" / "pairs.jsonl"), "eval": str(out / "data" / "heldout.jsonl")}
    with resources.as_file(HERE / "recipe.yaml") as recipe:
        return load_config(recipe, {"data": data, "train": {"seed": seed}, "out": str(out)})


def bundled(name: str) -> list[Row]:
    """A data file that ships with the demo: "pairs", "heldout" or "prompts"."""
    with resources.as_file(HERE / f"{name}.jsonl") as file:
        return list(read_lines(file))


OPENINGS = 80  # the first of the held-out ones: enough for the intervals, in less than four minutes
SAMPLES, MAX_TOKENS, BATCH = 2, 24, 80


class DemoResult(NamedTuple):
    """What the demo found. Intervals are 95 %, clustered by opening; None where the data cannot carry one."""

    rewards: dict[str, dict[str, Interval | None]]
    accuracy: Interval | None
    margin: Interval | None
    kl: Interval | None
    before: TextStats
    after: TextStats


def measure_demo(
    run: Run, seed: int, heldout: Sequence[float], say: Callable[[str], None] = lambda text: None
) -> tuple[DemoResult, Answers, Answers]:
    """Sample before and after, judge, measure the drift; writes `eval/demo.json` and `samples/`.

    `heldout` are the margins of the held-out pairs, as the run evaluated them after its last step.
    """
    opened, sampling = open_trained_run(run), Sampling(OPENINGS, SAMPLES, MAX_TOKENS, seed=seed, batch_size=BATCH)
    lines = list(read_lines(run.path / "data" / "prompts.jsonl"))[:OPENINGS]
    prompts = [Preference(line["prompt"], "", "", "prompts.jsonl") for line in lines]
    with opened.start() as model:
        before = sample_answers(opened, model, prompts, SAMPLES, sampling, say, "continuations before")
    after = sample_answers(opened, opened.policy.model, prompts, SAMPLES, sampling, say, "continuations after")
    kl = on_policy_kl(opened, after, sampling.temperature, say)
    margin, openings = list(heldout), [str(row.prompt) for row in heldout_pairs(run)[0]]
    result = DemoResult(
        {name: judge_change(name, before, after) for name in REWARDS},
        cluster_bootstrap(outcomes(np.array(margin)), openings),
        cluster_bootstrap(margin, openings),
        cluster_bootstrap(kl, after.prompts),
        text_stats(before.tokens, before.stopped),
        text_stats(after.tokens, after.stopped),
    )
    write_json(run.path / "eval" / "demo.json", to_json(result))
    for name, answers in (("before", before), ("after", after)):
        rows = zip(answers.prompts, answers.texts, answers.stopped, strict=True)
        samples = [{"prompt": p, "text": t, "finish": "stop" if stopped else "length"} for p, t, stopped in rows]
        write_lines(run.path / "samples" / f"{name}.jsonl", samples)
    return result, before, after


def judge_change(name: str, before: Answers, after: Answers) -> dict[str, Interval | None]:
    """A judge's mean reward before and after and its paired change, clustered by opening."""
    old, new = ([REWARDS[name](p + t) for p, t in zip(s.prompts, s.texts, strict=True)] for s in (before, after))
    clusters = before.prompts
    return {
        "before": cluster_bootstrap(old, clusters),
        "after": cluster_bootstrap(new, clusters),
        "change": paired_difference(old, new, clusters),
    }
