"""A run stands alone: moved or copied, with and without its data, it is opened from any folder by every command."""

import json
import shutil

import pytest
from slow_cases import rest_slow
from tiny_runs import adapter_bytes
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as command
from mlxdpo.runs import Run
from mlxdpo.ui.variants import LoadedVariants

SHORT = "--prompts 2 --samples 1 --max-tokens 2"
COMMANDS = {
    "generate": "generate RUN --prompt the --max-tokens 2",
    "before": "generate RUN --prompt the --max-tokens 2 --before",
    "eval": f"eval RUN --judge longest {SHORT}",
    "frontier": f"frontier RUN --judge longest {SHORT}",
    "collect": "collect RUN --prompts PROMPTS --judge longest --samples 4 --max-tokens 6 --unfinished keep --out OUT",
    "export": "export RUN --to mlx --pairs 2 --out OUT --force",
    "resume": "train --resume RUN",
    "longer": "train --resume RUN --train.epochs 5",
}
TRAIN = "train --model llama --data pairs.jsonl --data.eval-fraction 0.4 --data.template plain --data.max-length 64"
SMALL = "--lora.rank 4 --lora.layers 1 --train.gradient-accumulation 2 --optim.lr 0.003"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder `project` with model, pairs and a run of them, started there with relative names."""
    folder = tmp_path_factory.mktemp("made") / "project"
    folder.mkdir()
    write_words(folder / "llama")
    rows = [{"prompt": f"the {a}", "chosen": " runs", "rejected": f" {a} sleeps"} for a in WORDS[:12]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder.parent / "cache"))
        patch.chdir(folder)
        assert command([*TRAIN.split(), *SMALL.split(), "--out", "runs/one"]) == 0
        second = "--model.adapter runs/one/adapter --reference.model llama --out runs/two"
        rest = "--train.gradient-accumulation 2 --optim.lr 0.003"
        assert command([*TRAIN.split(), *rest.split(), *second.split()]) == 0
    return folder


@pytest.fixture
def elsewhere(made, tmp_path, monkeypatch):
    """Another working directory, with the cache of `made`."""
    monkeypatch.setenv("MLXDPO_CACHE", str(made.parent / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def moved(made, folder, parts):
    """A copy of `parts` of the project, at a time when the project is gone."""
    for part in parts:
        copy = shutil.copytree if (made / part).is_dir() else shutil.copyfile
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        copy(made / part, folder / part)
    return folder / "runs" / "two"


@pytest.fixture
def gone(made):
    """The project out of sight while a test lasts."""
    away = made.with_name("away")
    made.rename(away)
    yield away
    away.rename(made)


def words(line, run, folder):
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "the red"}\n{"prompt": "the blue"}\n')
    names = {"RUN": str(run), "PROMPTS": str(prompts), "OUT": str(folder / "out")}
    return [names.get(word, word) for word in line.split()]


@pytest.mark.parametrize("line", COMMANDS)
def test_moved_with_its_data_it_is_what_it_was(elsewhere, gone, line):
    run = moved(gone, elsewhere / "new" / "place", ("llama", "pairs.jsonl", "runs"))
    assert command(words(COMMANDS[line], run, elsewhere)) == 0
    assert line == "longer" or adapter_bytes(run) == adapter_bytes(gone / "runs" / "two")


@pytest.mark.parametrize("line", COMMANDS)
def test_moved_alone_it_finds_what_stayed(elsewhere, made, line):
    run = moved(made, elsewhere / "lonely", ("runs/two",))
    assert command(words(COMMANDS[line], run, elsewhere)) == 0


@pytest.mark.parametrize("line", rest_slow(list(COMMANDS), list(COMMANDS)[:1]))
def test_from_another_folder(elsewhere, made, line):
    shutil.copytree(made / "runs", made / "kept")
    try:
        assert command(words(COMMANDS[line], made / "runs" / "two", elsewhere)) == 0
    finally:
        shutil.rmtree(made / "runs")
        (made / "kept").rename(made / "runs")


def test_the_app_opens_a_moved_run(elsewhere, gone):
    run = Run.open(moved(gone, elsewhere / "new", ("llama", "pairs.jsonl", "runs")))
    assert LoadedVariants().load(run).after.name == "after"


NEEDS_DATA = {"eval", "frontier", "export", "resume", "longer"}


@pytest.mark.parametrize("line", COMMANDS)
def test_without_its_data_the_place_where_it_was_made_is_named(elsewhere, gone, line, made, capsys):
    run = moved(gone, elsewhere / "new", ("llama", "runs"))
    status = command(words(COMMANDS[line], run, elsewhere))
    said = capsys.readouterr().err
    if line not in NEEDS_DATA:
        assert status == 0
        return
    assert status == 2 and said.count("\n") == 1
    assert f"{run}: its data.path no longer exists: the run was made in {made}/runs/two with {made}/pairs.jsonl" in said
    assert "at ../../pairs.jsonl relative to the run" in said


@pytest.mark.parametrize("line", COMMANDS)
def test_without_its_model_too(elsewhere, gone, line, made, capsys):
    run = moved(gone, elsewhere / "new", ("pairs.jsonl", "runs"))
    assert command(words(COMMANDS[line], run, elsewhere)) == 2
    assert f"with {made}/llama; restore it there, or at ../../llama relative to the run" in capsys.readouterr().err


def test_both_forms_are_kept_and_the_recipe_is_as_it_was_given(made):
    found = json.loads((made / "runs" / "two" / "paths.json").read_text())
    assert {k: v.pop("given") for k, v in found.items() if k != "run"} == {
        "model.path": "llama",
        "model.adapter": "runs/one/adapter",
        "reference.model": "llama",
        "data.path": "pairs.jsonl",
    }
    assert found == {
        "run": f"{made}/runs/two",
        "model.path": {"absolute": f"{made}/llama", "relative": "../../llama"},
        "model.adapter": {"absolute": f"{made}/runs/one/adapter", "relative": "../one/adapter"},
        "reference.model": {"absolute": f"{made}/llama", "relative": "../../llama"},
        "data.path": {"absolute": f"{made}/pairs.jsonl", "relative": "../../pairs.jsonl"},
    }
    assert "path: pairs.jsonl" in (made / "runs" / "two" / "config.yaml").read_text()


def test_seen_from_where_it_was_made_names_are_as_they_were_given(made, monkeypatch):
    monkeypatch.chdir(made)
    config = Run.open("runs/two").config()
    assert (config.model.path, config.data.path, config.model.adapter) == ("llama", "pairs.jsonl", "runs/one/adapter")
    monkeypatch.chdir(made.parent)
    assert Run.open("project/runs/two").config().data.path == str(made / "pairs.jsonl")


def test_a_recipe_that_was_changed_by_hand_counts(made, elsewhere):
    run = moved(made, elsewhere / "new", ("runs",))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("path: pairs.jsonl", "path: other.jsonl"))
    assert Run.open(run).config().data.path == "other.jsonl"
