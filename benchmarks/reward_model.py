"""Does a reward model learn what the demo's pairs say? Held-out accuracy, and its ranking of samples it never saw.

    python -m benchmarks.reward_model --out runs/rm-demo [--samples 2]

SmolLM2 is trained on the demo's 345 pairs (`stage: reward`); their true reward, VADER, ranked them. Printed are its
accuracy on the 118 held-out pairs, and how it ranks fresh continuations of the held-out openings: Spearman's
correlation with VADER and with TextBlob, which nothing here ever saw; intervals resample openings. Stopped at any
time, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import numpy as np  # isort: skip
from scipy.stats import spearmanr

from mlxdpo.commands.train import follow_training
from mlxdpo.config import Config, load_config
from mlxdpo.data.encode import encode_prompt
from mlxdpo.demo.material import bundled, bundled_labels, prepare_demo
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.inference.generate import generate
from mlxdpo.inference.reward_model import RewardModel, open_reward_model
from mlxdpo.io.atomic import append_line, write_json
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run
from mlxdpo_eval.metrics.intervals import Interval, cluster_bootstrap

MAX_TOKENS, BATCH, SEED = 24, 60, 7  # the pairs were sampled with seed 0
# The demo's recipe otherwise, in all layers: what a word means is found deeper down than where words are chosen.
RECIPE: dict[str, Any] = {
    "stage": "reward",
    "lora": {"layers": -1},
    "optim": {"lr": 3e-4},
    "train": {"epochs": 1.5, "eval_every": 0, "save_every": 10},
    "reward": {"center": 0.01},
}


def recipe(out: Path, overrides: dict[str, Any]) -> Config:
    """The demo's recipe with another stage."""
    base = prepare_demo(out, 0, bundled_labels).model_dump(exclude={"loss"})
    for section, values in (RECIPE | overrides).items():
        base[section] = {**base[section], **values} if isinstance(values, dict) else values
    return load_config(None, base)


def trained(out: Path, overrides: dict[str, Any]) -> bool:
    """Train, or go on; whether it is finished."""
    if (out / "head.safetensors").exists():
        return True
    begun = (out / "manifest.json").exists()
    run = Run.open(out) if begun else None
    return follow_training(run.config() if run else recipe(out, overrides), run) == 0


def sampled(out: Path, config: Config, count: int) -> list[dict[str, str]]:
    """Continuations of the held-out openings by the untuned model, kept as they come."""
    file = out / "fresh.jsonl"
    openings = [row["prompt"] for row in bundled("prompts")]
    kept = list(read_lines(file))
    if len(kept) < count * len(openings):
        policy = load_policy(config.model)
        for at in range(len(kept), count * len(openings), BATCH):
            part = [openings[i % len(openings)] for i in range(at, min(at + BATCH, count * len(openings)))]
            ids = [encode_prompt(prompt, policy.tokenizer, config.data).tolist() for prompt in part]
            seed = SEED + at // len(openings)
            done = generate(policy.model, ids, max_tokens=MAX_TOKENS, eos_ids=policy.eos_ids, seed=seed)
            for prompt, one in zip(part, done, strict=True):
                append_line(file, {"prompt": prompt, "text": policy.tokenizer.decode(one.tokens)})
        kept = list(read_lines(file))
    return [row for row in kept if row["text"].strip()]


def ranking(rewards: np.ndarray, truth: np.ndarray, openings: Sequence[str]) -> Interval | None:
    """Spearman's correlation, 95 % interval over openings."""
    index = np.arange(len(rewards), dtype=np.float64)

    def rho(chosen: np.ndarray) -> float:
        """The correlation in one resample."""
        at = chosen.astype(int)
        return float(spearmanr(rewards[at], truth[at])[0])

    return cluster_bootstrap(index, openings, rho)


def accuracy(model: RewardModel) -> tuple[Interval | None, int]:
    """Share of held-out pairs in which the better continuation has the higher reward; a tie is one half."""
    rows = bundled("heldout")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (model(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    return cluster_bootstrap(0.5 * (1 + np.sign(chosen - rejected)), prompts), len(rows)


def shown(name: str, value: Interval | None, n: int) -> str:
    """One line."""
    return f"{name}: {value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}] (n = {n})" if value else f"{name}: none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, sample, print; 130 when stopped before the end."""
    parser = argparse.ArgumentParser(description="Held-out accuracy and ranking of a reward model on the demo's pairs.")
    parser.add_argument("--out", type=Path, default=Path("runs/rm-demo"))
    parser.add_argument("--samples", type=int, default=2, help="continuations of each of the 120 held-out openings")
    parser.add_argument("--recipe", type=json.loads, default={}, help='changes as JSON, e.g. {"train": {"epochs": 1}}')
    chosen = parser.parse_args(arguments)
    if not trained(chosen.out, chosen.recipe):
        return 130
    run = Run.open(chosen.out)
    model = open_reward_model(run, batch_size=32)
    held, pairs = accuracy(model)
    print(shown("held-out accuracy", held, pairs))
    rows = sampled(chosen.out, run.config(), chosen.samples)
    prompts, texts = [row["prompt"] for row in rows], [row["text"] for row in rows]
    rewards = model(prompts, texts)
    found = {}
    for name, reward in REWARDS.items():
        truth = np.array([reward(prompt + text) for prompt, text in zip(prompts, texts, strict=True)])
        found[name] = ranking(rewards, truth, prompts)
        print(shown(f"Spearman with {name}", found[name], len(rows)))
    values = {"accuracy": held, **{f"spearman_{name}": value for name, value in found.items()}}
    plain = {name: None if value is None else value._asdict() for name, value in values.items()}
    write_json(chosen.out / "eval" / "reward_model.json", plain | {"pairs": pairs, "samples": len(rows)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
