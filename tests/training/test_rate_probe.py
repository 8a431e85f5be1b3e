"""`optim.lr: auto`: what probes find, that they leave nothing behind, that the recipe they settle repeats the run."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from tiny_runs import assert_same, finish, losses, recipe, write_pairs

from mlxdpo.config import OptimConfig, TrainConfig, load_config
from mlxdpo.runs import Run
from mlxdpo.training import rate_probe
from mlxdpo.training.plan import chosen_epochs, schedule_share, settled
from mlxdpo.training.rate_probe import (
    GOAL,
    MOST_DRIFT,
    PROBED,
    Moved,
    growth,
    next_rate,
    rates_note,
    rates_to_goal,
    way,
)
from mlxdpo.training.run import train

AUTO = {"lr": "auto", "warmup": 0.1}
LONG = {"epochs": 8.0, "save_every": 50, "eval_every": 0}  # enough steps to pay for probes


def auto(folder, out="auto", **sections):
    sections.setdefault("train", LONG)
    return recipe(folder, out, optim=AUTO, data={"eval_fraction": 0.2}, **sections)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A recipe with an open rate, all events of its run, and the run; nobody changes them."""
    folder = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        config = auto(folder, lora={"scale": 16.0})  # otherwise the largest rate does not reach the goal
        return config, finish(config), Run.open(config.out)


def until_trained(config):
    """Everything that happens up to the first step: the probes, and what comes before them."""
    seen = []
    for event in train(config, should_stop=lambda: any(event.kind == "step" for event in seen)):
        seen.append(event)
    assert event.kind == "interrupted"
    return seen


def test_the_recipe_that_is_written_repeats_the_run_to_the_bit(tmp_path, cache, found):
    config, events, run = found
    written = load_config(run.path / "config.yaml")
    assert config.optim.lr == "auto" and 1e-7 < written.optim.lr < 1
    again = written.model_copy(update={"out": str(tmp_path / "again")})
    assert not [event for event in finish(again) if event.kind == "probe"]
    assert_same(run.path, tmp_path / "again")
    assert run.manifest()["rate"]["lr"] == written.optim.lr
    steps = [event.values["learning_rate"] for event in events if event.kind == "step"]
    assert max(steps) == pytest.approx(written.optim.lr, rel=0.05)


def test_probes_leave_weights_and_first_loss_as_they_were(found):
    assert losses(found[1])[0] == pytest.approx(math.log(2), abs=1e-6)
    assert [e.values["loss"] for e in found[1] if e.kind == "probe"][-1] != pytest.approx(math.log(2), abs=1e-9)


def test_probes_cost_no_more_than_their_share(found):
    kinds = Counter(event.kind for event in found[1])
    probes = [event.values for event in found[1] if event.kind == "probe"]
    assert rate_probe.FEWEST <= kinds["probe"] == probes[0]["total"] <= rate_probe.MOST
    pairs = found[2].manifest()["data"]
    each = 3 * found[0].train.batch_size + rate_probe.FEWEST_MEASURED
    assert kinds["probe"] * each <= rate_probe.SHARE * 3 * pairs["pairs"] * LONG["epochs"]


@pytest.fixture
def watched(tmp_path, cache, monkeypatch):
    """What probes of a run are given: a function from a recipe to pairs of each step, pairs measured, events."""
    seen = {"steps": [], "measured": []}
    step, evaluate = rate_probe.train_step, rate_probe.evaluate_heldout

    def watched_step(state, fns, batches, *rest):
        seen["steps"] += [state.train.examples[i] for batch in batches for i in batch]
        return step(state, fns, batches, *rest)

    def watched_evaluation(state, fns):
        seen["measured"] += [state.heldout.examples[i] for batch in state.plan.heldout for i in batch]
        seen["training"] = state.heldout is state.train
        return evaluate(state, fns)

    monkeypatch.setattr(rate_probe, "train_step", watched_step)
    monkeypatch.setattr(rate_probe, "evaluate_heldout", watched_evaluation)
    return lambda config: (seen, until_trained(config))


@pytest.mark.parametrize("data", [{}, {"group": "none"}])
def test_probes_measure_training_pairs_that_no_probe_step_has_seen(tmp_path, watched, data):
    """Neither the pairs that `eval` scores nor those that the steps took, nor others of their prompts."""
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 40).read_text().splitlines()]
    for number, row in enumerate(rows):  # two pairs of each prompt
        row["prompt"] = rows[number // 2 * 2]["prompt"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(tmp_path, "run", optim=AUTO, data={"eval_fraction": 0.2} | data, train=LONG)
    seen, events = watched(config)
    assert seen["training"] and Counter(event.kind for event in events)["probe"] >= rate_probe.FEWEST
    text = lambda examples: {tuple(example.prompt) for example in examples}  # noqa: E731
    assert seen["steps"] and len(seen["measured"]) >= rate_probe.FEWEST_MEASURED
    assert not text(seen["steps"]) & text(seen["measured"])


def test_too_few_training_pairs_to_measure_on_mean_the_usual_rate(tmp_path, watched):
    """Twelve pairs in steps of four: three probe steps would take them all."""
    write_pairs(tmp_path / "pairs.jsonl", 12)
    config = recipe(tmp_path, "few", optim=AUTO, train={"epochs": 20.0, "eval_every": 0, "gradient_accumulation": 1})
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 4})})
    seen, events = watched(config)
    assert not seen["steps"]
    notes = [e.values["text"] for e in events if e.kind == "note"]
    assert any("too few training pairs to measure probes on" in text for text in notes)
    run = Run.open(config.out)
    assert run.config().optim.lr == rate_probe.usual_rate(config, 60) == run.manifest()["rate"]["lr"]


def test_the_goal_is_met_within_a_factor(found):
    """Not by the formula: the finished run's held-out rewards are looked at."""
    moved = [e.values for e in found[1] if e.kind == "eval"][-1]
    assert 0.1 * GOAL < abs(moved["eval_rewards/chosen"]) + abs(moved["eval_rewards/rejected"]) < 10 * GOAL


def test_a_goal_that_the_largest_rate_does_not_reach_is_said(tmp_path, cache):
    run = auto(tmp_path, "far")
    until_trained(run)
    found = Run.open(run.out).manifest()["rate"]
    assert found["lr"] == rate_probe.LARGEST_RATE["lora"]
    assert re.search(r"auto takes 1e-07 to 0.002, and 0.0\d+ would be the rate at which rewards", found["reason"])


def test_a_run_too_short_for_probes_takes_what_is_usual_and_says_so(tmp_path, cache):
    config = auto(tmp_path, "short", train={"epochs": 1.0})
    events = until_trained(config)
    assert not [event for event in events if event.kind == "probe"]
    assert any("are too few to pay for probes" in e.values["text"] for e in events if e.kind == "note")
    run = Run.open(config.out)
    assert run.config().optim.lr == run.manifest()["rate"]["lr"] <= rate_probe.LARGEST_RATE["lora"]


def test_stopped_in_the_probes_and_gone_on_is_the_same_run(tmp_path, cache, found):
    config, _, run = found
    cut = config.model_copy(update={"out": str(tmp_path / "cut")})
    seen: list[str] = []
    for event in train(cut, should_stop=lambda: seen.count("probe") == 2):
        seen.append(event.kind)
    stopped = Run.open(cut.out)
    assert event.kind == "interrupted"
    assert stopped.config().optim.lr == "auto"
    finish(stopped.config(), resume=stopped)
    assert_same(run.path, stopped.path)


def test_probes_that_overflow_end_there(tmp_path, cache, monkeypatch):
    """A rate at which numbers overflow ends the probes; what they showed until then is used."""
    real, calls = rate_probe.train_step, []

    def overflowing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise rate_probe.NonFiniteError("planted")
        return real(*args)

    monkeypatch.setattr(rate_probe, "train_step", overflowing)
    config = auto(tmp_path, "edge")
    until_trained(config)
    assert len(Run.open(config.out).manifest()["rate"]["probes"]) == 2


def test_every_kind_of_loss_is_probed(tmp_path, cache, found):
    runs = {name: auto(tmp_path, name, loss={"name": name}) for name in ("simpo", "ipo", "kto", "orpo")}
    for events in (found[1], *map(until_trained, runs.values())):
        probes = [event.values for event in events if event.kind == "probe"]
        assert len(probes) >= rate_probe.FEWEST and all(np.isfinite(p["rewards"]) and p["rewards"] > 0 for p in probes)


def test_the_next_rate_goes_in_even_steps_and_never_jumps():
    first = Moved(1e-5, 0.001, 0.0001, 0.69)
    assert next_rate([first], 6) == pytest.approx(1e-4)  # ten times the last step, though 160 would be due
    near = Moved(1e-3, PROBED * GOAL / 2, 0.0, 0.69)
    linear = Moved(5e-4, PROBED * GOAL / 4, 0.0, 0.69)
    assert next_rate([linear, near], 4) == pytest.approx(5e-4)
    squared = linear._replace(rewards=PROBED * GOAL / 8)
    assert next_rate([squared, near], 4) == pytest.approx(1e-3 * (1.5**0.5 - 1))
    assert next_rate([Moved(1e-5, 0.0, 0.0, 0.69)], 4) == pytest.approx(1e-4)
    assert next_rate([near, near._replace(rates=2e-3, rewards=2 * GOAL)], 4) == pytest.approx(1e-4)  # on, never back


def test_rates_add_up_to_the_goal_by_rewards_or_by_drift():
    by_rewards, why = rates_to_goal([Moved(1e-4, 0.01, 0.0, 0.693), Moved(4e-4, 0.04, 0.001, 0.69)])
    assert by_rewards == pytest.approx(1e-2 * GOAL) and "rewards" in why
    by_drift, why = rates_to_goal([Moved(1e-4, 0.01, 0.015, 0.693), Moved(4e-4, 0.04, 0.06, 0.69)])
    assert by_drift == pytest.approx(4e-4 * MOST_DRIFT / 0.06) and "nats a token" in why
    halved, why = rates_to_goal([Moved(1e-4, 0.01, 0.0, 0.693), Moved(4e-4, 0.04, 0.001, 0.75)])
    assert halved == pytest.approx(by_rewards / 2) and "rose from 0.693 to 0.750" in why
    beyond, _ = rates_to_goal([Moved(1e-4, GOAL / 4, 0.0, 0.693), Moved(4e-4, 4 * GOAL, 0.0, 0.69)])
    assert beyond == pytest.approx(2e-4)
    assert way(Moved(1.0, 2 * GOAL, MOST_DRIFT, 0.0)) == 2


@pytest.mark.parametrize("power", [0.5, 1.0, 1.4, 2.0, 3.0])
def test_distance_keeps_growing_as_it_did_between_the_last_probes(power):
    """A distance of a power of the rates added up is met exactly, but for powers that no measurement is trusted in."""
    moved = [Moved(rates, GOAL * (rates / 1e-2) ** power, 0.0, 0.69) for rates in (1e-4, 1e-3, 4e-3)]
    rates, _ = rates_to_goal(moved)
    assert growth(moved) == pytest.approx(min(max(power, 1.0), 2.0))
    assert rates == pytest.approx(4e-3 * 2.5 ** (power / growth(moved)))
    assert growth(moved[:1]) == 1.0


@pytest.mark.parametrize(("windows", "epochs"), [(1, 3), (17, 3), (20, 3), (25, 2), (49, 2), (50, 1), (4000, 1)])
def test_epochs_are_as_few_as_make_enough_steps(windows, epochs):
    assert chosen_epochs(TrainConfig(), windows) == epochs
    assert chosen_epochs(TrainConfig(epochs=0.5), windows) == 0.5


def test_settling_changes_only_what_was_open():
    config = load_config(None, {"optim": {"lr": 1e-5}})
    assert settled(config, 3e-4, 2.0).optim == config.optim and settled(config, 3e-4, 2.0).train.epochs == 2
    assert settled(load_config(), None, 1.0).optim.lr == "auto"


def test_an_open_rate_is_never_trained_with():
    from mlxdpo.training.plan import learning_rate

    with pytest.raises(ValueError, match="auto"):
        learning_rate(OptimConfig(), 0, 10)
    assert sum(schedule_share(OptimConfig(), step, 100) for step in range(100)) == pytest.approx(50, rel=0.02)


def test_epochs_of_a_run_are_written_as_a_number(tmp_path, cache):
    write_pairs(tmp_path / "pairs.jsonl")
    config = recipe(tmp_path, "open", train={"epochs": "auto"})
    until_trained(config)
    assert load_config(tmp_path / "open" / "config.yaml").train.epochs == 3.0


def test_steps_times_rate_that_cannot_move_a_model_or_break_it_are_said():
    note = lambda lr, steps: rates_note(load_config(None, {"optim": {"lr": lr}}), steps)  # noqa: E731
    assert "17 steps at 5e-06 add up to 4.5e-05" in note(5e-6, 17) and "no visible change" in note(5e-6, 17)
    assert note(1e-4, 40) == note("auto", 17) == ""
    assert "broken answers" in note(1e-2, 40)


@pytest.mark.parametrize("method", list(rate_probe.LARGEST_RATE))
def test_no_rate_that_auto_may_choose_is_warned_of(method):
    """The recipe that a run writes holds its number; `plan` on it does not call it broken and recommend auto."""
    note = lambda lr: rates_note(load_config(None, {"lora": {"method": method}, "optim": {"lr": lr}}), 5000)  # noqa: E731
    assert note(rate_probe.LARGEST_RATE[method]) == "" and "broken answers" in note(2 * rate_probe.LARGEST_RATE[method])
