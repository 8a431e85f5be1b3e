"""The command: `python -m benchmarks.peers --help`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import adapter, report, workloads
from benchmarks.peers.environments import FOLDER, MODULES, python_of, switches_of
from benchmarks.peers.measure import Entrant, measure
from benchmarks.peers.models import KINDS, random_model
from benchmarks.peers.worker import Worker

DESCRIPTION = "Measure mlxdpo against mlx-lm-lora, soup-cli and TRL, step by step. See benchmarks/peers/__init__.py."


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    known = [*workloads.WORKLOADS, workloads.EPOCH.name]
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=DESCRIPTION)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=known, help="default: all shapes, and `epoch` when --data is given")
    add("--sides", nargs="+", metavar="SIDE[:SWITCH+SWITCH]", help="default: those of each workload")
    add("--repeats", type=int, default=5, help="timed steps of each side, after one warm-up (default 5)")
    add("--data", type=Path, help="preference file for the `epoch` workload")
    add("--epoch-share", type=float, default=1.0, help="the first share of our epoch's steps; all sides see its pairs")
    add("--max-length", type=int, default=1024, help="tokens of a row of --data (default 1024)")
    add("--scale", type=float, default=1.0, help="multiply the lengths of all shapes, to try things out")
    models = ", ".join(("smollm2", *KINDS))
    add("--models", nargs="+", default=["smollm2"], help=f"{models}, llama-like folders, or all (default smollm2)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of each side (default: all cores)")
    add("--timeout", type=float, default=3600, help="seconds a step may take (default 3600)")
    add("--python", nargs="+", default=[], metavar="SIDE=PATH", help="use this interpreter instead of installing")
    add("--json", type=Path, help="keep the results here; other workloads in the file stay")
    add("--from", dest="source", type=Path, help="measure nothing, show this file")
    add("--docs", action="store_true", help="write docs/evidence/benchmarks.md and its plot")
    asked = parser.parse_args(words)
    asked.whole = asked.workloads is None
    if asked.whole:
        asked.workloads = known if asked.data else list(workloads.WORKLOADS)
    if "all" in asked.models:
        asked.models = ["smollm2", *KINDS]
    if workloads.EPOCH.name in asked.workloads and not asked.data and not asked.source:
        parser.error("the workload `epoch` needs --data FILE")
    for word in asked.python:
        if word.partition("=")[0] not in MODULES or "=" not in word:
            parser.error(f"--python {word}: expected SIDE=PATH with one of {', '.join(MODULES)}")
    for side in asked.sides or ():
        try:
            switches_of(side)
        except ValueError as error:
            parser.error(f"--sides {error}")
    return asked


def main() -> None:
    """Measure or read, print, and write what was asked for."""
    asked = parse()
    if asked.source:
        results = json.loads(asked.source.read_text("utf-8"))
    else:
        results = json.loads(asked.json.read_text("utf-8")) if asked.json and asked.json.exists() else {"workloads": {}}
        run(asked, results)
    print(report.table(results))
    if asked.docs:
        report.write_page(results)
        report.write_plot(results)


def run(asked: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure each workload asked for; `results`, and the file if any, hold it as soon as it is done."""
    from mlxdpo.model.policy import find_model, load_tokenizer

    for model in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            given, place = dict(word.split("=", 1) for word in asked.python), Path(folder, "model")
            words = find_model("smollm2" if model in KINDS else model)
            found = random_model(model, python_of("trl", given), place, words) if model in KINDS else words
            text = workloads.real_text(load_tokenizer(words, str(words)))
            # Of the random ones the first shape: what else a length changes, SmolLM2 shows.
            for name in asked.workloads[:1] if model in KINDS and asked.whole else asked.workloads:
                measure_workload(asked, results, name, model, found, text)


def measure_workload(
    asked: argparse.Namespace, results: dict[str, Any], name: str, model: str, found: Path, text: list[int]
) -> None:
    """One workload on one model, which lies in `found`; `text` is what its rows are cut from."""
    kind = KINDS.get(model)
    if name == workloads.EPOCH.name:
        shape = workloads.EPOCH
        plan = workloads.epoch_plan(asked.data, found, asked.epoch_share, asked.max_length)
        seen = sum(map(len, plan.steps["mlxdpo"]))
        what = f"{asked.data.name}, {seen} of {len(plan.pairs)} pairs, reference scoring included"
    else:
        shape = workloads.WORKLOADS[name]
        plan = workloads.shape_plan(shape, text, asked.scale, asked.repeats + 1)
        what = workloads.describe(shape, asked.scale)
    title = f"{name} {model}" if kind else name
    what = f"{what}, {kind.what}" if kind else what
    sides = asked.sides or [side for side in shape.sides if not kind or side in workloads.TRAINED]
    print(f"{title}: {shape.what}, {what}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        keys = kind.keys if kind else adapter.KEYS
        entrants = enter(asked, plan, sides, found, Path(folder), title.replace(" ", "-"), keys)
        records = measure(entrants, lambda line: print(f"  {line}", flush=True))
    results["workloads"][title] = {
        "what": shape.what,
        "shape": what,
        "same": plan.same,
        "scored": plan.scored,
        "beta": workloads.BETA,
        "machine": machine(asked.threads),
        "date": time.strftime("%Y-%m-%d"),
        "sides": {side: record.as_dict() for side, record in records.items()},
    }
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1), "utf-8")


def enter(
    asked: argparse.Namespace,
    plan: workloads.Plan,
    sides: list[str],
    model: Path,
    folder: Path,
    workload: str,
    keys: Sequence[str],
) -> dict[str, Entrant]:
    """What each side is started with. Shared files go to `folder`, each side's own below it."""
    from mlxdpo.machine.openblas import preload_blas

    given = dict(word.split("=", 1) for word in asked.python)
    blas = preload_blas()
    adapter.write_adapter(model, folder / "adapter.safetensors", keys)
    (folder / "pairs.json").write_text(json.dumps(plan.pairs), "utf-8")
    entrants = {}
    for side in sides:
        trainer, switches = switches_of(side)
        own = folder / side.replace(":", "-").replace("+", "-")
        own.mkdir()
        job = {
            "model": str(model),
            "adapter": str(folder / "adapter.safetensors"),
            "pairs": str(folder / "pairs.json"),
            "batches": plan.steps[trainer],
            "batch_size": plan.batch_size,
            "switches": switches,
            "threads": asked.threads,
            "blas": blas.note if blas.fast and blas.note else None,
            "folder": str(own),
            "rank": adapter.RANK,
            "scale": adapter.SCALE,
            "keys": list(keys),
            "lr": 1e-4,
            "beta": workloads.BETA,
        }
        command = [python_of(trainer, given), "-m", MODULES[trainer]]
        log = FOLDER / "logs" / f"{workload}-{own.name}.log"
        start = lambda c=command, f=log: Worker(c, f, asked.threads, asked.timeout)  # noqa: E731
        # A folder of its own: what is scored for the warm-up must not be there already when it counts.
        warm = None if plan.same else job | {"batches": job["batches"][:1], "folder": str(own / "warm")}
        if warm:
            (own / "warm").mkdir()
        entrants[side] = Entrant(start, job, [len(b) for b in job["batches"]], warm)
    return entrants


def machine(threads: int) -> str:
    """What computes here, in one line."""
    import platform

    from mlxdpo.machine.device import this_machine
    from mlxdpo.machine.openblas import blas_kernels

    here = this_machine()
    name = _processor() if here.kind == "cpu" else here.name
    kernels = f"OpenBLAS for {blas_kernels()}, " if here.kind == "cpu" and blas_kernels() else ""
    return f"{name}, {here.kind}, {threads} threads, {kernels}{here.memory / 1e9:.0f} GB, {platform.system()}"


def _processor() -> str:
    """The processor's name; Linux tells it only in a file."""
    import platform

    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
