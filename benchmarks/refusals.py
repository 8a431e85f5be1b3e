"""Does DPO towards refusals lower them, and does an SFT term hold them? `python -m benchmarks.refusals`.

arXiv 2410.08847 (section 6) trained refusals against answers that are much like them, other refusals among them, and
the model refused less. Here SmolLM2 learns on half of the requests of `mlxdpo eval --retained`: refusals preferred over
other refusals, and in a part of the pairs over an agreeing answer. The other half of the requests is measured, those to
refuse and those that only sound like them: the probability of two refusals that no pair has against two answers that
agree to help, and the log-prob of those refusals.

A line for each run goes to OUT/results.jsonl; stopped at any time, the same command goes on. Prints a table.
"""

from __future__ import annotations

import mlxdpo  # isort: skip  (before mlx: it puts the fast BLAS in front)

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdpo import Preference, encode_pairs
from mlxdpo.cli import run as command
from mlxdpo.inference.trained_run import TrainedRun, model_logps
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo_eval.report.write import markdown_table
from mlxdpo_eval.results import write_lines
from mlxdpo_eval.retained.check import RetainedCheck
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.run import score_checks

TO_REFUSE, TO_ANSWER = "refusing harmful requests", "answering harmless requests"
LEARNT = (
    "I can't help with that.",
    "Sorry, but I won't help you do this.",
    "No. This could hurt somebody, so I will not explain it.",
    "I am not able to assist with that request.",
    "I'm sorry, I can't explain how to do that.",
    "This is something that I cannot help you with.",
)
AGREEING = ("Sure! First of all, make a plan.", "Of course. Here are the steps.", "Yes, that is easy to do.")
AGREED = 0.3  # of the pairs prefer a refusal over an agreeing answer, the others over another refusal
RULES = {
    "DPO": {"loss": "sigmoid"},
    "DPO and SFT, weights 1 and 1": {"loss": "sigmoid+sft", "loss.weights": [1.0, 1.0]},
    "DPO on the half of the pairs that are least alike (low-ches:0.5)": {"loss": "sigmoid"},
}
FILTERED = list(RULES)[2]


def requests(area: str, learnt: bool) -> list[RetainedCheck]:
    """Every other deed of an area, in both wordings."""
    return [
        check for i, check in enumerate(one for one in retained_checks() if one.area == area) if (i // 2) % 2 != learnt
    ]


def pairs(seed: int, repeats: int = 3) -> list[dict[str, str]]:
    """A refusal and what it is preferred over, `repeats` for each request that is learnt."""
    draw, rows = random.Random(seed), []
    for check in requests(TO_REFUSE, learnt=True) * repeats:
        chosen = draw.choice(LEARNT)
        others = AGREEING if draw.random() < AGREED else [text for text in LEARNT if text != chosen]
        rows.append({"prompt": check.prompt, "chosen": chosen, "rejected": draw.choice(others)})
    draw.shuffle(rows)
    return rows


def kept_pairs(rows: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """Those that `mlxdpo data audit` keeps."""
    write_lines(folder / "pairs.jsonl", rows)
    (folder / "kept.jsonl").unlink(missing_ok=True)  # those of another seed
    words = ["data", "audit", str(folder / "pairs.jsonl"), "--model", "smollm2", "--select", "low-ches:0.5"]
    if status := command([*words, "--out", str(folder / "kept.jsonl")]):
        raise SystemExit(status)
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read_lines(folder / "kept.jsonl")]


def measure(opened: TrainedRun, model: Any) -> dict[str, float]:
    """Shares of refusals and help on requests that no pair has, and the log-prob of a refusal, nats."""
    harmful, harmless = requests(TO_REFUSE, learnt=False), requests(TO_ANSWER, learnt=False)
    rows = [Preference(check.prompt, *check.options[:2], where="refusals") for check in harmful]
    _, examples, _ = encode_pairs(opened, rows)
    return {
        "refused": float(score_checks(opened, model, harmful).scores.mean()),
        "answered": float(score_checks(opened, model, harmless).scores.mean()),
        "logp": float(model_logps(model, examples, "none", 8).mean()),
    }


def one_run(rule: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """Train by a rule and measure before and after."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    rows = pairs(seed)
    if rule == FILTERED:
        rows = kept_pairs(rows, out)
    settings = {"steps": steps, "epochs": 50.0, "batch_size": 8, "gradient_accumulation": 1, "eval_fraction": 0.0}
    tuned = mlxdpo.tune("smollm2", rows, lr=1e-4, seed=seed, out=str(folder), **settings, **RULES[rule])
    opened = mlxdpo.open_trained_run(mlxdpo.Run.open(tuned.path))
    with opened.start() as model:
        before = measure(opened, model)
    return {
        "rule": rule,
        "seed": seed,
        "pairs": len(rows),
        "before": before,
        "after": measure(opened, opened.policy.model),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, with the least and the largest."""
    rows = []
    for rule in [rule for rule in RULES if any(line["rule"] == rule for line in lines)]:
        own = [line for line in lines if line["rule"] == rule]
        if not rows:
            rows.append(("before", "–", *(_shown([line["before"][name] for line in own], name) for name in FIGURES)))
        after = [_shown([line["after"][name] for line in own], name) for name in FIGURES]
        rows.append((rule, str(round(np.mean([line["pairs"] for line in own]))), *after))
    return markdown_table(("trained by", "pairs", *FIGURES.values()), rows)


FIGURES = {
    "refused": "probability of refusing what is to be refused",
    "answered": "of agreeing to help elsewhere",
    "logp": "log-prob of a refusal, nats",
}


def _shown(values: Sequence[float], name: str) -> str:
    form = "{:.1f}" if name == "logp" else "{:.2f}"
    least, mean, most = (form.format(one) for one in (min(values), np.mean(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
    """Train and measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/refusals"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.jsonl"
    found = list(read_lines(file)) if file.exists() else []
    for seed in range(given.seeds):
        for rule in RULES:
            if not any((line["rule"], line["seed"]) == (rule, seed) for line in found):
                found.append(one_run(rule, seed, given.out, given.steps))
                append_line(file, found[-1])
                print(found[-1], flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
