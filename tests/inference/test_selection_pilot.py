"""The pilot of selection rules: a planted rule is found better, its opposite worse."""

import json

import numpy as np
import pytest
from tiny_words import write_words

from mlxdpo.cli import run as cli
from mlxdpo.commands import audit_pilot
from mlxdpo.commands.audit_pilot import ALIKE, command_after, pilot_table, recommended, verdict
from mlxdpo.config import Config
from mlxdpo.inference import selection_pilot
from mlxdpo.inference.selection_pilot import PilotRun, every_rule, pilot_selections, run_pilot
from mlxdpo.types import Preference, UserError

GOOD, BAD = ["good", "great", "happy"], ["bad", "awful", "sad"]
NOUNS = ["cat", "dog", "house", "tree", "day", "night", "sun"]


def made(count, start=0):
    """Pairs whose better answer has the kinder word; no two have one prompt."""
    rows = []
    for i in range(start, start + count):
        sides = (f" {GOOD[i % 3]}", f" {BAD[i // 3 % 3]}")
        rows.append(Preference(f"the {NOUNS[i % 7]} {NOUNS[i // 7 % 7]} {NOUNS[i // 49 % 7]}", *sides, f"p.jsonl:{i}"))
    return rows


def exchanged(row):
    return Preference(row.prompt, row.rejected, row.chosen, row.where)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words") / "llama")


def recipe(words, **train):
    return Config.model_validate(
        {
            "model": {"path": str(words)},
            "data": {"path": "pairs.jsonl", "template": "plain"},
            "lora": {"rank": 4},
            "optim": {"lr": 2e-2},
            "train": {"steps": 15, "eval_every": 0, "sample_every": 0, **train},
        }
    )


@pytest.mark.slow
def test_a_planted_rule_is_right_and_its_opposite_wrong(words, cache):
    """Half the labels are turned round, and `hard` happens to rank those that are not."""
    draw = np.random.default_rng(0)
    flipped = draw.permutation(np.arange(60) % 2 == 0)
    rows = [exchanged(row) if turned else row for row, turned in zip(made(60), flipped.tolist(), strict=True)]
    findings = [{"reference_margin_per_token": 1.0 if turned else -1.0} for turned in flipped.tolist()]
    heldout = made(40, start=100)
    rules = ["hard:0.5", "easy:0.5"]
    found = list(run_pilot(recipe(words), rows, findings, heldout, rules, 1))
    assert [one.name for one in found] == ["all", "random", *rules]
    assert [one.pairs for one in found] == [60, 30, 30, 30] and {one.lr for one in found} == {2e-2}
    table = {line["selection"]: line for line in pilot_table(found, [row.prompt for row in heldout])}
    assert table["hard:0.5"]["verdict"] == "better" and table["hard:0.5"]["accuracy"] > 0.95
    assert table["easy:0.5"]["verdict"] == "worse" and table["easy:0.5"]["accuracy"] < 0.05
    assert recommended(list(table.values())) == "hard:0.5"
    again = list(run_pilot(recipe(words), rows, findings, heldout, rules, 1, done=found[:3]))
    assert again == found[3:]  # the one that was missing, and the same


def test_selections_have_one_size_and_the_seed_draws_another_random_one():
    findings = [
        {"reference_margin_per_token": i, "probability": -i, "ches_per_token": i, "similarity": i} for i in range(20)
    ]
    one, other = (pilot_selections(findings, every_rule(0.25), seed) for seed in (0, 1))
    assert list(one) == ["all", "random", "agreed:0.25", "hard:0.25", "easy:0.25", "low-ches:0.25", "diverse:0.25"]
    assert {len(rows) for name, rows in one.items() if name != "all"} == {5} and len(one["all"]) == 20
    assert one["random"] != other["random"] and one["hard:0.25"] == other["hard:0.25"] == (0, 1, 2, 3, 4)
    with pytest.raises(UserError, match=r"hard:0\.5, easy:0\.25 keep different numbers"):
        pilot_selections(findings, ["hard:0.5", "easy:0.25"], 0)


def test_the_table_by_hand():
    """Four held-out pairs of four prompts, two seeds: accuracies are means over both, differences paired."""
    runs = [
        PilotRun("all", 0, 8, [1.0, 1.0, 1.0, 1.0], 1e-3),
        PilotRun("random", 0, 4, [1.0, -1.0, -1.0, -1.0], 1e-3),
        PilotRun("all", 1, 8, [1.0, 1.0, 1.0, -1.0], 1e-3),
        PilotRun("random", 1, 4, [1.0, -1.0, -1.0, -1.0], 1e-3),
    ]
    first, second = pilot_table(runs, ["a", "b", "c", "d"])
    assert (first["accuracy"], second["accuracy"]) == (0.875, 0.25)
    assert first["accuracy_vs_random"][0] == pytest.approx(0.625) and first["margin"] == pytest.approx(0.75)
    assert second["verdict"] == "" and "accuracy_vs_random" not in second
    assert verdict(None) == verdict([0.1, 0.0, 0.3]) == ALIKE
    assert verdict([0.1, 0.01, 0.2]) == "better" and verdict([-0.1, -0.2, -0.01]) == "worse"
    untold = [{"selection": "all", "verdict": ALIKE, "accuracy": 0.9}]
    assert recommended(untold) == "all"


def test_command_afters_are_such_as_can_be_typed():
    config = Config.model_validate({"model": "m x", "data": "d/pairs.jsonl"})
    assert command_after(config, "all") == "mlxdpo train --model 'm x' --data d/pairs.jsonl"
    wanted = "mlxdpo data audit d/pairs.jsonl --model 'm x' --select agreed:0.5 --out pairs.agreed.jsonl"
    assert command_after(config, "agreed:0.5") == wanted


def written(rows):
    lines = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.slow
def test_the_command_writes_a_table_and_resumes(words, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(written(made(30)))
    line = ["data", "audit", "pairs.jsonl", "--model", str(words), "--data.template", "plain", "--folds", "3"]
    line += ["--test", "--select", "agreed:0.5", "--train.steps", "2", "--optim.lr", "1e-3", "--data.eval-fraction"]
    line += ["0.4", "--json"]
    assert cli([*line, "--seeds", "1"]) == 0, capsys.readouterr()
    shown = json.loads(capsys.readouterr().out)
    assert [one["selection"] for one in shown["table"]] == ["all", "random", "agreed:0.5"]
    assert shown["recommended"] in ("all", "agreed:0.5") and shown["steps"] == 2 and shown["heldout"] > 3
    kept = json.loads((tmp_path / "pairs.pilot.json").read_text())
    assert len(kept["runs"]) == 3 and kept["next"] == shown["next"]
    with monkeypatch.context() as patch:
        patch.setattr(selection_pilot, "train", lambda *_, **__: pytest.fail("trained again"))
        assert cli([*line, "--seeds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] == shown["table"]
    assert cli([one for one in line if one != "--json"]) == 0  # two seeds: three more runs
    assert "4 of 6: all, seed 1" in (text := capsys.readouterr().out) and "selection" in text and "agreed:0.5" in text
    assert f"next: {shown['next'].split(' --')[0]}" in text
    assert cli([*line, "--data.max-length", "32"]) == 2
    assert "pairs.pilot.json is of other pairs or settings" in capsys.readouterr().err


def test_asked_to_stop_it_says_how_to_resume(words, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(written(made(20)))
    stopped = lambda *_, **__: iter([PilotRun("all", 0, 18, [1.0], 1e-3)])  # noqa: E731
    monkeypatch.setattr(selection_pilot, "run_pilot", stopped)
    line = ["data", "audit", "pairs.jsonl", "--model", str(words), "--folds", "3", "--test"]
    assert cli(line) == 130
    assert "run the same command again to resume (pairs.pilot.json has 1 of 14 runs)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--test", "--out", "o.jsonl"], "--test writes no pairs: leave out --out, --drop and --flip"),
        (["--train.steps", "9"], "train settings have no effect without --test"),
        (["--seeds", "3"], "--seeds has no effect without --test"),
        (["--test", "--select", "best:0.5"], "expected NAME:SHARE such as low-ches:0.8"),
        (["--test", "--train.minutes", "3"], "give --train.steps, not minutes or epochs"),
        (["--test", "--data.columns.weight", "w"], "--test does not take data.columns weight"),
        (["--test", "--data.eval-fraction", "0"], "--test needs held-out pairs and others"),
    ],
)
def test_what_has_no_effect_is_refused_before_the_work(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert cli(["data", "audit", "pairs.jsonl", "--model", "m", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*.audit.*")) and audit_pilot.LEVEL == 0.95
