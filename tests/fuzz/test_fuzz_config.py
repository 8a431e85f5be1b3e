"""Recipes, command lines, constitutions, rounds: a configuration, or one sentence."""

import os
import random
from importlib.resources import files

import pytest
import yaml
from counting import case, fuzzed
from hypothesis import strategies as st
from mutating import ODD_NAMES, ODD_TEXTS, ODD_VALUES, SEEDS, mutate_bytes, mutate_value

from mlxdpo.cli import run as cli
from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.losses import resolve
from mlxdpo.online.constitution.schema import dump_constitution, load_constitution
from mlxdpo.online.rounds import run
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import make_optimizer
from mlxdpo.types import UserError
from mlxdpo.ui.train.recipe_form import entered, flags, knobs, to_config

pytestmark = pytest.mark.fuzz

ROUNDS = {
    "model": "m", "data": {"path": "p.jsonl", "eval": "h.jsonl", "columns": {"prompt": "question"}},
    "loss": {"name": ["sigmoid", "sft"], "weights": [1, 0.5], "beta": 0.1}, "lora": {"rank": 4, "keys": ["a.b"]},
    "optim": {"lr": "1e-5", "betas": [0.9, 0.99]}, "collect": {"judge": "longest"}, "rounds": {"count": 2, "every": 3},
    "log": {"trackers": ["wandb"]}, "reference": {"sync_every": 4}, "stage": "dpo", "out": "runs/x",
}  # fmt: skip
WHOLE = Config().model_dump(mode="json")
RECIPES = [
    files("mlxdpo.demo").joinpath("recipe.yaml").read_text("utf-8"),
    dump_config(Config()),
    yaml.safe_dump(ROUNDS),
]


def yaml_bytes(rng, value):
    """As a hand or a program writes it; what YAML has no form of is left to the bytes."""
    return yaml.safe_dump(value, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def recipe_bytes(rng):
    if rng.random() < 0.5:
        return mutate_bytes(rng, rng.choice(RECIPES).encode())
    return yaml_bytes(rng, mutate_value(rng, rng.choice([ROUNDS, WHOLE]), most=3))


@fuzzed(80, 1_200, seed=SEEDS)
def test_recipes(tmp_path, seed):
    rng = random.Random(seed)
    file, again = tmp_path / "r.yaml", tmp_path / "again.yaml"
    file.write_bytes(recipe_bytes(rng))

    def load():
        config = load_config(file)
        again.write_text(dump_config(config), "utf-8")
        assert load_config(again) == config
        return config

    config = case("recipe", load)
    if config is not None:
        case("recipe: stage", lambda: stage_of(config))
        case("recipe: objective", lambda: resolve(config.loss, config.data.columns))
        case("recipe: optimizer", lambda: make_optimizer(config.optim))


@fuzzed(30, 600, seed=SEEDS)
def test_rounds(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    changed = mutate_value(rng, ROUNDS)

    def prepare():
        config = load_config(None, changed if isinstance(changed, dict) else {})
        run.check_rounds(config)
        run.drawing_of(config, 1)
        return run.round_config(config, tmp_path, rng.choice([1, 2]), None)

    case("recipe of rounds", prepare)


DOTTED = [f"{section}.{name}" for section, inner in WHOLE.items() if isinstance(inner, dict) for name in inner]
NAME = st.sampled_from([*DOTTED, "stage", "model", "data", "out", "rounds", "lora", "nothing", "lora.nothing", "a.b.c"])
VALUE = st.sampled_from([str(value) for value in ODD_VALUES if len(str(value)) < 3_000]) | st.text(max_size=8)
WORD = st.builds(lambda name, value: f"--{name}={value}", NAME, VALUE) | NAME.map("--{}".format) | VALUE


@fuzzed(25, 500, words=st.lists(WORD, min_size=1, max_size=3))
def test_command_line(tmp_path, monkeypatch, capsys, words):
    """`mlxdpo train` with odd options and no data at the end of it all."""
    monkeypatch.chdir(tmp_path)

    def call():
        capsys.readouterr()
        status = cli(["train", *words])
        out, said = capsys.readouterr()
        if status == 2:
            lines = [line for line in said.splitlines() if ": read as --" not in line]
            assert lines and all(line.startswith("error: ") for line in lines), said
            raise UserError(*(line.removeprefix("error: ") for line in lines))
        assert status == 0, (status, out, said)

    case("command line", call)


FORM = {knob.name: knob for knob in knobs()}
TYPED = st.dictionaries(st.sampled_from(list(FORM)), st.sampled_from(ODD_VALUES) | st.text(max_size=6), max_size=3)


@fuzzed(25, 500, typed=TYPED)
def test_form_of_the_page(typed):
    """What a browser may send for the fields of the Train tab."""
    case("recipe form", lambda: flags(to_config({name: entered(FORM[name], value) for name, value in typed.items()})))


RULES = dump_constitution(load_constitution())


@fuzzed(30, 500, seed=SEEDS)
def test_constitutions(tmp_path, seed):
    rng = random.Random(seed)
    file, again = tmp_path / "c.yaml", tmp_path / "again.yaml"
    raw = mutate_bytes(rng, RULES.encode()) if rng.random() < 0.5 else None
    file.write_bytes(raw if raw is not None else yaml_bytes(rng, mutate_value(rng, yaml.safe_load(RULES))))

    def load():
        rules = load_constitution(file)
        again.write_text(dump_constitution(rules), "utf-8")
        assert load_constitution(again) == rules

    case("constitution", load)


@fuzzed(20, 150, name=st.sampled_from([*ODD_NAMES, *ODD_TEXTS]))
def test_names_of_recipes_models_and_data(tmp_path, monkeypatch, name):
    """Names that are no names; none reaches the network."""
    from mlxdpo.data.read import read_preferences
    from mlxdpo.model.policy import find_model
    from mlxdpo.runs import Run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    case("names: recipe", lambda: load_config(name or None))
    case("names: model", lambda: find_model(name))
    if not os.path.isdir(name):  # "//" is a folder of everything
        case("names: data", lambda: read_preferences(Config().data.model_copy(update={"path": name})))
    case("names: run", lambda: Run.open(name))
