"""How much of the accuracy that flipped labels cost comes back after `mlxdpo data audit`?

    python -m benchmarks.label_noise code tone --out runs/label-noise

The sets of `benchmarks.audit`. A fifth of the training labels is flipped, and SmolLM2 is trained six times from the
same seed: on sound labels, on the flipped ones, and on those after an audit: flagged pairs left out (`drop`), flagged
pairs exchanged (`flip`), the most probable labels kept, as many as the audit estimates to be right (`agreed`, with
`--select agreed:SHARE`), all pairs with FA-DPO and each pair's probability (`fa_dpo`). Measured is the share of
held-out pairs, their labels sound, that implicit reward ranks rightly. A line for each run goes to OUT/runs.jsonl;
stopped at any time, the same command goes on. `--table` prints what is measured so far.
"""

from __future__ import annotations

import mlxdpo  # isort: skip  # noqa: F401  (before mlx: it puts the fast BLAS in front)

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.audit import FOLDS, LONGEST, SETS, SHARE, exchanged_rows
from benchmarks.rates import LAYERS, as_it_stands, keep, ranked_rightly
from mlxdpo import Preference, encode_pairs, load_config
from mlxdpo.config import DataConfig, ModelConfig
from mlxdpo.data.encode import encode
from mlxdpo.data.examples import Example
from mlxdpo.data.findings import FLIP, Audit, audit_pairs, chosen_rows
from mlxdpo.data.report import Report
from mlxdpo.inference.pair_states import audit_input
from mlxdpo.inference.selection_pilot import pair_as_json
from mlxdpo.inference.trained_run import model_logps
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.training.run import train
from mlxdpo_eval.results import write_lines

LABELS = ("sound", "flipped", "drop", "flip", "agreed", "fa_dpo")


class Trial(NamedTuple):
    """One training run."""

    set: str
    labels: str
    seed: int
    pairs: int
    heldout: int
    lr: float
    epochs: float


def fitting(policy: Policy, name: str, rows: Sequence[Preference]) -> list[tuple[Preference, Example]]:
    """Those rows of a set that are not too long, with their tokens."""
    data = DataConfig(template=SETS[name][1], max_length=LONGEST)  # type: ignore[arg-type]
    found = ((row, encode(row, policy.tokenizer, data, Report(), eos_ids=policy.eos_ids)) for row in rows)
    return [(row, example) for row, example in found if example is not None]


def audited(policy: Policy, name: str, noisy: Sequence[Preference], seed: int) -> Audit:
    """What the audit finds in rows with flipped labels."""
    examples = [example for _, example in fitting(policy, name, noisy)]
    return audit_pairs(noisy, audit_input(policy, None, examples, DataConfig().group, 8), FOLDS, seed=seed)


def labelled(
    labels: str, rows: Sequence[Preference], noisy: Sequence[Preference], audit: Audit
) -> list[dict[str, Any]]:
    """The training rows as JSON, after an audit each with the probability of its label."""
    if labels in ("sound", "flipped"):
        return [pair_as_json(row, False) for row in (rows if labels == "sound" else noisy)]
    rule = f"agreed:{1 - audit.summary['wrong_labels']:.3f}" if labels == "agreed" else None
    left, exchanged = chosen_rows(audit.rows, (FLIP,) if labels == "drop" else (), labels == "flip", rule)
    return [pair_as_json(noisy[i], i in exchanged) | {"probability": audit.rows[i]["probability"]} for i in left]


def run_trial(
    training: Sequence[dict[str, Any]], heldout: Sequence[Preference], trial: Trial, out: Path
) -> dict[str, Any]:
    """Train on these rows and measure on held-out pairs: the line of a trial."""
    template = SETS[trial.set][1]
    file, folder = out / "data" / ("-".join(map(str, trial)) + ".jsonl"), out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write_lines(file, training)
    data: dict[str, Any] = {"path": str(file), "template": template, "max_length": LONGEST, "eval_fraction": 0.0}
    loss = {}
    if trial.labels == "fa_dpo":
        data["columns"], loss = {"probability": "probability"}, {"name": "fa_dpo"}
    schedule = {"epochs": trial.epochs, "batch_size": 4, "gradient_accumulation": 1, "save_every": 10_000}
    settings = {"model": "smollm2", "data": data, "loss": loss, "lora": {"layers": LAYERS["smollm2"]}}
    settings |= {"optim": {"lr": trial.lr}, "train": schedule | {"seed": trial.seed}, "out": str(folder)}
    config, trained = load_config(None, settings), None
    for event in train(config):
        if event.kind == "start":
            trained = event.values["policy"]
    assert trained is not None  # every run begins with a "start"
    opened = as_it_stands(folder, trained)
    _, examples, _ = encode_pairs(opened, list(heldout))
    moved = np.array(model_logps(trained.model, examples, "none", 16))
    with opened.start() as model:
        moved -= np.array(model_logps(model, examples, "none", 16))
    return {**trial._asdict(), "accuracy": ranked_rightly(moved[0] - moved[1]), "trained_on": len(training)}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy by set and labels, and the share of the loss that the best treatment gives back.

    Runs that differ in anything but labels and seed have rows of their own; a seed counts once all labels have it.
    """
    text = [
        f"| set | pairs | lr | epochs | seeds | {' | '.join(LABELS)} | given back by the best |",
        "|---" * (len(LABELS) + 6) + "|",
    ]
    trials = {Trial(*(line[name] for name in Trial._fields)): line["accuracy"] for line in found}
    for kind in dict.fromkeys(trial._replace(labels="", seed=0) for trial in trials):
        every = [[kind._replace(labels=labels, seed=seed) for labels in LABELS] for seed in {t.seed for t in trials}]
        rows = [[trials[trial] for trial in own] for own in every if trials.keys() >= set(own)]
        if rows:
            mean = dict(zip(LABELS, np.mean(rows, axis=0).tolist(), strict=True))
            lost = mean["sound"] - mean["flipped"]
            best = max(LABELS[2:], key=mean.__getitem__)
            back = f"{(mean[best] - mean['flipped']) / lost:.0%} ({best})" if lost > 0 else "nothing was lost"
            values = " | ".join(f"{100 * value:.1f}" for value in mean.values())
            text.append(f"| {kind.set} | {kind.pairs} | {kind.lr} | {kind.epochs} | {len(rows)} | {values} | {back} |")
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
        rows = [row for row, _ in fitting(policy, name, SETS[name][0](100_000))]
        rows, heldout = rows[: options.pairs], rows[options.pairs : options.pairs + options.heldout]
        for seed in range(options.seeds):
            trials = [Trial(name, one, seed, len(rows), len(heldout), options.lr, options.epochs) for one in wanted]
            missing = [trial for trial in trials if trial not in done]
            if not missing:
                continue
            noisy = exchanged_rows(rows, np.random.default_rng(seed).random(len(rows)) < SHARE)
            audit = audited(policy, name, noisy, seed)
            for trial in missing:
                keep(file, run_trial(labelled(trial.labels, rows, noisy, audit), heldout, trial, options.out))


if __name__ == "__main__":
    main()
