"""Arms as run directories: trained, or gone on with where they were stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.frontier.plan import METHODS, Arm, Budget, recipe
from mlxdpo.baselines.online import tune_on_samples
from mlxdpo.baselines.rollouts import Reward
from mlxdpo.config import Config, load_config
from mlxdpo.demo import material
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.io.atomic import write_text
from mlxdpo.runs import Run
from mlxdpo.training.run import train
from mlxdpo.types import Text

JUDGE, SECOND = "vader", "textblob"
Stop = Callable[[], bool]


def rewarded(judge: str) -> Reward:
    """A demo reward of opening and continuation together, as the demo's pairs were ranked."""

    def score(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        """One number for each."""
        return [REWARDS[judge](f"{p}{c.rstrip()}") for p, c in zip(prompts, completions, strict=True)]

    return Reward(judge, score)


def configured(arm: Arm, budget: Budget, out: Path, model: str) -> Config:
    """The arm's configuration; writes its pairs below `out` on first use. Nothing of them is held out: other openings
    are what is measured on."""
    labels = getattr(material, METHODS[arm.method].labels)
    name = METHODS[arm.method].labels
    file = out / "data" / (f"{name}.jsonl" if name == "bundled_labels" else f"{name}-{arm.seed}.jsonl")
    if not file.exists():
        rows = labels(material.bundled("pairs"), arm.seed)
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    given: dict[str, Any] = recipe(arm, budget, model) | {"out": str(folder_of(out, arm))}
    given["data"] = {"path": str(file), "eval_fraction": 0.0}
    with resources.as_file(material.HERE / "recipe.yaml") as base:
        return load_config(base, given)


def folder_of(out: Path, arm: Arm) -> Path:
    """The arm's run directory."""
    return out / "arms" / arm.name


def finish(arm: Arm, budget: Budget, out: Path, model: str, should_stop: Stop, say: Callable[[str], None]) -> bool:
    """Train the arm to its end, from wherever it stands; whether it got there."""
    folder = folder_of(out, arm)
    if (folder / "adapter" / "adapter_config.json").exists():
        return True
    run = Run.open(folder) if (folder / "config.yaml").exists() else None
    config = run.config() if run else configured(arm, budget, out, model)
    if METHODS[arm.method].online:
        events = tune_on_samples(config, rewarded(JUDGE), resume=run, should_stop=should_stop)
    else:
        events = train(config, resume=run, should_stop=should_stop)
    for event in events:
        if event.kind == "step":
            shown = {name: event.values[name] for name in ("loss", "objective/scores") if name in event.values}
            say(f"{arm.name} step {event.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
        if event.kind == "done":
            return True
    return False
