"""How much of the accuracy that flipped labels cost comes back after `mlxdpo data audit`?

    python -m benchmarks.label_noise code tone --out runs/label-noise

The sets of `benchmarks.audit`. A fifth of the training labels is flipped, and SmolLM2 is trained five times from the
same seed: on sound labels, on the flipped ones, and on those after an audit: flagged pairs left out (`drop`), flagged
pairs exchanged (`flip`), all pairs with FA-DPO and each pair's probability (`fa_dpo`). Measured is the share of
held-out pairs, their labels sound, that implicit reward ranks rightly. A line for each run goes to OUT/runs.jsonl;
stopped at any time, the same command goes on. `--table` prints what is measured so far.
"""

from __future__ import annotations

import mlxdpo  # isort: skip  # noqa: F401  (before mlx: it puts the fast BLAS in front)

import argparse
import gc
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks.audit import FOLDS, LONGEST, SETS, SHARE, exchanged_rows
from mlxdpo import Preference, Run, encode_pairs, load_config
from mlxdpo.config import DataConfig, ModelConfig
from mlxdpo.data.encode import encode
from mlxdpo.data.findings import FLIP, audit_pairs, chosen_rows
from mlxdpo.data.report import Report
from mlxdpo.inference.pair_states import audit_input
from mlxdpo.inference.selection_pilot import pair_as_json
from mlxdpo.inference.trained_run import TrainedRun, model_logps
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.adapters import adapters_off
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.training.run import train
from mlxdpo_eval.results import write_lines

LABELS = ("sound", "flipped", "drop", "flip", "fa_dpo")
LAYERS = 8  # the last blocks, which carry the adapters: gradients of all of SmolLM2 would double the time


class Trial(NamedTuple):
    """One training run."""

    set: str
    labels: str
    seed: int
    pairs: int
    lr: float
    epochs: float


def fitting(policy: Policy, name: str) -> list[Preference]:
    """The pairs of a set that are not too long, in its order."""
    make, template = SETS[name]
    data = DataConfig(template=template, max_length=LONGEST)  # type: ignore[arg-type]
    ids = policy.eos_ids
    return [row for row in make(100_000) if encode(row, policy.tokenizer, data, Report(), eos_ids=ids) is not None]


def labelled(policy: Policy, rows: Sequence[Preference], trial: Trial) -> list[dict[str, Any]]:
    """The training rows of a trial as JSON, each with the probability of its label."""
    if trial.labels == "sound":
        return [pair_as_json(row, False) for row in rows]
    wrong = np.random.default_rng(trial.seed).random(len(rows)) < SHARE
    noisy = exchanged_rows(rows, wrong)
    if trial.labels == "flipped":
        return [pair_as_json(row, False) for row in noisy]
    data = DataConfig(template=SETS[trial.set][1], max_length=LONGEST)  # type: ignore[arg-type]
    examples = [encode(row, policy.tokenizer, data, Report(), eos_ids=policy.eos_ids) for row in noisy]
    given = audit_input(policy, None, [example for example in examples if example is not None], data.group, 8)
    audit = audit_pairs(noisy, given, FOLDS, seed=trial.seed)
    dropped = (FLIP,) if trial.labels == "drop" else ()
    left, exchanged = chosen_rows(audit.rows, dropped, trial.labels == "flip", None)
    return [pair_as_json(noisy[i], i in exchanged) | {"probability": audit.rows[i]["probability"]} for i in left]


def run_trial(policy: Policy, rows: Sequence[Preference], heldout: Sequence[Preference], trial: Trial, out: Path):
    """Train on the labels of a trial and measure on held-out pairs: its line."""
    template = SETS[trial.set][1]
    file, folder = out / "data" / ("-".join(map(str, trial)) + ".jsonl"), out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    training = labelled(policy, rows, trial)
    write_lines(file, training)
    data: dict[str, Any] = {"path": str(file), "template": template, "max_length": LONGEST, "eval_fraction": 0.0}
    loss = {}
    if trial.labels == "fa_dpo":
        data["columns"], loss = {"probability": "probability"}, {"name": "fa_dpo"}
    schedule = {"epochs": trial.epochs, "batch_size": 4, "gradient_accumulation": 1, "save_every": 10_000}
    settings = {"model": "smollm2", "data": data, "loss": loss, "lora": {"layers": LAYERS}}
    settings |= {"optim": {"lr": trial.lr}, "train": schedule | {"seed": trial.seed}, "out": str(folder)}
    config, trained = load_config(None, settings), None
    for event in train(config):
        if event.kind == "start":
            trained = event.values["policy"]
    assert trained is not None  # every run begins with a "start"
    run, start = Run.open(folder), partial(adapters_off, trained.model)
    opened = TrainedRun(run, run.config(), trained, start, start)
    _, examples, _ = encode_pairs(opened, list(heldout))
    after = np.array(model_logps(trained.model, examples, "none", 16))
    with opened.start() as model:
        before = np.array(model_logps(model, examples, "none", 16))
    apart = (after - before)[0] - (after - before)[1]
    accuracy = float(((apart > 0) + 0.5 * (apart == 0)).mean())
    return {**trial._asdict(), "accuracy": accuracy, "trained_on": len(training), "heldout": len(heldout)}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy by set and labels, and the share of the loss that each treatment gives back."""
    text = [
        f"| set | pairs | seeds | {' | '.join(LABELS)} | given back by the best |",
        "|---" * (len(LABELS) + 4) + "|",
    ]
    for name, pairs in dict.fromkeys((line["set"], line["pairs"]) for line in found):
        own = [line for line in found if (line["set"], line["pairs"]) == (name, pairs)]
        values = {
            labels: [line["accuracy"] for line in own if line["labels"] == labels]
            for labels in LABELS
        }  # fmt: skip
        if not all(values.values()):
            continue
        mean = {labels: float(np.mean(value)) for labels, value in values.items()}
        lost = mean["sound"] - mean["flipped"]
        best = max(LABELS[2:], key=mean.__getitem__)
        back = f"{(mean[best] - mean['flipped']) / lost:.0%} ({best})" if lost > 0 else "nothing was lost"
        row = " | ".join(f"{100 * mean[labels]:.1f}" for labels in LABELS)
        text.append(f"| {name} | {pairs} | {len(values['sound'])} | {row} | {back} |")
    return "\n".join(text)


def main() -> None:
    """Train what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--out", type=Path, default=Path("runs/label-noise"))
    parser.add_argument("--pairs", type=int, default=160, help="training pairs of a set; the others are held out")
    parser.add_argument("--heldout", type=int, default=120, help="held-out pairs, at most")
    parser.add_argument("--labels", default=",".join(LABELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--table", action="store_true", help="print the table of what is measured so far instead")
    options = parser.parse_args()
    wanted = options.labels.split(",")
    if unknown := set(wanted) - set(LABELS):
        parser.error(f"--labels {', '.join(unknown)}: unknown; choose from {', '.join(LABELS)}")
    file = options.out / "runs.jsonl"
    lines = list(read_lines(file)) if file.exists() else []
    if options.table:
        print(table(lines))
        return
    done = {tuple(line[name] for name in Trial._fields) for line in lines}
    policy = load_policy(ModelConfig(path="smollm2"))
    for name in options.sets:
        rows = fitting(policy, name)
        heldout = rows[options.pairs : options.pairs + options.heldout]
        for seed in range(options.seeds):
            for labels in wanted:
                trial = Trial(name, labels, seed, options.pairs, options.lr, options.epochs)
                if trial not in done:
                    line = run_trial(policy, rows[: options.pairs], heldout, trial, options.out)
                    append_line(file, line)
                    print(json.dumps(line), flush=True)
                    gc.collect()
                    mx.clear_cache()


if __name__ == "__main__":
    main()
