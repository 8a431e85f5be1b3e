"""Long runs: nothing grows with the steps, and a metrics file of a million lines opens at once, in app and report."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import finish, recipe

from mlxdpo.cli import run as cli
from mlxdpo.runs import Run
from mlxdpo.ui.runs import run_list, tab
from mlxdpo.ui.runs.curves import Tail, follow_metrics
from mlxdpo_eval.report.write import write_report

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
STEPS, LINES = 300, 1_000_000


def test_nothing_grows_with_the_steps(tmp_path):
    """Never the time: that is for `python -m benchmarks.soak`."""
    file = tmp_path / "soak.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--steps", str(STEPS), "--json", str(file)], check=True, cwd=ROOT
    )
    found = [reading for reading in json.loads(file.read_text()) if reading["step"] > STEPS / 5]
    assert found[-1]["step"] == STEPS and len(found) > 50
    for name in ("files", "shapes"):
        assert len({reading[name] for reading in found}) == 1, name
    grown = {name: max(r[name] for r in found) - found[0][name] for name in ("rss", "active", "cache")}
    assert grown["rss"] < 8 and grown["active"] < 0.2 and grown["cache"] < 2, grown


def test_a_million_lines_open_at_once_in_app_and_report(tmp_path, cache):
    finish(recipe(tmp_path, "runs/long", data={"eval_fraction": 0.5}))
    run = Run.open(tmp_path / "runs" / "long")
    small = ["--prompts", "4", "--samples", "2", "--max-tokens", "4"]
    assert cli(["eval", str(run.path), "--judge", "longest", *small]) == 0
    line = json.dumps({k: v for k, v in run.metrics()[-1].items() if k != "step"} | {"loss": 0.5})[1:]
    with (run.path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {n}, {line}\n' for n in range(1, LINES + 1))
    seconds = {"app": time.perf_counter()}
    tail = Tail(run.path / "metrics.jsonl")
    assert follow_metrics(tail) and "sample of its lines" in tab.charts(tail, {})
    assert run_list.summary_rows(run.path.parent)[0][4] == str(LINES)
    seconds["app"] = time.perf_counter() - seconds["app"]
    (run.path / "report.html").unlink()
    before = time.perf_counter()
    assert write_report(run).exists()
    seconds["report"] = time.perf_counter() - before
    size = (run.path / "metrics.jsonl").stat().st_size
    print(f"{size / 1e6:.0f} MB of metrics: app {seconds['app']:.2f} s, report {seconds['report']:.2f} s")
    assert max(seconds.values()) < 2
