"""The objective page's tables are the registry's, and the command shows the same."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mlxdpo.cli import run
from mlxdpo.commands.objectives import TABLES, facts
from mlxdpo.config import Config, LossConfig, load_config
from mlxdpo.losses import LOSSES, resolve

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_of_the_page_are_the_registrys(name):
    """When stale: `mlxdpo objectives --markdown` prints them."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE.read_text("utf-8"), re.DOTALL)
    assert found and found.group(1) == TABLES[name]()


def test_the_page_explains_every_knob_and_every_objective():
    page = PAGE.read_text("utf-8")
    assert all(f"`{knob}`" in page for objective in LOSSES.values() for knob in objective.knobs)
    assert all(f"| `{name}` |" in page for name in LOSSES)


def test_recipes_of_the_page_resolve():
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = block.group(1).splitlines()
    assert len(lines) == 2
    for line in lines:
        loss = resolve(Config.model_validate(yaml.safe_load(line)).loss)
        assert loss.lifts and loss.start() is None


def test_the_command_lists_papers_knobs_and_start_values(capsys):
    assert run(["objectives", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(LOSSES)
    assert rows["simpo"]["knobs"] == {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}
    assert rows["ipo"]["arxiv"] == "2310.12036" and rows["ipo"]["start"] == pytest.approx(25)
    assert run(["objectives", "--markdown"]) == 0
    assert TABLES["objectives"]() in capsys.readouterr().out
    assert run(["objectives"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in LOSSES)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_command_shows_one_objective_with_its_formula(name, capsys):
    assert run(["objectives", name]) == 0
    shown = capsys.readouterr().out
    assert all(f"--loss.{knob.replace('_', '-')} " in shown for knob in LOSSES[name].knobs)
    assert all(reason in shown for reason in LOSSES[name].refuses.values())
    assert LOSSES[name].paper in shown or name == "aot_unpaired"
    assert facts(name)["formula"]


def test_an_unknown_objective_is_one_sentence(capsys):
    assert run(["objectives", "simpoo"]) == 2
    assert capsys.readouterr().err == "error: simpoo is not an objective; did you mean simpo?\n"


OTHER = {
    "beta": "0.35", "label_smoothing": "0.2", "discopop_tau": "0.7", "dpop_lambda": "3", "length_alpha": "0.1",
    "cpo_alpha": "0.2", "gamma": "0.7", "alphapo_alpha": "-0.4", "desirable_weight": "1.5",
    "flip_budget": "0.3", "winsor_budget": "0.9",
    "undesirable_weight": "0.5", "f_divergence": "js_divergence", "ld_alpha": "0.3", "wpo": "true",
    "reference_free": "true", "name": "sigmoid+sft",
}  # fmt: skip


def config_of(monkeypatch, *words):
    seen = []
    monkeypatch.setattr("mlxdpo.commands.train.follow_training", lambda config, *_: seen.append(config) or 0)
    assert run(["train", *words]) == 0
    return seen[0]


def from_command_line(monkeypatch, *words):
    """What `mlxdpo train` makes of the words."""
    return config_of(monkeypatch, *words).loss


@pytest.mark.parametrize("knob", sorted(OTHER))
def test_every_knob_is_reachable_from_yaml_and_from_the_command_line(knob, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(f"loss: {{{knob}: {OTHER[knob]}}}\n")
    written = load_config(tmp_path / "recipe.yaml").loss
    word = f"--loss.{knob.replace('_', '-')}"
    typed = from_command_line(monkeypatch, *([word] if OTHER[knob] == "true" else [word, OTHER[knob]]))
    assert written == typed and getattr(typed, knob) != getattr(LossConfig(), knob)
    assert from_command_line(monkeypatch, f"{word}={OTHER[knob]}") == typed


def test_no_knob_is_forgotten_above(tmp_path, monkeypatch):
    assert set(OTHER) == set(LossConfig.model_fields) - {"weights", "f_alpha"}
    words = ["--loss.name", "sigmoid+sft", "--loss.weights", "1", "--loss.weights", "0.1"]
    assert from_command_line(monkeypatch, *words).weights == [1.0, 0.1]
    words = ["--loss.f-divergence", "alpha_divergence", "--loss.f-alpha", "0.7"]
    assert from_command_line(monkeypatch, *words).f_alpha == 0.7
    (tmp_path / "recipe.yaml").write_text("loss: {name: [sigmoid, sft], weights: [1, 0.1]}\n")
    found = load_config(tmp_path / "recipe.yaml").loss
    assert (found.name, found.weights) == ("sigmoid+sft", [1.0, 0.1])


def test_columns_and_a_moving_reference_are_reachable_from_the_command_line(monkeypatch):
    found = config_of(monkeypatch, "--data.columns.probability", "p", "--data.columns.weight", "w")
    assert found.data.columns == {"probability": "p", "weight": "w"}
    found = config_of(monkeypatch, "--reference.sync-every", "512", "--reference.sync-alpha", "0.7")
    assert (found.reference.sync_every, found.reference.sync_alpha) == (512, 0.7)


def test_naming_an_objective_on_the_command_line_keeps_the_recipes_knobs(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("loss: {beta: 0.7}\n")
    found = from_command_line(monkeypatch, str(tmp_path / "recipe.yaml"), "--loss.name", "simpo")
    assert (found.beta, found.gamma) == (0.7, 1.0)
    assert from_command_line(monkeypatch, "--loss.name", "simpo").beta == 2.0
