"""The frontier benchmark: areas with known answers, the page from made-up points, and all of it on a tiny model."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer

from mlxdpo.io.atomic import append_line
from mlxdpo.types import UserError

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from benchmarks.frontier import __main__ as command
from benchmarks.frontier import page, points
from benchmarks.frontier.areas import Cloud, Start, crossed, curve, gap
from benchmarks.frontier.plan import BUDGETS, FULL, METHODS, SMALL, Arm, recipe
from benchmarks.frontier.runs import configured

OPENINGS = 40


def line_cloud(slope, drifts, noise=0.0, seed=0, openings=OPENINGS):
    """Points on reward = slope * KL."""
    rng = np.random.default_rng(seed)
    kl = np.tile(np.array(drifts, float)[:, None], openings)
    reward = slope * kl + noise * rng.normal(size=kl.shape)
    return Cloud(reward, 2 * reward, kl)


NOTHING = Start(np.zeros(OPENINGS), np.zeros(OPENINGS))


def test_the_gap_of_two_lines_is_half_the_difference_at_the_end():
    """0.10 and 0.06 a nat, known to 4 and to 6 nats: mean difference over [0, 4] is 0.04 * 4 / 2; the second judge's
    twice that."""
    ours, theirs = {0: line_cloud(0.1, [1, 2, 4])}, {0: line_cloud(0.06, [3, 6])}
    found = gap(ours, theirs, NOTHING)
    assert (
        found.estimate == pytest.approx(0.08, abs=1e-9) and found.reach == pytest.approx(4) and found.interval is None
    )
    assert gap(ours, theirs, NOTHING, "second").estimate == pytest.approx(0.16, abs=1e-9)
    assert gap(theirs, ours, NOTHING).estimate == pytest.approx(-0.08, abs=1e-9)


def test_an_interval_needs_two_seeds_and_holds_the_truth():
    ours = {s: line_cloud(0.1, [1, 2, 4], 0.1, s) for s in range(3)}
    theirs = {s: line_cloud(0.06, [1, 2, 4], 0.1, 100 + s) for s in range(3)}
    found = gap(ours, theirs, NOTHING, n=300)
    assert 0 < found.interval.low < 0.08 < found.interval.high < 0.2


def test_many_noisy_points_are_no_advantage():
    """All rewards are noise around 0: thirty points against two. Read where they were chosen, the thirty win."""
    crossed_gaps, naive = [], []
    half = [np.arange(OPENINGS)[::2], np.arange(OPENINGS)[1::2]]
    for seed in range(60):
        many = line_cloud(0.0, np.linspace(0.5, 4, 30), 0.5, seed)
        few = line_cloud(0.0, [2, 4], 0.5, 1000 + seed)
        crossed_gaps.append(gap({0: many}, {0: few}, NOTHING).estimate)
        a, b = (curve(cloud, NOTHING, half[0], half[0], "reward") for cloud in (many, few))
        grid = np.linspace(0, min(a[0][-1], b[0][-1]), 50)
        naive.append(float(np.mean(np.interp(grid, *a) - np.interp(grid, *b))))
    error = np.std(crossed_gaps, ddof=1) / np.sqrt(len(crossed_gaps))
    assert abs(np.mean(crossed_gaps)) < 3 * error and error < 0.03
    assert np.mean(naive) > 0.05


def test_crossed_interval_of_equal_seeds_is_that_of_openings():
    values = np.tile(np.arange(40.0), (3, 1))
    found = crossed(values)
    assert found.estimate == pytest.approx(19.5)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values[0].std() / np.sqrt(40), rel=0.1)


def made_up(tmp_path, ours=0.1, theirs=0.05, seeds=(0, 1, 2)):
    """Lines of an untuned model and of DPO, PPO and the control, two checkpoints each."""
    rng = np.random.default_rng(0)
    noise = lambda: 0.02 * rng.normal(size=OPENINGS)  # noqa: E731
    for number in range(4):
        append_line(
            tmp_path / points.FILE,
            {"method": points.UNTUNED, "number": number, "vader": noise().tolist(), "textblob": noise().tolist()},
        )
    for method, slope in (("dpo", ours), ("ppo", theirs), ("shuffled", 0.0)):
        for seed in seeds:
            for step, kl in ((9, 1.0), (27, 4.0)):
                values = slope * kl + noise()
                arm = Arm(method, 0.1, seed)
                many = {
                    "vader": values,
                    "textblob": values / 2,
                    "kl": kl + noise(),
                    "tokens": 24 + 0 * noise(),
                    "repetition": 0 * noise(),
                }
                append_line(
                    tmp_path / points.FILE,
                    {"name": arm.name, **arm._asdict(), "step": step, **{k: [v.tolist()] for k, v in many.items()}},
                )
    return points.measured(tmp_path)


@pytest.fixture
def few_resamples(monkeypatch):
    """Gaps with intervals of a hundred resamples."""
    monkeypatch.setattr(page, "gap", partial(gap, n=100))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("ours", "theirs", "said"), [
    (0.1, 0.05, "**DPO's frontier lies above PPO's**"),
    (0.05, 0.1, "**DPO's frontier lies below PPO's**"),
    (0.1, 0.1, "no difference between DPO's frontier and PPO's can be seen"),
])  # fmt: skip
def test_the_page_says_in_words_whose_frontier_is_higher(tmp_path, ours, theirs, said):
    assert said in page.verdict(made_up(tmp_path, ours, theirs))


@pytest.mark.usefixtures("few_resamples")
def test_one_seed_carries_no_interval_and_no_points_no_verdict(tmp_path):
    assert "one seed carries no interval" in page.verdict(made_up(tmp_path, seeds=(0,)))
    far = [
        {**line, "kl": (np.array(line["kl"]) / 1000).tolist()} if line["method"] == "ppo" else line
        for line in points.measured(tmp_path)
    ]
    assert "reach no drift in common" in page.verdict(far)
    assert page.verdict([]) == "Not enough has been measured to compare DPO with PPO."


@pytest.mark.usefixtures("few_resamples")
def test_page_and_figure_come_from_the_points(tmp_path):
    lines, file = made_up(tmp_path), tmp_path / "frontier.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(lines, FULL, file)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    table = [row for row in text.splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in table[1:]] == [
        "| untuned",
        "| DPO",
        "| PPO",
        "| DPO, labels shuffled",
        "| best of 2",
        "| best of 4",
    ]
    assert "| DPO | 0.1 | 3 | 4.0" in text and "≤ 0.19" in text
    page.write_figure(lines, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="expected one"):
        page.write_page(lines, FULL, tmp_path / points.FILE)


def test_the_docs_page_has_the_markers():
    text = page.PAGE.read_text("utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1


def test_the_full_budget_is_what_was_asked_for():
    arms = FULL.arms()
    assert {a.strength for a in arms if a.method == "dpo"} == {0.05, 0.1, 1.0, 5.0} and {a.seed for a in arms} == {
        0,
        1,
        2,
    }
    assert {a.method for a in arms} == METHODS.keys() and len({a.name for a in arms}) == len(arms)
    assert [a.seed for a in arms] == sorted(a.seed for a in arms)


@pytest.mark.parametrize("arm", BUDGETS["full"].arms()[:11], ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe(tmp_path, arm):
    config = configured(arm, FULL, tmp_path, "somewhere")
    assert config.model.path == "somewhere" and config.train.seed == arm.seed and config.lora.layers == 8
    strength = config.rollout.kl if METHODS[arm.method].online else config.loss.beta
    assert strength == (arm.strength or 0.1)
    assert recipe(arm, FULL, "a")["train"] is not recipe(arm, FULL, "a")["train"]  # nothing shared is written to


TINY = SMALL._replace(openings=4, steps=5, points=2, methods={"dpo": (0.1,), "rloo": (0.05,)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Nine layers, so that the demo's recipe trains the upper eight."""
    return str(write_model(tmp_path_factory.mktemp("model") / "llama", base_tokenizer(), num_hidden_layers=9))


@pytest.mark.slow
def test_what_is_stopped_goes_on_and_gives_the_same_points(tmp_path, cache, model):
    assert command.work(tmp_path / "straight", TINY, model, [], lambda: False)
    wanted, calls, trained = points.measured(tmp_path / "straight"), 0, tmp_path / "pieces/arms/dpo-0.1-seed0/adapter"
    # Scoring the reference asks seven times; afterwards there is a question before and after each point and step.
    stop = lambda: tiny_runs.stop_after(3 + calls % 3 if trained.exists() else 12)  # noqa: E731
    while not command.work(tmp_path / "pieces", TINY, model, [], stop()):
        calls += 1
        assert calls < 30
    found = points.measured(tmp_path / "pieces")
    without = lambda lines: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]  # noqa: E731
    assert calls > 4 and without(found) == without(wanted)
    assert [(line.get("name"), line.get("step")) for line in found[2:]] == [
        ("dpo-0.1-seed0", 2), ("dpo-0.1-seed0", 4), ("dpo-0.1-seed0", 5), ("rloo-0.05-seed0", 1),
    ]  # fmt: skip
    assert all(min(line["kl"][0]) >= 0 for line in found[2:]) and max(found[3]["kl"][0]) > 1e-4


@pytest.mark.slow
def test_every_method_runs_and_is_shown(tmp_path, cache, model):
    budget = FULL._replace(
        methods={name: method.strengths[:1] for name, method in METHODS.items()},
        seeds=(0,), openings=4, pool=2, steps=1, rounds=1, points=1,
    )  # fmt: skip
    assert command.work(tmp_path, budget, model, [], lambda: False)
    lines = points.measured(tmp_path)
    assert {line["method"] for line in lines} == {points.UNTUNED, *METHODS}
    table = page.markdown(lines, budget)
    assert all(f"| {method.title} |" in table for method in METHODS.values())


def test_another_budget_or_arm_is_refused(tmp_path, cache, model):
    assert not command.work(tmp_path, TINY, model, [], lambda: True)
    with pytest.raises(UserError, match="started with a different steps"):
        command.work(tmp_path, TINY._replace(steps=3), model, [], lambda: True)
    with pytest.raises(UserError, match="no run is called grpo; there are dpo"):
        command.work(tmp_path, TINY, model, ["grpo"], lambda: True)


@pytest.mark.real
def test_the_small_version_on_the_real_model(tmp_path, capsys):
    """A minute: every part runs, DPO and RLOO move away from the start and say so."""
    assert command.main(["--small", "--out", str(tmp_path)]) == 0
    lines = points.measured(tmp_path)
    tuned = {line["method"]: float(np.mean(line["kl"])) for line in lines if line["method"] != points.UNTUNED}
    assert tuned.keys() == {"dpo", "rloo"} and all(0 < kl < 50 for kl in tuned.values())
    assert "| untuned" in capsys.readouterr().out
