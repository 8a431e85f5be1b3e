"""Whole processes, killed and interrupted: at any moment the run directory reads, and goes on to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_runs import adapter_bytes, finish, recipe

from mlxdpo import checkpoint
from mlxdpo.config import dump_config, load_config
from mlxdpo.runs import Run, read_lines

pytestmark = pytest.mark.processes
MOMENTS, SEED = 20, 20
# Many short steps with a checkpoint each: most of the time something is being written.
BUSY = {
    "data": {"eval_fraction": 0.4},
    "lora": {"dropout": 0.1},
    "train": {"epochs": 8, "eval_every": 3, "save_every": 1, "keep": 2},
}
STEPS = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, the pairs, a cache, and the straight run."""
    folder = tmp_path_factory.mktemp("kill")
    patch = pytest.MonkeyPatch()
    patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
    try:
        assert start(folder, "straight").wait(120) == 0
        yield folder
    finally:
        patch.undo()


def call(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "mlxdpo.cli", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def start(folder, out):
    """`mlxdpo train RECIPE` in a process of its own; what it says fits the pipe (64 kB)."""
    file = folder / f"{out}.yaml"
    file.write_text(dump_config(recipe(folder, out, **BUSY)))
    return call([str(file)])


def resume(run):
    return call(["--resume", str(run)])


def check_readable(path: Path):
    """Every file that carries its final name is whole; metrics hold every step up to the last checkpoint."""
    for file in path.rglob("*"):
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue  # drafts: no reader looks at them
        if file.suffix == ".json":
            json.loads(file.read_text("utf-8"))
        elif file.suffix == ".safetensors":
            mx.eval(mx.load(str(file)))
        elif file.suffix == ".yaml":
            load_config(file)
        else:
            assert file.name == "metrics.jsonl" and all(isinstance(line, dict) for line in read_lines(file))
    saved = checkpoint.steps(path / "checkpoints")
    for folder in saved:
        assert {file.name for file in folder.iterdir()} == {
            "adapters.safetensors",
            "adapter_config.json",
            "optimizer.safetensors",
            "state.json",
        }
        assert checkpoint.read_progress(folder).step == int(folder.name.removeprefix("step-"))
    last = checkpoint.read_progress(saved[-1]).step if saved else 0
    steps = [line["step"] for line in Run(path).metrics() if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last
    return last


def check_finished(path, straight):
    assert adapter_bytes(path) == adapter_bytes(straight)
    assert [p.name for p in checkpoint.steps(path / "checkpoints")][-1] == f"step-{STEPS:06d}"
    assert [line["step"] for line in Run.open(path).metrics() if "loss" in line] == list(range(1, STEPS + 1))
    assert [p for p in path.rglob(".*")] == []  # what the killed run left half done is gone
    check_readable(path)


def kill(process, path, draw, after):
    """`kill -9` a little after step `after` is on record (step 0: at any time from the process's own start on).

    Moments are counted in steps, not in seconds: how long a step takes depends on what else the machine does.
    """
    while after and process.poll() is None and last_step(path) < after:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05) if after else draw.uniform(0, 3))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def last_step(path):
    """The newest step in a run's metrics, 0 without any."""
    return max((line.get("step", 0) for line in read_lines(path / "metrics.jsonl")), default=0)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(place):
    folder, draw, reached = place, random.Random(SEED), []
    for number in range(MOMENTS):
        path = folder / f"kill-{number}"
        kill(start(folder, path.name), path, draw, after=draw.randint(1, STEPS - 2) if number % 4 else 0)
        if not (path / "config.yaml").exists():  # killed before there was a run: the command itself starts again
            reached.append(None)
            assert start(folder, path.name).wait(120) == 0
        else:
            reached.append(check_readable(path))
            if number % 5 == 0:
                assert resume(path).wait(120) == 0
            else:
                run = Run.open(path)
                finish(run.config(), run)
        check_finished(path, folder / "straight")
    print(f"killed after steps {reached}")
    assert len({step for step in reached if step and step < STEPS}) >= 5, reached  # moments that matter were hit


def test_killed_again_and_again_it_still_arrives(place):
    folder, draw, path = place, random.Random(SEED + 1), place / "again"
    process = start(folder, path.name)
    for after in (3, 9, 16, 24):
        kill(process, path, draw, after)
        process = resume(path) if (path / "config.yaml").exists() else start(folder, path.name)
    assert process.wait(120) == 0
    check_finished(path, folder / "straight")


def wait_for_step(path, step, process):
    until = time.monotonic() + 120
    while last_step(path) < step:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted_it_saves_says_how_to_go_on_and_does(place, number):
    folder = place
    path = folder / f"interrupt-{int(number)}"
    process = start(folder, path.name)
    wait_for_step(path, 4, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.rstrip().endswith(f"stopped; go on with: mlxdpo train --resume {path}") and "Traceback" not in said
    last = check_readable(path)
    assert 4 <= last < STEPS and Run.open(path).metrics()[-1]["step"] == last  # the last whole step is saved
    assert not (path / "adapter").exists()
    process = resume(path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"going on from step {last}/{STEPS}" in said
    check_finished(path, folder / "straight")


def test_refusals_exit_2_with_one_sentence(place):
    folder = place
    process = call(["--resume", str(folder / "nowhere")])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == f"error: {folder}/nowhere: no config.yaml there; expected a run directory such as runs/NAME\n"
    process = start(folder, "straight")
    said, _ = process.communicate(timeout=60)
    path = folder / "straight"
    assert process.returncode == 2 and said.endswith(
        f"error: {path} already holds a run; choose another --out or continue it with --resume {path}\n"
    )
