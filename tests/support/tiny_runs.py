"""Tiny recipes: a model folder, a handful of very short pairs, and a run over them in a fraction of a second."""

import json
import random
from pathlib import Path

from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import Config, load_config
from mlxdpo.runs import Run
from mlxdpo.training.run import train
from mlxdpo.types import Event

WORDS = ["red", "blue", "the", "user", "string", "er", "a", "ok", "longer words here"]
# Large steps on few pairs, so that everything moves: 18 pairs in windows of 4 are 5 steps, the last of 2 pairs.
DEFAULTS = {
    "data": {"eval_fraction": 0.0, "template": "plain", "max_length": 64},
    "lora": {"rank": 4, "scale": 2.0},
    "optim": {"lr": 3e-3, "warmup": 0.0},
    "train": {"batch_size": 2, "gradient_accumulation": 2, "eval_every": 0, "save_every": 2, "keep_checkpoints": 9},
}


def write_pairs(file: Path, count: int = 18, seed: int = 0) -> Path:
    """Distinct pairs of 10 to 40 tokens."""
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))  # noqa: E731
    rows = [
        {"prompt": f"q{i} {text()}:", "chosen": f" {text()} {i}", "rejected": f" {text()} no"} for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(folder: Path, out: str = "run", kind: str = "llama", stage: str = "dpo", **sections) -> Config:
    """A recipe over `folder`'s model and pairs, both written on first use; `sections` are laid over the defaults."""
    if not (folder / kind).exists():
        write_model(folder / kind, chatml_tokenizer(), kind)
    if not (folder / "pairs.jsonl").exists():
        write_pairs(folder / "pairs.jsonl")
    base = {
        "model": {"path": str(folder / kind)},
        "data": {"path": str(folder / "pairs.jsonl")},
        "out": str(folder / out),
    }
    parts = {name: DEFAULTS.get(name, {}) | base.get(name, {}) for name in ("model", "data", "lora", "optim", "train")}
    for name, values in sections.items():
        parts[name] = parts.get(name, {}) | values
    return load_config(None, parts | {"out": base["out"], "stage": stage})


def finish(config: Config, resume: Run | None = None, stop=lambda: False) -> list[Event]:
    """Everything that happened."""
    return list(train(config, resume=resume, should_stop=stop))


def losses(events: list[Event]) -> list[float]:
    """The loss of every step."""
    return [event.values["loss"] for event in events if event.kind == "step"]


def adapter_bytes(run: Path | str) -> bytes:
    """The final adapter's file."""
    return (Path(run) / "adapter" / "adapters.safetensors").read_bytes()


def stop_after(calls: int):
    """A should_stop that answers yes from its `calls`-th + 1 question on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None
