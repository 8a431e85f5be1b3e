"""`mlxdpo tune`: from pairs to a verdict in one command, and what a training says at its end."""

import pytest
from tiny_runs import finish, recipe, write_pairs

from mlxdpo.cli import run as command
from mlxdpo.commands import tune
from mlxdpo.commands.terminal import show_training
from mlxdpo.config import load_config
from mlxdpo.runs import Run
from mlxdpo.training import pace
from mlxdpo.types import Event, UserError
from mlxdpo_eval.outcome import Outcome, longer, outcome_sentences


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path)  # writes the model and the pairs
    write_pairs(tmp_path / "pairs.jsonl", 40)
    return config


def test_one_command_checks_plans_trains_evaluates_and_says_what_to_do(place, tmp_path, capsys):
    out = tmp_path / "tuned"
    words = ["tune", str(tmp_path / "pairs.jsonl"), "--model", place.model.path, "--out", str(out), "--no-open"]
    assert command([*words, "--time", "10m", "--data.eval-fraction", "0.3"]) == 0
    said = capsys.readouterr().out
    for part in (
        "1/4 the data",
        "2/4 the plan",
        "3/4 training",
        "4/4 the evaluation",
        "comparing greedy answers before and after; held-out prompts: 7",
        "greedy answers",
        "next: mlxdpo app ",
        "next: mlxdpo export ",
    ):
        assert part in said
    assert said.count("rejected: ") == 1, "the first row and the plan are shown once"
    assert said.count("a pass: ") == 1
    assert "7 prompts are held out" in said and "33 training pairs, 7 held out" in said
    assert (out / "report.html").exists()
    written = load_config(out / "config.yaml")
    assert written.optim.lr != "auto" and written.train.steps and written.train.minutes is None


@pytest.mark.parametrize(("text", "minutes"), [("1h", 60), ("90m", 90), ("1h30m", 90), ("45s", 0.75), ("1.5h", 90)])
def test_a_length_of_time(text, minutes):
    assert tune.minutes_of(text) == minutes


def test_a_share_of_held_out_prompts_that_cannot_be_is_refused_before_anything_is_read(place, tmp_path, capsys):
    words = ["tune", str(tmp_path / "pairs.jsonl"), "--model", place.model.path, "--no-open"]
    assert command([*words, "--data.eval-fraction", "1.5"]) == 2
    shown = capsys.readouterr()
    assert "data.eval_fraction" in shown.err and "the data" not in shown.out


@pytest.mark.parametrize("text", ["", "60", "h", "1d", "-1h", "1h later"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UserError, match="expected a length such as"):
        tune.minutes_of(text)


def test_minutes_become_steps_that_fit(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(pace, "measure_pace", lambda state, stop: pace.Pace(10.0, 10.0 * state.plan.steps))
    monkeypatch.setattr("mlxdpo.training.run.measure_pace", pace.measure_pace)
    config = recipe(tmp_path, "short", train={"epochs": 2.0, "minutes": 1.0})
    events = finish(config)
    assert events[-1].step == 5  # of 10 steps of 10 s, in 90 % of a minute
    assert any("train.minutes 1 is enough for 5" in e.values["text"] for e in events if e.kind == "note")
    written = load_config(Run.open(config.out).path / "config.yaml").train
    assert (written.steps, written.minutes, written.epochs) == (5, None, "auto")


def test_a_pace_is_measured_and_leaves_nothing_behind(tmp_path, cache):
    plain = recipe(tmp_path, "plain", train={"epochs": 1.0})
    timed = recipe(tmp_path, "timed", train={"epochs": 1.0, "minutes": 1000.0})
    first, second = ([e.values["loss"] for e in finish(config) if e.kind == "step"] for config in (plain, timed))
    assert first == second


def test_what_happened_is_said_with_the_next_command(tmp_path, cache):
    config = recipe(tmp_path, "run", data={"eval_fraction": 0.3})
    finish(config)
    run = Run.open(config.out)
    heldout = {"eval_rewards/margins": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/chosen": -0.2}
    changed = outcome_sentences(Outcome(5, 8, 0.25), heldout, run)
    assert changed[0] == "changed: 5 of 8 greedy answers to held-out prompts; KL 0.25 nats an answer"
    assert "margin +0.500, accuracy 0.75" in changed[1] and "2.00 nats less likely" in changed[1]
    assert f"mlxdpo eval {run.path}" in changed[2]
    unmoved = outcome_sentences(Outcome(0, 8, 0.0), heldout, run)[-1]
    assert "answers as before" in unmoved and f"mlxdpo train --resume {run.path} {longer(run)}" in unmoved


def test_the_steps_that_the_minutes_leave_are_the_total_that_is_shown(capsys):
    events = [Event("note", 0, {"text": "cut", "steps": 2}), Event("step", 1, {"loss": 0.5, "seconds_left": 3.0})]
    assert list(show_training(events)) == events
    assert "step 1/2  loss 0.5000" in capsys.readouterr().out


def test_train_ends_with_what_changed(place, tmp_path, capsys):
    words = ["train", "--model", place.model.path, "--data", str(tmp_path / "pairs.jsonl"), "--optim.lr", "1e-3"]
    assert command([*words, "--data.template", "plain", "--out", str(tmp_path / "run"), "--train.steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "greedy answers to held-out prompts; KL" in said and "held-out pairs: margin" in said
