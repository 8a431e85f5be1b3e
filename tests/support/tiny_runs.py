"""Tiny recipes: a model folder, a handful of very short pairs, and a run over them in a fraction of a second."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.config import Config, load_config
from mlxdpo.machine import openblas
from mlxdpo.machine.device import this_machine
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.run import train
from mlxdpo.types import Event

WORDS = ["red", "blue", "the", "user", "string", "er", "a", "ok", "longer words here"]
# Large steps on few pairs, so that everything moves: 18 pairs in windows of 4 are 5 steps, the last of 2 pairs.
DEFAULTS = {
    "data": {"eval_fraction": 0.0, "template": "plain", "max_length": 64},
    "lora": {"rank": 4, "scale": 2.0},
    "optim": {"lr": 3e-3, "warmup": 0.0},
    "train": {
        "epochs": 1.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "eval_every": 0,
        "save_every": 2,
        "keep_checkpoints": 9,
    },
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
    if "steps" in parts["train"] and "epochs" not in sections.get("train", {}):
        del parts["train"]["epochs"]
    if parts["lora"].get("method") == "full":
        parts["model"].setdefault("dtype", "float32")  # asked for on a GPU
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


MEMORY = {"peak_memory_gb", "active_memory_gb", "cache_memory_gb"}
CLOCK = {"tokens_per_second", "seconds_left"} | MEMORY  # what may differ between two runs


def numbers(run: Path | str) -> list[dict]:
    """The lines of the metrics without what the clock and the machine decide."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in Run.open(run).metrics()]


def interrupted(config: Config, stop) -> tuple[Run, int]:
    """A run that was stopped on the way, and the step after which it stopped."""
    events = finish(config, stop=stop)
    assert events[-1].kind == "interrupted"
    return Run.open(config.out), events[-1].step


def assert_same(run: Path | str, other: Path | str) -> None:
    """Two finished runs have the same adapter and optimizer to the bit, and the same metrics."""
    assert adapter_bytes(run) == adapter_bytes(other)
    assert numbers(run) == numbers(other)
    last, expected = (checkpoint.steps(Run.open(path).checkpoints)[-1] for path in (run, other))
    assert last.name == expected.name
    states = [mx.load(str(path / "optimizer.safetensors")) for path in (last, expected)]
    assert states[0].keys() == states[1].keys()
    assert all(mx.array_equal(states[0][name], states[1][name]).item() for name in states[0])


def trained(folder, out="run", **sections) -> Run:
    """A tiny trained run whose held-out pairs are all of its pairs."""
    config = recipe(folder, out, **sections)
    data = config.data.model_copy(update={"eval": config.data.path})
    return trained_once(folder, config.model_copy(update={"data": data}))


KEPT_RUNS = "MLXDPO_TESTS_KEPT_RUNS"  # the variable that names the folder of `trained_once`, one for a whole session


def trained_once(folder: Path, config: Config) -> Run:
    """The finished run of a recipe over files below `folder`: trained by the first test that asks for it, copied from
    there for the others, whichever worker they run in. For tests that begin with a run; one of training trains."""
    kept = Path(os.environ[KEPT_RUNS]) / _name_of(folder, config)
    if kept.exists():
        shutil.copytree(kept / "run", config.out)
        return _moved(Path(config.out), (kept / "folder").read_text("utf-8"), folder)
    finish(config)
    kept.parent.mkdir(exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=kept.parent))
    shutil.copytree(config.out, draft / "run")
    (draft / "folder").write_text(str(folder), "utf-8")
    with contextlib.suppress(OSError):  # another worker was faster
        draft.rename(kept)
    return Run.open(config.out)


def _name_of(folder: Path, config: Config) -> str:
    """A digest of all that a run is made of: settings, the files that they name, and what computes."""
    inputs = config.model_copy(update={"out": None}).model_dump(mode="json")
    said = json.dumps([inputs, this_machine(), openblas.stream_count()], sort_keys=True)
    digest = hashlib.sha256(said.replace(str(folder), "").encode())
    named = {value for part in inputs.values() if isinstance(part, dict) for value in part.values()
             if isinstance(value, str) and value.startswith(str(folder))}  # fmt: skip
    for path in map(Path, sorted(named)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:32]


def copied(folder: Path, target: Path, out: str = "run") -> Run:
    """The run `out` of a folder with its model and pairs, in `target`, as if it had been trained there."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return _moved(target / out, str(folder), target)


def _moved(run: Path, before: str, folder: Path) -> Run:
    """A run whose files lay below `before` and now lie below `folder`."""
    for name in ("config.yaml", "manifest.json", "paths.json"):
        if (run / name).exists():
            (run / name).write_text((run / name).read_text("utf-8").replace(before, str(folder)), "utf-8")
    return Run.open(run)


def untrain(run: Run) -> Run:
    """The same run with an adapter that does nothing."""
    file = run.adapter / "adapters.safetensors"
    arrays = mx.load(str(file))
    mx.save_safetensors(str(file), {k: mx.zeros_like(v) if "lora_b" in k else v for k, v in arrays.items()})
    return run
