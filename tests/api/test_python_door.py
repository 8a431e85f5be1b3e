"""Python's first thirty lines: rows in memory, own objective and judges, a run that shows itself and is repeated."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

import mlxdpo
from mlxdpo.api import tuned_run
from mlxdpo.losses import LOSSES
from mlxdpo.machine.openblas import Blas
from mlxdpo.training.given import nested_settings, rows_file

WORDS = ["red", "blue", "the", "user", "string", "er", "a", "ok"]


def some_rows(count=24):
    """Distinct short pairs."""
    draw = random.Random(0)
    word = lambda: draw.choice(WORDS)  # noqa: E731
    return [
        {"prompt": f"q{i} {word()}:", "chosen": f" {word()} {i}", "rejected": f" {word()} no"} for i in range(count)
    ]


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A folder with a model; objectives registered here are gone afterwards."""
    write_model(tmp_path / "m", chatml_tokenizer())
    monkeypatch.chdir(tmp_path)
    known = dict(LOSSES)
    yield tmp_path
    LOSSES.clear()
    LOSSES.update(known)


def squared(pairs, *, beta):
    """IPO-like: (1 - beta * lead)^2."""
    lead = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    return (1 - beta * lead) ** 2


SHORT = {"steps": 2, "max_length": 64, "template": "plain", "eval_fraction": 0.3, "batch_size": 2}


def test_the_thirty_lines_that_a_researcher_writes_first(place, capsys):
    rows = some_rows()
    run = mlxdpo.tune("m", rows, loss=squared, lr=1e-3, beta=0.2, out="runs/mine", **SHORT)
    assert "step 2  loss" in capsys.readouterr().out
    config = run.config()
    assert (config.loss.name, config.loss.beta, config.optim.lr) == ("squared", 0.2, 1e-3)
    steps = [line for line in run.metrics() if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(1.0, abs=1e-4)  # policy and reference agree: (1 - 0)^2

    answers = mlxdpo.generate(run, ["red", "blue"], max_tokens=3)
    assert len(answers) == 2 and mlxdpo.generate("runs/mine", "red", max_tokens=3) == answers[0]
    assert isinstance(mlxdpo.generate(run, "red", before=True, max_tokens=3), str)
    asked = [[{"role": "user", "content": "red"}]]
    assert len(mlxdpo.generate(run, asked, max_tokens=3)) == 1

    assert "not evaluated yet" in run._repr_html_()
    judges = [lambda prompt, answer: -len(answer), lambda prompt, first, second: len(second) - len(first)]
    found = mlxdpo.evaluate(run, judge=judges, max_tokens=4, prompts=4, samples=1, quiet=True)
    assert all(name in " ".join(found["sentences"]) for name in ("judge 1", "judge 2"))
    verdicts = [row["verdicts"] for row in run.samples()]
    assert all(v["judge 1"]["logit"] == v["judge 2"]["logit"] for v in verdicts)  # the same rule, said in two ways

    page = mlxdpo.open_run("runs/mine")._repr_html_()
    assert "<svg" in page and "<th>before</th>" in page and "judge 1" in page
    again = run.reproduce()
    assert again.same and again.digest == again.again
    assert mlxdpo.open_run(again.path).config().loss == config.loss


def test_train_takes_a_configuration_or_model_data_and_settings(place):
    rows = some_rows(8)
    events = list(mlxdpo.train(model="m", data=rows, **{"train.steps": 1, "optim.lr": 1e-4, "data.template": "plain"}))
    assert events[-1].kind == "done"
    config = events[-1].values["run"].config()
    assert json.loads(Path(config.data.path).read_text().splitlines()[0]) == rows[0]
    with pytest.raises(mlxdpo.UserError, match="give a config, or model, data and settings"):
        mlxdpo.train(config, model="m")


def test_settings_by_any_of_their_names():
    named = {"optim.lr": 1}, {"optim_lr": 1}, {"lr": 1}, {"optim": {"lr": 1}}
    assert all(nested_settings(given) == {"optim": {"lr": 1}} for given in named)
    assert nested_settings({"epochs": 2, "seed": 3}) == {"train": {"epochs": 2, "seed": 3}}  # not rollout, not collect
    assert nested_settings({"out": "x", "lora": {"rank": 2}, "lora.alpha": 4}) == {
        "out": "x", "lora": {"rank": 2, "alpha": 4}
    }  # fmt: skip


def test_every_wrong_setting_is_named_at_once(place):
    with pytest.raises(mlxdpo.UserError) as refused:
        mlxdpo.tune("m", some_rows(4), learning_rate=1, lora_r=2, lrr=3)
    assert str(refused.value).splitlines() == [
        "unknown setting learning_rate; did you mean optim.lr?",
        "unknown setting lora_r; did you mean lora.rank?",
        "unknown setting lrr; did you mean optim.lr?",
    ]


def test_rows_of_other_kinds_and_what_is_no_row(tmp_path):
    class Frame:
        """As pandas has it."""

        columns = ("prompt",)

        def to_dict(self, kind):
            """Rows."""
            return [{"prompt": "a", "score": mx.array(2).item()}]

    assert json.loads(rows_file(Frame(), tmp_path).read_text())["prompt"] == "a"
    assert rows_file(iter(some_rows(3)), tmp_path) == rows_file(some_rows(3), tmp_path)
    for odd, said in (([], "no rows"), (3, "a int"), (["x"], "type str"), ([{"a": object()}], "cannot be written")):
        with pytest.raises(mlxdpo.UserError, match=said):
            rows_file(odd, tmp_path)


def test_own_objectives_are_tried_when_they_are_registered(place):
    refused = {
        "do not take the mean": lambda pairs, *, beta: mx.mean(pairs.chosen),
        "which is not a setting": lambda pairs, *, temper: pairs.chosen,
        "not finite": lambda pairs: mx.log(pairs.chosen),
    }
    for said, function in refused.items():
        with pytest.raises(mlxdpo.UserError, match=said):
            mlxdpo.objective(function, name="mine")
    with pytest.raises(mlxdpo.UserError, match="sigmoid is a built-in objective"):
        mlxdpo.objective(squared, name="sigmoid")

    @mlxdpo.objective(reference=False, name="plain_lead")
    def lead(pairs, *, beta, sharpness=2.0):
        """A keyword with a default that is no setting keeps it."""
        return mx.logaddexp(0.0, -sharpness * beta * (pairs.chosen - pairs.rejected))

    run = mlxdpo.tune("m", some_rows(8), loss="plain_lead", lr=1e-3, quiet=True, **SHORT)
    assert run.config().loss.name == "plain_lead" and LOSSES["plain_lead"].knobs == ("beta",)
    assert not any((place / "cache").rglob("*logps*"))  # no reference was asked for


def test_slow_matrix_products_are_named(monkeypatch):
    monkeypatch.setattr(tuned_run, "preload_blas", lambda: Blas(False, "import mlxdpo first"))
    with pytest.warns(UserWarning, match="import mlxdpo first"):
        tuned_run.warn_slow_blas()


def test_a_judge_that_is_none_is_refused(place):
    run = mlxdpo.tune("m", some_rows(8), lr=1e-3, quiet=True, **SHORT)
    for judge, said in ((3, "judge is a int"), (lambda x: 1, "takes 1 arguments"), ("nobody", "no such judge")):
        with pytest.raises(mlxdpo.UserError, match=said):
            mlxdpo.evaluate(run, judge=judge)
    with pytest.raises(mlxdpo.UserError, match="a prompt is a int"):
        mlxdpo.generate(run, [3])


def test_a_sweep_takes_lists_of_values_and_shows_what_can_be_told_apart(place, capsys):
    rows, asked = some_rows(), {"loss": ["sigmoid", squared], "lr": [1e-3, 1e-4], "answers": 0, "quiet": True}
    swept = mlxdpo.sweep("m", rows, seeds=1, **asked, **SHORT)
    for tuned in swept.runs:  # a swept setting leaves the others of its section as they are
        assert (tuned.config().train.steps, tuned.config().train.batch_size) == (SHORT["steps"], SHORT["batch_size"])
    assert capsys.readouterr().out == ""
    assert swept.results.settings == {"loss.name": ["sigmoid", "squared"], "optim.lr": ["0.001", "0.0001"]}
    assert len(swept.runs) == 4 and swept.best is not None
    assert {(run.config().loss.name, run.config().optim.lr) for run in swept.runs} == {
        (name, rate) for name in ("sigmoid", "squared") for rate in (1e-3, 1e-4)
    }
    shown = swept._repr_html_()
    assert "<svg" in shown and swept.sentence() and all(c.name in shown for c in swept.results.candidates)
    shutil.copytree(swept.best.path, swept.path / f"{swept.best.path.name}-again")  # as `reproduce` leaves it
    assert len(swept.runs) == 4
    times = {run.path: (run.path / "adapter" / "adapters.safetensors").stat().st_mtime_ns for run in swept.runs}
    again = mlxdpo.sweep("m", rows, seeds=1, **asked, **SHORT)  # nothing is trained twice
    assert {run.path: (run.path / "adapter" / "adapters.safetensors").stat().st_mtime_ns for run in again.runs} == times
    with pytest.raises(mlxdpo.UserError, match=r"--seeds N|one value"):
        mlxdpo.sweep("m", rows, out="runs/other", seed=[1, 2], **SHORT)
    with pytest.raises(mlxdpo.UserError, match=r"unknown setting learning_rate; did you mean optim\.lr"):
        mlxdpo.sweep("m", rows, out="runs/other", learning_rate=[1, 2], **SHORT)
