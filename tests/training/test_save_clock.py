"""Checkpoints by the clock: beside those by step, of which they change neither the numbers nor how many are kept."""

import itertools
import threading
import time

import pytest
from tiny_runs import assert_same, finish, recipe
from together import simulated

from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, loop
from mlxdpo.training.checkpoint import SaveClock
from mlxdpo.training.run import train


@pytest.fixture
def stopwatch(monkeypatch):
    """A stopwatch that stands still until its hand is moved."""
    hand = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: hand[0])
    return hand


def test_it_is_due_when_the_minutes_are_over_and_begins_again(stopwatch):
    clock = SaveClock(0.5)
    seen = []
    for second in (0.0, 29.9, 30.0, 31.0):
        stopwatch[0] = second
        seen.append(clock.due())
    clock.restart()
    stopwatch[0] = 60.9
    assert (*seen, clock.due()) == (False, False, True, True, False)
    stopwatch[0] = 61.0
    assert clock.due()


def test_zero_minutes_are_never_over(stopwatch):
    clock = SaveClock(0)
    stopwatch[0] = 1e9
    assert not clock.due()


STEPS = {"save_every": 3, "keep_checkpoints": 2, "save_minutes": 10.0, "sample_every": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Five steps without a clock."""
    folder = tmp_path_factory.mktemp("clock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        finish(recipe(folder, "straight", train=STEPS | {"save_minutes": 0.0}))
        yield folder


@pytest.fixture
def ten_minute_steps(monkeypatch):
    """Every look at the stopwatch is 200 s later, and a step takes three."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 200.0).__next__)


def test_the_newest_by_the_clock_is_kept_and_no_number_changes(place, ten_minute_steps):
    config, found = recipe(place, "timed", train=STEPS), []
    for event in train(config):
        if event.kind == "checkpoint":
            found.append([checkpoint.step_of(path) for path in checkpoint.steps(Run.open(config.out).checkpoints)])
    assert found == [[1], [2], [3], [3, 4], [3, 5]]
    assert_same(config.out, place / "straight")
    assert [path.name for path in checkpoint.steps(place / "straight" / "checkpoints")] == [
        "step-000003", "step-000005",
    ]  # fmt: skip


def test_a_killed_run_goes_on_from_the_clocks_checkpoint_to_the_same_bytes(place, ten_minute_steps):
    config = recipe(place, "killed", train=STEPS)
    events = train(config)
    assert next(event for event in events if event.kind == "step" and event.step == 5)
    events.close()  # what is saved is step 4, by the clock
    run = Run.open(config.out)
    assert checkpoint.steps(run.checkpoints)[-1].name == "step-000004"
    events = finish(run.config(), resume=run)
    assert next(event for event in events if event.kind == "resumed").step == 4
    assert_same(config.out, place / "straight")


def test_a_copy_that_somebody_keeps_there_is_left_alone(tmp_path):
    for name in ("step-000002", "step-000004", "step-000006", "step-000002-good"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 1, (), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002-good", "step-000006"]


def test_the_best_checkpoint_outlives_the_clock(tmp_path):
    for step in (3, 4, 8, 9):
        checkpoint.folder_of(tmp_path, step).mkdir()
    checkpoint.prune(tmp_path, 2, {3}, 4)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000003", "step-000008", "step-000009"]


@pytest.mark.parametrize("fast", [0, 1], ids=["the first", "another"])
def test_processes_go_by_the_clock_of_the_first(fast, monkeypatch):
    """Whose clock says so: all save or none does, and nobody waits for an answer that does not come."""
    clocks = threading.local()
    monkeypatch.setattr(SaveClock, "due", lambda clock: clocks.due)
    state = type("State", (), {})

    def work(peers):
        clocks.due = peers.rank == fast
        mine = state()
        mine.group, mine.config = peers, recipe_with_minutes
        return loop._by_the_clock(mine, SaveClock(10))

    recipe_with_minutes = type("Config", (), {"train": type("Train", (), {"save_minutes": 10.0})})
    assert simulated(3, work) == [fast == 0] * 3
