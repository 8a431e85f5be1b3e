"""A long run on a tiny model: does anything grow? Memory, open files, shapes of the compiled step, time of a step.

python -m benchmarks.soak --steps 5000 [--json FILE] [--docs FILE]

Model, tokenizer and pairs are made here. Over the last four fifths of the run a line is fitted to each number. Its
slope has a 95 % interval from the means of `BLOCKS` blocks (batch means): readings that follow one another depend on
each other, and an interval from single readings would be too narrow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models
from tiny_runs import recipe

from mlxdpo.data import batch_shapes
from mlxdpo.io.atomic import write_text
from mlxdpo.machine import device
from mlxdpo.training import step
from mlxdpo.training.run import train

BLOCKS, SETTLED = 20, 0.2
UNITS = {"rss": "MB", "active": "MB", "cache": "MB", "files": "", "shapes": "", "busy": "ms", "seconds": "ms"}
NAMES = {
    "rss": "memory of the process (RSS)",
    "active": "MLX, active",
    "cache": "MLX, cache",
    "files": "open files",
    "shapes": "shapes that the compiled step met",
    "busy": "a step, time of the processor",
    "seconds": "a step, time on the wall (whatever else the machine does)",
}
MARKS = ("<!-- soak: begin -->", "<!-- soak: end -->")


class Line(NamedTuple):
    """A number over a run: its mean, and its slope in 1,000 steps with a 95 % interval."""

    mean: float
    slope: float
    low: float
    high: float


def resident() -> float:
    """Memory of this process, MB."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(told.stdout) / 1e3


def watched(seen: set[Any]) -> Callable[..., Any]:
    """`platform.compiled`, noting the shapes that each function is called with: what it is traced for."""

    def compiled(function: Any, **options: Any) -> Any:
        """`platform.compiled`, watched."""
        traced = device.compiled(function, **options)

        def called(*arguments: Any) -> Any:
            """The traced function, its shapes noted."""
            shapes = [(n, a.shape, str(a.dtype)) for n, a in tree_flatten(list(arguments)) if isinstance(a, mx.array)]
            seen.add((function.__qualname__, tuple(shapes)))
            return traced(*arguments)

        return called

    return compiled


def readings(folder: Path, steps: int) -> Iterator[dict[str, float]]:
    """What the process holds after every `every`-th step; times are means of the steps since the last reading."""
    settings = {"epochs": float(steps), "steps": steps, "eval_every": 250, "save_every": 100, "keep_checkpoints": 2}
    config, seen = recipe(folder, data={"eval_fraction": 0.2}, train=settings), set()
    every, before = max(1, min(10, steps // 100)), (step.compiled, batch_shapes.most_traces)
    # Shapes as on a GPU, which keeps a trace for each; on a CPU nothing is compiled, and they are not limited.
    step.compiled, batch_shapes.most_traces = watched(seen), lambda: device.TRACES  # type: ignore[assignment]
    try:
        last, spent = _clocks(), np.zeros(2)
        for event in train(config):
            now = _clocks()
            if event.kind == "step":
                spent += now - last
                if event.step % every == 0:
                    yield {
                        "step": event.step,
                        "rss": resident(),
                        "active": mx.get_active_memory() / 1e6,
                        "cache": mx.get_cache_memory() / 1e6,
                        "files": len(os.listdir("/dev/fd")),
                        "shapes": len(seen),
                        "busy": float(spent[0]) / every,
                        "seconds": float(spent[1]) / every,
                    }
                    spent = np.zeros(2)
            last = _clocks()  # evaluations and checkpoints lie between events and are left out
    finally:
        step.compiled, batch_shapes.most_traces = before


def _clocks() -> np.ndarray:
    """(2,) seconds: processor and wall."""
    return np.array([time.process_time(), time.perf_counter()])


def fit(steps: Sequence[float], values: Sequence[float]) -> Line:
    """A line through block means of the settled part."""
    settled = np.asarray(steps) > SETTLED * steps[-1]
    x, y = np.asarray(steps, float)[settled] / 1000, np.asarray(values, float)[settled]
    blocks = [(a.mean(), b.mean()) for a, b in zip(np.array_split(x, BLOCKS), np.array_split(y, BLOCKS), strict=True)]
    found = stats.linregress(*zip(*blocks, strict=True))
    half = stats.t.ppf(0.975, BLOCKS - 2) * (found.stderr if np.ptp(y) else 0.0)  # a constant has no error
    return Line(float(y.mean()), float(found.slope), float(found.slope - half), float(found.slope + half))


def lines(found: Sequence[Mapping[str, float]]) -> dict[str, Line]:
    """The line of every number."""
    return {name: fit([r["step"] for r in found], [r[name] for r in found]) for name in UNITS}


def table(found: Sequence[Mapping[str, float]]) -> str:
    """As Markdown."""
    fitted, last = lines(found), int(found[-1]["step"])
    rows = [
        f"{last:,} steps; the figures are over the last {int(last * (1 - SETTLED)):,}.",
        "",
        "| | mean | grows in 1,000 steps | 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, line in fitted.items():
        scale, unit = (1e3 if UNITS[name] == "ms" else 1.0), f" {UNITS[name]}".rstrip()
        mean, slope, low, high = (scale * value for value in line)
        rows.append(f"| {NAMES[name]} | {mean:.2f}{unit} | {slope:+.3f}{unit} | [{low:+.3f}, {high:+.3f}] |")
    return "\n".join(rows)


def write_docs(file: Path, text: str) -> None:
    """Put the table between its marks."""
    before, _, rest = file.read_text("utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    write_text(file, f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["MLXDPO_CACHE"] = f"{name}/cache"
        found = list(readings(Path(name), asked.steps))
    if asked.json:
        write_text(asked.json, json.dumps(found))
    print(table(found))
    if asked.docs:
        write_docs(asked.docs, table(found))


if __name__ == "__main__":
    main()
