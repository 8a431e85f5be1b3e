"""How long a run trains: explicit steps, and a run that goes on for longer than it was asked at first."""

import pytest
from tiny_runs import adapter_bytes, assert_same, finish, interrupted, numbers, recipe, stop_after, write_pairs

from mlxdpo.cli import run as command
from mlxdpo.config import load_config
from mlxdpo.runs import Run, with_length
from mlxdpo.training import run as story
from mlxdpo.training.plan import learning_rate, steps_asked

pytestmark = pytest.mark.usefixtures("cache")
# A rate that does not depend on the total: a run that was made longer is then the long one, to the bit.
STEADY = {
    "lora": {"dropout": 0.1},
    "data": {"eval_fraction": 0.4},
    "optim": {"schedule": "constant", "warmup": 2},
    "train": {"eval_every": 2, "save_every": 3},
}


def asked(**train):
    return load_config(None, {"train": train}).train


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({}, 9),
        ({"epochs": 2}, 6),
        ({"epochs": 0.5}, 2),
        ({"steps": 2}, 2),
        ({"steps": 100}, 100),
        ({"steps": 100, "epochs": 1}, 3),
        ({"steps": 4, "epochs": 9}, 4),
    ],
)
def test_steps_that_are_asked_for_are_taken(train, steps):
    assert steps_asked(asked(**train), 3) == steps


def notes(events):
    return [event.values["text"] for event in events if event.kind == "note"]


def test_explicit_steps_take_as_many_passes_as_they_need(tmp_path):
    events = finish(recipe(tmp_path, train={"steps": 12}))
    assert [event.step for event in events if event.kind == "step"] == list(range(1, 13))
    assert "train.steps 12 takes 2.4 passes over the pairs, 5 steps each" in notes(events)
    assert finish(recipe(tmp_path, "one", train={"epochs": 1}))[-1].step == 5


def test_where_both_are_given_what_runs_is_said(tmp_path):
    events = finish(recipe(tmp_path, train={"steps": 100, "epochs": 1}))
    assert events[-1].step == 5
    said = "asked for: train.steps 100 and train.epochs 1, which is 5 steps; the fewer will run, 5 steps"
    assert said in notes(events)


def batches_of(monkeypatch, config, run=None):
    """The batches that a training takes, step by step."""
    taken, real = [], story.run_loop

    def watched(state, progress, should_stop):
        taken.extend(state.plan.batches(step) for step in range(progress.step, state.plan.steps))
        return real(state, progress, should_stop)

    monkeypatch.setattr(story, "run_loop", watched)
    finish(config, run)
    monkeypatch.setattr(story, "run_loop", real)
    return taken


@pytest.mark.parametrize("longer", [{"epochs": 3}, {"steps": 11}])
def test_a_finished_run_goes_on_as_the_longer_run_would_have(tmp_path, monkeypatch, longer):
    """The batches are those of the long run, and with a rate that does not depend on the total so is every byte."""
    long = recipe(tmp_path, "long", **STEADY | {"train": STEADY["train"] | longer})
    expected = batches_of(monkeypatch, long)
    first = recipe(tmp_path, "short", **STEADY)
    taken = batches_of(monkeypatch, first)
    run, done = Run.open(first.out), len(taken)
    before = (run.path / "config.yaml").read_bytes()
    taken += batches_of(monkeypatch, with_length(run.config(), longer), run)
    assert done < len(taken) == len(expected) and taken == expected
    assert adapter_bytes(run.path) == adapter_bytes(long.out)
    steps = lambda folder: [line for line in numbers(folder) if "loss" in line]  # noqa: E731
    assert steps(run.path) == steps(long.out)
    assert (run.path / "config.yaml").read_bytes() == before
    assert steps_asked(run.config().train, 4) == len(taken)


def test_the_rate_goes_on_where_the_schedule_over_the_new_total_has_it(tmp_path):
    config = recipe(tmp_path, optim={"warmup": 0.1})
    finish(config)
    run = Run.open(config.out)
    events = finish(with_length(run.config(), {"epochs": 3}), run)
    rates = {event.step: event.values["learning_rate"] for event in events if event.kind == "step"}
    assert rates == {step + 1: learning_rate(config.optim, step, 15) for step in range(5, 15)}
    rate = learning_rate(config.optim, 5, 15)
    said = f"5 steps done, 10 to go; the learning rate continues at {rate:.3g}, as the cosine schedule over all 15"
    assert any(text.startswith(said) for text in notes(events))


def test_a_longer_run_that_is_stopped_goes_on_without_being_told_again(tmp_path):
    sections = STEADY | {"optim": {"schedule": "cosine"}}
    configs = [recipe(tmp_path, name, **sections) for name in ("straight", "stopped")]
    for config in configs:
        finish(config)
    straight, stopped = (Run.open(config.out) for config in configs)
    finish(with_length(straight.config(), {"epochs": 3}), straight)
    events = finish(with_length(stopped.config(), {"epochs": 3}), stopped, stop=stop_after(16))
    assert events[-1].kind == "interrupted" and 4 < events[-1].step < 12
    finish(stopped.config(), stopped)
    assert_same(stopped.path, straight.path)
    assert stopped.continued() == [{"step": 4, "epochs": 3.0, "steps": None, "patience": None}]


def test_a_stopped_run_can_be_made_longer_on_the_way(tmp_path):
    run, step = interrupted(recipe(tmp_path, **STEADY), stop_after(15))
    assert 0 < step < 4
    assert finish(with_length(run.config(), {"epochs": 2}), run)[-1].step == 8


@pytest.fixture
def done(tmp_path, monkeypatch):
    """A finished run of five steps, seen from its folder."""
    monkeypatch.chdir(tmp_path)
    finish(recipe(tmp_path))
    return Run.open("run")


REFUSED = {
    "--loss.beta 0.2": "drop --loss.beta (only train.epochs, train.steps, train.patience may change)",
    "--train.epochs 3 --train.seed 1": "drop --train.seed (only",
    "--out other": "drop --out (only",
    "--train.steps 3": "5 steps done, and what was asked for ends after 3; ask for more with --train.epochs",
}


@pytest.mark.parametrize("options", REFUSED)
def test_other_settings_do_not_change_on_the_way(done, capsys, options):
    before = {path: path.read_bytes() for path in sorted(done.path.rglob("*")) if path.is_file()}
    assert command(["train", "--resume", "run", *options.split()]) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(done.path.rglob("*")) if path.is_file()} == before


def test_from_the_command_line_a_finished_run_trains_on(done, capsys):
    assert command(["train", "--resume", "run", "--train.epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "resuming from step 5/10" in out and "step 10/10" in out
    assert command(["train", "--resume", "run"]) == 0  # nothing is left to do
    assert "step 10/10  " not in capsys.readouterr().out


def test_thirty_three_pairs_and_twenty_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)
    write_pairs(tmp_path / "few.jsonl", 33)
    words = "train --model llama --data few.jsonl --data.template plain --data.eval-fraction 0 --train.steps 20"
    assert command([*words.split(), "--lora.layers", "1", "--log.every-steps", "10", "--out", "r"]) == 0
    assert "step 20/20" in capsys.readouterr().out
