"""Evaluate, Dial and Export from the page: what may be asked for, how it is started, what is shown of it."""

import json
import os
import sys

import pytest
from tiny_desk import finished_run

from mlxdpo.types import UserError
from mlxdpo.ui import jobs
from mlxdpo.ui.runs import tab, tasks
from mlxdpo.ui.runs.run_list import JOB


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    finished_run(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    found = []

    class Process:
        pid = os.getpid()
        wait = staticmethod(lambda: 3)

    monkeypatch.setattr(jobs.subprocess, "Popen", lambda words, **about: found.append((words, about)) or Process())
    return found


def test_each_task_is_the_command_that_one_would_type(place, asked):
    runs, path = place / "runs", place / "runs/one"
    tasks.start_task(runs, path, tasks.EVALUATE, "longest", 20)
    tasks.start_task(runs, path, tasks.MEASURE, "", 30)
    tasks.start_task(runs, path, tasks.EXPORT, ["mlx", "gguf"], 0.5)
    assert all(words[:4] == [sys.executable, "-P", "-m", "mlxdpo.cli"] for words, _ in asked)
    assert [words[4:] for words, _ in asked] == [
        ["eval", str(path), "--judge=longest", "--prompts=20"],
        ["dial", str(path), "--prompts=30"],
        ["export", str(path), "--to=mlx,gguf", f"--out={path / 'export'}", "--strength=0.5"],
    ]
    assert json.loads((path / JOB / "eval/job.json").read_text())["command"][:2] == ["mlxdpo", "eval"]
    assert "$ mlxdpo eval" in tasks.task_html(path, tasks.EVALUATE)


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (tasks.EVALUATE, ("evil.py:judge", 5)),
        (tasks.EVALUATE, ("endpoint:m@http://10.0.0.1", 5)),
        (tasks.MEASURE, (None, 5)),
        (tasks.EXPORT, (["../x"], 1)),
        (tasks.EXPORT, ([], 1)),
    ],
)
def test_only_what_is_offered_is_started(place, asked, task, values):
    with pytest.raises(UserError, match="choose"):
        tasks.start_task(place / "runs", place / "runs/one", task, *values)
    assert asked == []


def test_code_of_a_model_and_unfinished_runs_are_left_to_the_terminal(place, asked, tmp_path):
    run = finished_run(tmp_path).path
    text = (run / "config.yaml").read_text()
    assert "trust_remote_code: false" in text
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    with pytest.raises(UserError, match="runs Python code that comes with its model; use a terminal: mlxdpo eval"):
        tasks.start_task(tmp_path / "runs", run, tasks.EVALUATE, "", 5)
    (run / "adapter/adapters.safetensors").unlink()
    with pytest.raises(UserError, match="interrupted; wait until it is finished"):
        tasks.start_task(tmp_path / "runs", run, tasks.EVALUATE, "", 5)
    assert asked == []


def test_results_are_tables_with_the_strength_to_take_marked(place):
    path = place / "runs/one"
    assert "mlxdpo dial" in tasks.dial_html(path) and "Not exported" in tasks.export_html(path)
    point = {"accuracy": 0.5, "margin": 0.1, "loss": 0.6, "kl": 2.0, "win_rate": None}
    points = [{"strength": s} | point for s in (0.0, 1.0)]
    (path / "eval").mkdir()
    (path / "eval/dial.json").write_text(json.dumps({"points": points, "recommended": 1.0, "reason": "<b>"}))
    html = tasks.dial_html(path)
    assert "Take strength 1: &lt;b&gt;" in html and 'class="chosen"' in html and "<b>" not in html
    (path / "eval/dial.json").write_text("{}")
    assert 'role="alert"' in tasks.dial_html(path)
    assert "not part of a sweep" in tab.sweep_html(path)
