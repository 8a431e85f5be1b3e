"""The Train tab without a browser: the form is the schema, the command is the form, and a training lives on its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import adapter_bytes, finish, recipe, write_pairs

from mlxdpo.commands import train as train_command
from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui import choices, jobs
from mlxdpo.ui.jobs import log_tail
from mlxdpo.ui.runs.run_list import JOB, choose, state
from mlxdpo.ui.train import process, recipe_form, tab
from mlxdpo.ui.train.tab import complaint, estimate, estimate_html

BUSY = {
    "data": {"eval_fraction": 0.4},
    "train": {"epochs": 40, "eval_every": 10, "save_every": 5, "keep_checkpoints": 2},
}
STEPS = 160


def parsed(words):
    """The recipe that the real command line makes of these options."""
    got = []
    patch = pytest.MonkeyPatch()
    patch.setattr(train_command, "follow_training", lambda config, *_: got.append(config) or 0)
    try:
        from mlxdpo.cli import run

        assert run(["train", *words]) == 0
    finally:
        patch.undo()
    return got[0]


def test_every_knob_of_the_schema_is_in_the_form_with_its_help():
    found = {knob.name: knob for knob in recipe_form.knobs()}
    dumped = {}
    for section, value in Config().model_dump().items():
        names = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        dumped |= dict.fromkeys(names)
    assert found.keys() == dumped.keys() - {*recipe_form.CHOSEN, *recipe_form.NEVER}
    assert set(recipe_form.VISIBLE) <= found.keys() and all(knob.help for knob in found.values())
    assert found["model.quantize"].choices == ("4", "8") and found["model.quantize"].empty
    assert "ipo" in found["loss.name"].choices and "lion" in found["optim.name"].choices


@pytest.mark.parametrize("stage", ["dpo", "sft", "reward"])
def test_the_form_left_alone_is_the_default_recipe(stage):
    start = load_config(None, {"stage": stage})
    flat = recipe_form.flat(start.model_dump())
    values = {
        knob.name: recipe_form.entered(knob, recipe_form.form_value(knob, flat.get(knob.name, knob.default)))
        for knob in recipe_form.knobs()
    }
    assert recipe_form.to_config(values) == start
    assert recipe_form.flags(start) == ([] if stage == "dpo" else [f"--stage={stage}"])


NAMES = st.text("abcXYZ019._-/= ", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries({"path": NAMES, "revision": NAMES, "quantize": st.sampled_from([None, 4])}),
            "data": st.fixed_dictionaries(
                {"path": NAMES, "thinking": st.booleans(), "columns": st.just({"prompt": "--q", "chosen": "a b"})}
            ),
            "lora": st.fixed_dictionaries({"keys": st.none() | st.lists(NAMES, min_size=1, max_size=3)}),
            "optim": st.fixed_dictionaries(
                {"lr": st.floats(1e-9, 1e3), "betas": st.tuples(st.floats(0, 1), st.floats(0, 1))}
            ),
            "train": st.fixed_dictionaries(
                {"gradient_checkpointing": st.booleans(), "steps": st.none() | st.integers(1, 10**6)}
            ),
            "log": st.fixed_dictionaries({"trackers": st.lists(st.sampled_from(["wandb", "trackio"]), unique=True)}),
            "stage": st.sampled_from(["dpo", "sft"]),
        }
    )
)
def test_the_command_gives_the_same_recipe_whatever_is_entered(values):
    config = load_config(None, values)
    assert parsed(recipe_form.flags(config)) == config


def test_what_is_entered_comes_back():
    knobs = {knob.name: knob for knob in recipe_form.knobs()}
    for name, value in (
        ("data.columns", {"prompt": "q", "chosen": "good"}),
        ("lora.keys", ["self_attn.q_proj", "mlp.down_proj"]),
        ("log.trackers", ["wandb"]),
        ("model.quantize", "4"),
        ("train.steps", None),
        ("lora.alpha", None),
    ):
        assert recipe_form.entered(knobs[name], recipe_form.form_value(knobs[name], value)) == value
    assert recipe_form.entered(knobs["lora.rank"], None) == 16  # an emptied field is its default
    with pytest.raises(UserError, match=r"data\.columns is 'prompt'; write it as"):
        recipe_form.entered(knobs["data.columns"], "prompt")


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    """A working folder with a model, pairs, a recipe, and something outside of it that is nobody's business."""
    here = tmp_path / "work"
    here.mkdir()
    config = recipe(here, "runs/made", **BUSY)
    (here / "tiny.yaml").write_text(dump_config(config.model_copy(update={"out": None})))
    write_pairs(tmp_path / "outside.jsonl")
    (here / "runs").mkdir()
    monkeypatch.chdir(here)
    return here


def form(knobs, **given):
    """What the page sends: paths, then knobs at their defaults."""
    return tuple(given.get(n, "") for n in tab.PATHS) + tuple(
        given.get(k.name, recipe_form.form_value(k, k.default)) for k in knobs
    )


def test_what_is_offered(place):
    runs = place / "runs"
    assert choices.models(runs, place) == ["smollm2", "llama"]
    assert choices.data_files(runs, place) == ["pairs.jsonl"]
    assert list(choices.recipes(runs, place)) == [choices.DEMO, "tiny.yaml"]
    finish(recipe(place, "runs/one"))
    assert choices.adapters(runs) == [str(runs / "one" / "adapter")]
    assert "as in run one" in choices.recipes(runs, place)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.path", "../elsewhere/llama"),
        ("model.path", "/etc"),
        ("model.path", "./llama"),
        ("model.path", "runs/made"),
        ("data.path", "../outside.jsonl"),
        ("data.path", "owner/name:../../x"),
        ("data.eval", "owner/name"),
        ("model.adapter", "llama"),
        ("reference.model", "--out"),
    ],
)
def test_paths_are_chosen_never_typed(place, field, value):
    (place / "runs" / "made").mkdir()
    knobs = recipe_form.knobs()
    fine = {"model.path": "llama", "data.path": "pairs.jsonl"}
    assert tab._form_config(place / "runs", knobs, form(knobs, **fine)).data.path == "pairs.jsonl"
    with pytest.raises(UserError, match="neither in the list nor a Hub id"):
        tab._form_config(place / "runs", knobs, form(knobs, **fine | {field: value}))


def test_a_hub_id_is_taken_and_nothing_chosen_is_said(place):
    knobs = recipe_form.knobs()
    values = form(knobs, **{"model.path": "HuggingFaceTB/SmolLM2-135M", "data.path": "trl-lib/tldr-preference"})
    assert tab._form_config(place / "runs", knobs, values).model.path == "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(UserError, match="choose preference data first"):
        tab._form_config(place / "runs", knobs, form(knobs, **{"model.path": "llama"}))


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a b", "-x", "x" * 81, "a\nb"])
def test_a_run_has_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match="is not a valid name for a run"):
        process.run_path(tmp_path, name)


def test_the_name_left_empty_and_the_command_shown(place):
    knobs = recipe_form.knobs()
    values = form(knobs, **{"model.path": "llama", "data.path": "pairs.jsonl", "lora.rank": 4})
    (place / "runs" / "llama-pairs-1").mkdir()
    shown = tab._command(Path("runs"), knobs, "", values)
    assert shown == "mlxdpo train --model=llama --data=pairs.jsonl --lora.rank=4 --out=runs/llama-pairs-2"
    assert tab._command(Path("runs"), knobs, "", form(knobs)).startswith("# choose a model first")


def test_what_cannot_be_started_stopped_or_resumed_says_why(place):
    runs = Path("runs")
    run = finish(recipe(place, "runs/one"))[0].values["run"]
    for action, path, sentence in (
        (lambda p: process.start_training(runs, p.name, Config()), run.path, "already holds a run"),
        (process.resume_training, run.path, "one is finished"),
        (process.stop_training, run.path, "not being trained now"),
    ):
        with pytest.raises(UserError, match=sentence):
            action(path)
    with run.exclusive(), pytest.raises(UserError, match="started in a terminal; press Ctrl-C there"):
        process.stop_training(run.path)
    assert "No training yet" in tab.shown_training(runs, "../x")


def test_a_log_is_escaped(tmp_path):
    job = tmp_path / "bad" / JOB
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"pid": 1, "command": ["mlxdpo", "train"]}))
    (job / "log.txt").write_text("<script>alert(1)</script>\nstep 3/9 done\n")
    shown = tab.shown_training(tmp_path, "bad")
    assert "<script" not in shown and "&lt;script&gt;" in shown and "bad: failed." in shown
    assert process.watch(tmp_path / "bad").steps == 9


def test_a_living_training_shows_what_memory_it_holds_and_keeps(place, monkeypatch):
    """Read from the newest line; a run of an earlier version has no such numbers, and a stopped one holds nothing."""
    path = place / "runs" / "going"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}")
    line = {"step": 3, "loss": 0.5, "tokens_per_second": 70.0, "active_memory_gb": 1.25, "cache_memory_gb": 0.5}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(process, "state", lambda path: "training")
    assert "1.25 GB in use, 0.50 GB cached" in tab.training_html("going", process.watch(path))
    monkeypatch.setattr(process, "state", lambda path: "interrupted")
    assert "GB" not in tab.training_html("going", process.watch(path))
    monkeypatch.setattr(process, "state", lambda path: "training")
    (path / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    assert "GB" not in tab.training_html("going", process.watch(path))


def test_an_estimate_says_whether_it_fits():
    part = dict.fromkeys(
        ("weights", "trained", "gradients", "optimizer", "activations", "head", "reference", "in_flight"), 2_000_000
    )
    summary = {"steps": 1200, "pairs": 3000, "longest": 512, "waste": 0.25}
    plan = {"peak": 9 * 10**9, "phase": "backward", "parts": part, "machine": 10**10, "fits": False, "plan": summary}
    html = estimate_html(plan | {"change": [{"setting": "train.gradient_checkpointing true", "peak": 4 * 10**9}]})
    assert "It does not fit" in html and "Peak memory 9.00 GB of 10.00 GB" in html and "1,200 optimizer steps" in html
    assert "<code>train.gradient_checkpointing true</code>: 4.00 GB" in html and "2.0 MB" in html
    assert "It fits this machine." in estimate_html(plan | {"change": [], "fits": True})
    assert complaint("Traceback\nerror: x is wrong\nmore\n") == "x is wrong" and complaint("a\nb\n") == "b"


def wait_for(path, wanted):
    until = time.monotonic() + 600
    while (now := state(path)) not in wanted:
        assert time.monotonic() < until and now != "failed", (now, log_tail(path / JOB))
        time.sleep(0.02)
    return now


@pytest.mark.processes
def test_started_by_an_app_that_is_killed_stopped_and_resumed_it_reaches_the_same_bytes(place):
    config, runs = load_config("tiny.yaml"), Path("runs")
    app = (
        "import time; from pathlib import Path; from mlxdpo.config import load_config;"
        " from mlxdpo.ui.train import process;"
        " process.start_training(Path('runs'), 'one', load_config('tiny.yaml'));"
        " print('up', flush=True); time.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", app], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "up\n"
    started.send_signal(signal.SIGKILL)  # the app is gone; so are all its tabs
    started.wait()
    path = choose(runs, "one")
    assert state(path) in ("starting", "training")
    with pytest.raises(UserError, match="being trained already"):
        process.start_training(runs, "one", config)
    wait_for(path, ("training",))
    while not (process.watch(path).step or 0) >= 3:
        time.sleep(0.02)
    at = process.watch(path)
    assert at.steps == STEPS and at.rate > 0 and at.left >= 0 and at.command == "mlxdpo train --resume runs/one"
    assert "saved" in process.stop_training(path)
    assert wait_for(path, ("interrupted", "finished")) == "interrupted", "too short a run to be stopped"
    with pytest.raises(UserError, match="nothing to stop"):
        process.stop_training(path)
    assert log_tail(path / JOB).endswith("stopped; resume with: mlxdpo train --resume runs/one")
    process.resume_training(path)
    with pytest.raises(UserError, match="being trained already"):
        process.resume_training(path)
    wait_for(path, ("finished",))
    straight = finish(config.model_copy(update={"out": str(place / "straight")}))[-1].values["run"]
    assert adapter_bytes(path) == adapter_bytes(straight.path)
    assert [line["step"] for line in Run(path).metrics() if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.processes
def test_a_start_that_fails_is_found_with_its_reason_and_can_be_mended(place):
    config, runs = load_config("tiny.yaml"), Path("runs")
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"format": "hh"})})
    path = process.start_training(runs, "one", wrong)
    until = time.monotonic() + 600
    while state(path) == "starting" and time.monotonic() < until:
        time.sleep(0.05)
    assert state(path) == "failed" and "error: " in log_tail(path / JOB)
    process.start_training(
        runs, "one", config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    )
    until = time.monotonic() + 600
    while state(path) != "finished" and time.monotonic() < until:
        time.sleep(0.05)
    assert state(path) == "finished"


@pytest.mark.processes
def test_the_estimate_is_the_plan_commands(place):
    config = load_config("tiny.yaml")
    plan = estimate(config)
    assert plan["plan"]["steps"] == STEPS and plan["fits"] is True
    missing = config.model_copy(update={"data": config.data.model_copy(update={"path": "gone.jsonl"})})
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        estimate(missing)


def test_the_job_says_who_runs_it(place, monkeypatch):
    asked = []

    class Process:
        pid = os.getpid()
        wait = staticmethod(lambda: 0)

    monkeypatch.setattr(jobs.subprocess, "Popen", lambda words, **about: asked.append((words, about)) or Process())
    path = process.start_training(Path("runs"), "one", load_config("tiny.yaml"))
    words, about = asked[0]
    assert words[:5] == [sys.executable, "-P", "-m", "mlxdpo.cli", "train"] and "--out=runs/one" in words
    assert about["start_new_session"] is True and "shell" not in about
    assert json.loads((path / JOB / "job.json").read_text())["pid"] == os.getpid()


def test_code_of_a_model_is_not_run_from_the_page(tmp_path):
    assert "model.trust_remote_code" not in [knob.name for knob in recipe_form.knobs()]
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {path: m, trust_remote_code: true}\ndata: d.jsonl\n")
    with pytest.raises(UserError, match="use a terminal: mlxdpo train --resume"):
        process.resume_training(run)


def test_a_python_file_of_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    """The folder that the app was started in holds a `types.py` and a `yaml.py` of somebody's."""
    for name in ("types", "yaml", "mlxdpo"):
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(UserError):
        estimate(load_config(None, {"model": "nowhere", "data": "nothing.jsonl"}))
    assert not (tmp_path / "was-run").exists()
