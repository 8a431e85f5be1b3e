"""A sweep: who is stopped and why, what is kept when it is stopped itself, figures pooled over seeds."""

import json
from types import SimpleNamespace as Made

import numpy as np
import pytest
from tiny_runs import recipe

from mlxdpo.cli import run as cli
from mlxdpo.config import dump_config, load_config
from mlxdpo.io.atomic import write_text
from mlxdpo.runs import Run
from mlxdpo.types import Event, UserError
from mlxdpo_eval.metrics.intervals import clustered_mean
from mlxdpo_eval.metrics.seeds import pooled_mean, pooled_share
from mlxdpo_eval.report.sweep import write_sweep
from mlxdpo_eval.sweep import plan_sweep, read_sweep, run_sweep
from mlxdpo_eval.sweep_results import sweep_sentence

PAIRS, STEPS = 40, 8
HELDOUT = [Made(prompt=np.array([i // 2])) for i in range(PAIRS)]  # two pairs a prompt


def planted(losses, started, prompts=lambda config: HELDOUT):
    """Training without a model: the loss of each pair falls with the steps to `losses(config)`, with fixed noise."""

    def train(config, resume, should_stop):
        """Evaluates at every second step."""
        run = resume or Run.create(config)
        started.append((run.path.name, resume is not None))
        yield Event("start", 0, {"plan": Made(steps=STEPS), "data": Made(heldout=prompts(config))})
        for step in range(0, STEPS + 1, 2):
            if should_stop():
                yield Event("interrupted", max(0, step - 2), {})  # the last whole step
                return
            loss = 0.7 + (losses(config) - 0.7) * step / STEPS
            noise = np.random.default_rng([7, int(1e6 * losses(config))]).normal(0, 0.02, PAIRS)
            pairs = {"loss": loss + noise, "accuracy": (noise + 0.7 > loss + 0.02) * 1.0}
            yield Event("eval", step, {}, pairs)
        write_text(run.path / "trained", "")
        yield Event("done", STEPS, {})

    return train


def plan(folder, seeds=1, **settings):
    axes = {name.replace("__", "."): values for name, values in settings.items()}
    return plan_sweep(lambda given: load_config(None, given), axes, seeds, folder, lambda config: STEPS)


def by_rate(config):
    """The larger the rate, the lower the loss."""
    return 0.6 - 100 * config.optim.lr


def swept(asked, train, stop=lambda: False):
    said = []
    done = run_sweep(asked, train, stop, lambda run: None, said.append)
    return done, said


def test_a_loser_is_stopped_and_gets_no_further_seed(tmp_path):
    started = []
    asked = plan(tmp_path / "s", 2, optim__lr=["1e-3", "1e-5", "9.99e-4"])
    done, said = swept(asked, planted(by_rate, started))
    records = read_sweep(asked.folder)["runs"]
    lost = records["lr1e-5-seed0"]
    assert done and lost["state"] == "stopped" and lost["step"] == 2 and lost["lost"]["against"] == "lr1e-3-seed0"
    assert [name for name, _ in started] == [
        "lr1e-3-seed0", "lr1e-5-seed0", "lr9.99e-4-seed0", "lr1e-3-seed1", "lr9.99e-4-seed1"
    ]  # fmt: skip
    assert any("lr1e-5-seed0: stopped at step 2 of 8: held-out loss is 0.0" in text for text in said)
    found = write_sweep(asked.folder)
    assert found.best == "lr1e-3" and "indistinguishable from it: lr9.99e-4." in sweep_sentence(found)
    page = (asked.folder / "report.html").read_text()
    assert "stopped at step 2 of 8" in page and "are indistinguishable" in page and "99&nbsp;% interval" in page


def test_a_finished_loser_gets_no_further_seed(tmp_path):
    started = []
    swept(plan(tmp_path / "s", 2, optim__lr=["1e-5", "1e-3"]), planted(by_rate, started))
    assert [name for name, _ in started] == ["lr1e-5-seed0", "lr1e-3-seed0", "lr1e-3-seed1"]


def test_an_interrupted_sweep_continues_and_keeps_what_is_finished(tmp_path):
    asked, started = plan(tmp_path / "s", optim__lr=["1e-3", "9.99e-4"]), []
    assert not swept(asked, planted(by_rate, started), lambda: len(started) == 2)[0]
    assert list(read_sweep(asked.folder)["runs"]) == ["lr1e-3-seed0"]
    assert swept(asked, planted(by_rate, started))[0]
    assert started == [("lr1e-3-seed0", False), ("lr9.99e-4-seed0", False), ("lr9.99e-4-seed0", True)]
    assert swept(asked, planted(by_rate, started))[0] and len(started) == 3
    with pytest.raises(UserError, match="holds another sweep"):
        plan(tmp_path / "s", optim__lr=["1e-3", "1e-4"])
    plan(tmp_path / "s", 3, optim__lr=["1e-3", "9.99e-4"])  # more seeds are the same sweep


def test_objectives_are_compared_by_accuracy_and_only_on_the_same_pairs(tmp_path):
    asked = plan(tmp_path / "s", loss__beta=["0.1", "0.3"])
    assert asked.measure == "accuracy" and plan(tmp_path / "t", optim__lr=["1e-3", "1e-4"]).measure == "loss"
    assert {config.train.eval_every for config in asked.configs.values()} == {2}
    others = planted(lambda config: 0.5, [], lambda config: HELDOUT[:: -1 if config.loss.beta > 0.2 else 1])
    with pytest.raises(UserError, match="different held-out pairs"):
        swept(asked, others)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data__path": ["a", "b"]}, "no common held-out pairs"),
        ({"train__seed": ["1", "2"]}, "--seeds N trains N seeds"),
        ({"optim__lr": ["1e-3", "1e-3"]}, "names a value twice"),
        ({"train__minutes": ["3"]}, "use train.steps instead"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        plan(tmp_path / "s", **settings)


def test_an_interval_over_seeds_knows_how_far_they_lie_apart():
    draw = np.random.default_rng(0)
    prompts, seeds = [i for _ in range(3) for i in range(50)], [s for s in range(3) for _ in range(50)]
    noise = draw.normal(0, 1, 150)
    apart = pooled_mean(noise + np.repeat([-1.0, 0.0, 1.0], 50), prompts, seeds)
    alike, by_prompt = pooled_mean(noise, prompts, seeds), clustered_mean(noise, prompts)
    assert apart.high - apart.low > 4 * (by_prompt.high - by_prompt.low)
    assert alike.high - alike.low >= by_prompt.high - by_prompt.low - 1e-12
    assert pooled_mean(noise[:50], prompts[:50], seeds[:50]) == clustered_mean(noise[:50], prompts[:50])
    # Prompts alike, seeds of means 0 and 1: V = s²/S = 1/4 with one degree of freedom, Student's t is 12.7062.
    by_seed = pooled_mean([0.0, 1e-9, 1.0, 1.0], ["a", "b", "a", "b"], [0, 0, 1, 1])
    assert by_seed.high - by_seed.estimate == pytest.approx(12.7062 / 2, rel=1e-4)
    right = (noise > 0) * 1.0
    share = pooled_share(right, prompts, seeds)
    assert 0 <= share.low < right.mean() < share.high <= 1


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_an_interval_over_three_seeds_covers_as_often_as_it_says(spread):
    draw, hits = np.random.default_rng(3), 0
    prompts, seeds = [i // 2 for i in range(PAIRS)] * 3, np.repeat(range(3), PAIRS)
    for _ in range(400):
        items = np.tile(draw.normal(0, 0.014, PAIRS), 3) + draw.normal(0, 0.02, 3 * PAIRS)
        found = pooled_mean(items + np.repeat(draw.normal(0, spread, 3), PAIRS), prompts, seeds.tolist())
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / 400 <= 0.99


def test_a_sweep_of_real_runs_on_the_command_line(tmp_path, cache, capsys):
    config = recipe(tmp_path, data={"eval_fraction": 0.4}, train={"steps": 4})
    (tmp_path / "recipe.yaml").write_text(dump_config(config.model_copy(update={"out": None})))
    line = ["sweep", str(tmp_path / "recipe.yaml"), "--loss.beta", "0.1,0.5", "--train.eval-every=2", "--answers", "3"]
    assert cli([*line, "--out", str(tmp_path / "s"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in found["candidates"]] == ["beta0.1", "beta0.5"] and found["measure"] == "accuracy"
    for one in found["candidates"]:
        run = Run.open(tmp_path / "s" / f"{one['name']}-seed0")
        evals = [line["eval_rewards/accuracies"] for line in run.metrics() if "eval_loss" in line]
        assert one["mean"] == pytest.approx(evals[-1]) and [value for _, value in one["curve"]] == pytest.approx(evals)
        assert one["kl"] > 0
    assert "Reward against drift" in (tmp_path / "s" / "report.html").read_text()
    assert cli(["runs", str(tmp_path / "s"), "--by", "accuracy", "--json"]) == 0
    listed = [row["held-out accuracy"] for row in json.loads(capsys.readouterr().out)]
    assert listed == sorted(listed, reverse=True) and len(listed) == 2
    assert cli(["runs", "diff", *(str(tmp_path / "s" / f"beta{b}-seed0") for b in ("0.1", "0.5")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss.beta": [0.1, 0.5]}
    assert cli(["sweep", "--loss.bta", "1,2", "--lr", "3", "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert "did you mean --loss.beta?" in said and "did you mean --optim.lr?" in said
