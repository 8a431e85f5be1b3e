"""Trackers get every number once and are closed, whatever happens; a missing library is said before anything loads."""

import pytest

from mlxdpo.commands import trackers
from mlxdpo.config import load_config
from mlxdpo.runs import Run
from mlxdpo.types import Event, UserError


def test_numbers_go_to_the_tracker_and_it_is_closed(tmp_path, monkeypatch):
    seen, closed = [], []
    tracker = trackers.Tracker(lambda values, step: seen.append((step, values)), lambda: closed.append(1))
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda path, config: tracker)
    config = load_config(None, {"log": {"trackers": ["tensorboard"]}})
    events = [
        Event("start", 0, {"run": Run(tmp_path)}),
        Event("step", 1, {"loss": 0.5}),
        Event("note", 1, {"text": "x"}),
        Event("eval", 1, {"eval_loss": 0.6}),
    ]
    assert list(trackers.tracked(events, config)) == events
    assert seen == [(1, {"loss": 0.5}), (1, {"eval_loss": 0.6})] and closed == [1]

    def broken():
        yield events[0]
        raise UserError("stop")

    with pytest.raises(UserError):
        list(trackers.tracked(broken(), config))
    assert closed == [1, 1]


def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.trackers has wandb, but wandb is not installed: pip install wandb"):
        trackers.check_trackers(load_config(None, {"log": {"trackers": ["wandb"]}}))
