"""The stages of the pipeline as the kill tests see them: how each is started, when it is at work, what it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiny_runs import adapter_bytes, recipe, write_pairs
from tiny_words import WORDS

from mlxdpo.config import dump_config, load_config
from mlxdpo.data.examples import open_examples
from mlxdpo.exporters.record import read_record
from mlxdpo.io.checksum import checksum_of, load_checksummed, read_checksummed_json
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.reference import read_table

LAUNCH = Path(__file__).with_name("launch.py")
MEMORY = {"peak_memory_gb", "active_memory_gb", "cache_memory_gb"}
CLOCK = {"tokens_per_second", "seconds_left"} | MEMORY  # what may differ between two runs
# Many short steps with a checkpoint each: most of the time something is being written.
BUSY = {
    "data": {"eval_fraction": 0.4},
    "lora": {"dropout": 0.1},
    "train": {"epochs": 8, "eval_every": 3, "save_every": 1, "keep_checkpoints": 2},
}
Found = Mapping[str, Any]


class Place(NamedTuple):
    """Where one process works: what is shared and finished (`base`), and a folder of its own (`own`)."""

    base: Path
    own: Path

    @property
    def cache(self) -> Path:
        """The cache folder of this process."""
        return self.own / "cache"


class Stage(NamedTuple):
    """command   the arguments of the process, the same at the start and to go on
    at_work   whether it has begun with what is to be killed
    left      what a killed process left, after a proof that every file of it reads; a short note for the record
    result    everything that must be the same to the bit in the end
    """

    command: Callable[[Place], list[str]]
    at_work: Callable[[Place], bool]
    left: Callable[[Place], str]
    result: Callable[[Place], Found]


def environment(place: Place) -> dict[str, str]:
    """Of a process at `place`."""
    return os.environ | {"MLXDPO_CACHE": str(place.cache), "PYTHONUNBUFFERED": "1"}


def start(place: Place, arguments: list[str]) -> subprocess.Popen:
    """A process of `launch.py`."""
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place.own,
        env=environment(place),
    )


def numbers(run: Path) -> list[dict[str, Any]]:
    """Its metrics without what the clock says."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in Run.open(run).metrics()]


def check_run(run: Path) -> int:
    """Every file of a run that carries its final name is whole, and metrics hold every step up to the last checkpoint;
    returns the step of that."""
    for file in run.rglob("*"):
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(run).parts):
            continue  # drafts: no reader looks at them
        if file.suffix == ".json":
            read_checksummed_json(file)
        elif file.suffix == ".safetensors":
            load_checksummed(file)
        elif file.suffix == ".yaml":
            load_config(file)
        else:
            assert file.name == "metrics.jsonl" and all(isinstance(line, dict) for line in read_lines(file))
    saved = checkpoint.steps(run / "checkpoints")
    for folder in saved:
        names = {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"}
        assert {file.name for file in folder.iterdir()} == names
        assert checkpoint.read_progress(folder).step == int(folder.name.removeprefix("step-"))
    last = checkpoint.read_progress(saved[-1]).step if saved else 0
    steps = [line["step"] for line in Run(run).metrics() if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last
    return last


def train_command(place: Place, **sections: Any) -> list[str]:
    """`mlxdpo train RECIPE` where there is no run yet, else `--resume`."""
    run = place.own / "run"
    if (run / "config.yaml").exists():
        return ["cli", "train", "--resume", str(run)]
    config = recipe(place.base, "run", **(BUSY | sections))
    file = place.own / "recipe.yaml"
    file.write_text(dump_config(config.model_copy(update={"out": str(run)})))
    return ["cli", "train", str(file)]


def left_run(place: Place) -> str:
    """What a killed training left."""
    run = place.own / "run"
    if not (run / "config.yaml").exists():
        return "no run yet"
    last = check_run(run)
    written = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    drafts = [p.name.split("-")[0] for p in run.rglob(".*") if p.name != ".training"]
    return f"checkpoint {last}, metrics {max(written, default=0)}{', a draft' if drafts else ''}"


def run_result(place: Place) -> Found:
    """Adapter, optimizer, metrics; nothing half done is left."""
    run = place.own / "run"
    check_run(run)
    assert list(run.rglob(".*")) == []
    last = checkpoint.steps(run / "checkpoints")[-1]
    state = checksum_of(load_checksummed(last / "optimizer.safetensors"))  # in any order: MLX keeps none
    return {"adapter": adapter_bytes(run), "optimizer": state, "metrics": numbers(run), "last": last.name}


SCORED = {
    "train": {"epochs": 1, "steps": 1, "batch_size": 2, "gradient_accumulation": 30},
    "data": {"eval_fraction": 0.0},
}


def scored_command(place: Place) -> list[str]:
    """A run of one large step: nearly all it does is scoring."""
    if not (place.base / "many.jsonl").exists():
        write_pairs(place.base / "many.jsonl", 60)
    return train_command(place, **SCORED | {"data": SCORED["data"] | {"path": str(place.base / "many.jsonl")}})


def tables(place: Place) -> dict[bytes, float]:
    """All that is kept of the reference."""
    found: dict[bytes, float] = {}
    for file in (place.cache / "reference").glob("[!.]*.safetensors"):
        found |= read_table(file)
    return found


def scoring(place: Place) -> bool:
    """Whether a part of the 120 rows is on the disk: 20 bytes each, besides the header."""
    files = (place.cache / "reference").glob("[!.]*.safetensors")
    return any(file.exists() and file.stat().st_size < 120 * 20 for file in files)


def left_table(place: Place) -> str:
    """The table a killed scoring left."""
    return f"{len(tables(place))} rows scored; {left_run(place)}"


def encode_command(place: Place) -> list[str]:
    """A run of one step on some thousand rows: nearly all it does is encoding."""
    if not (place.base / "thousands.jsonl").exists():
        write_pairs(place.base / "thousands.jsonl", 4000)
    sections = {"train": {"epochs": 1, "steps": 1, "gradient_accumulation": 1}, "data": {"eval_fraction": 0.1}}
    return train_command(place, **sections | {"data": sections["data"] | {"path": str(place.base / "thousands.jsonl")}})


def kept_pairs(place: Place) -> dict[str, bytes]:
    """The files of every data set that is kept, opened by its reader first."""
    found = {}
    for told in (place.cache / "pairs").glob("[!.]*/*/told.json"):
        read_checksummed_json(told)
        for part in ("train", "heldout"):
            open_examples(told.parent / part)
        files = (file for file in told.parent.rglob("*") if file.is_file())
        found |= {str(file.relative_to(place.cache)): file.read_bytes() for file in files}
    return found


def left_pairs(place: Place) -> str:
    """What a killed encoding left."""
    drafts = list((place.cache / "pairs").glob(".draft-*"))
    return f"{'kept' if kept_pairs(place) else 'not kept'}{', a draft' if drafts else ''}"


def export_command(place: Place) -> list[str]:
    """An export in place of an earlier one, or of none."""
    return ["cli", "export", str(place.base / "straight" / "run"), "--to", "mlx,peft", "--out", str(place.own / "out")]


def exported(place: Place) -> dict[str, bytes]:
    """The files of the export, read by its record."""
    out = place.own / "out"
    if not out.exists():
        return {}
    for target in read_record(out).targets.values():
        assert target.fidelity.passed
        for name, size in target.files.items():
            file = out / target.folder / name
            assert file.stat().st_size == size
            if file.suffix == ".safetensors":
                load_checksummed(file)
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def left_export(place: Place) -> str:
    """What a killed export left."""
    drafts = [p for p in place.own.glob(".out-*")]
    return f"{'whole' if exported(place) else 'none'}{f', {len(drafts)} drafts' if drafts else ''}"


def export_result(place: Place) -> Found:
    """The export; nothing half done is left."""
    assert list(place.own.glob(".out-*")) == []
    return exported(place)


def collect_command(place: Place) -> list[str]:
    """Answers to forty prompts."""
    prompts = place.base / "prompts.jsonl"
    if not prompts.exists():
        rows = [{"prompt": f"the {a} {b}"} for a in WORDS[:8] for b in WORDS[12:17]]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawing = ["--samples", "4", "--max-tokens", "8", "--batch-size", "4", "--unfinished", "keep"]
    run, out = str(place.base / "words" / "run"), str(place.own / "pairs.jsonl")
    return ["cli", "collect", run, "--prompts", str(prompts), "--reward", "longest", "--out", out, *drawing]


def left_collection(place: Place) -> str:
    """What a killed collection left."""
    lines = list(read_lines(place.own / "pairs.jsonl.partial"))
    rows = list(read_lines(place.own / "pairs.jsonl"))
    return f"{max(0, len(lines) - 1)} prompts answered, {len(rows)} rows written"


def collection(place: Place) -> Found:
    """Pairs, samples and report."""
    assert list(place.own.glob(".pairs*")) == [] and not (place.own / "pairs.jsonl.partial").exists()
    return {f.name: f.read_bytes() for f in sorted(place.own.iterdir()) if f.name.startswith("pairs")}


STAGES = {
    "train": Stage(train_command, lambda p: (p.own / "run" / "metrics.jsonl").exists(), left_run, run_result),
    "reference": Stage(
        scored_command,
        scoring,
        left_table,
        lambda p: {**run_result(p), "table": tables(p)},
    ),
    "encode": Stage(
        encode_command,
        lambda p: any((p.cache / "pairs").glob(".draft-*")),
        left_pairs,
        lambda p: {**run_result(p), **kept_pairs(p)},
    ),
    "export": Stage(export_command, lambda p: any(p.own.glob(".out-*")), left_export, export_result),
    "collect": Stage(collect_command, lambda p: (p.own / "pairs.jsonl.partial").exists(), left_collection, collection),
}
