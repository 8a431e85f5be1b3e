"""Every recipe of examples/ is valid, planned and trained on rows shaped exactly like its data set, on a tiny model."""

import json
import re
from pathlib import Path

import pytest
from example_rows import ROWS, SHAPES
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.config import load_config
from mlxdpo.data.formats import detect
from mlxdpo.losses import LOSSES
from mlxdpo.runs import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
PAGE = (EXAMPLES / "README.md").read_text("utf-8")
COUNT = 48


def words_for(name, folder):
    """Command-line words that put a tiny model and made-up rows in the place of the recipe's."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # MLX quantises 64 columns at once
    write_model(folder / "tiny", chatml_tokenizer(), max_position_embeddings=2048, num_hidden_layers=8, **wide)
    for file, numbers in (("rows", range(COUNT)), ("held", range(COUNT, COUNT + 6))):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(ROWS[name](i)) + "\n" for i in numbers))
    words = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl"), "--train.steps", "2"]
    named = load_config(EXAMPLES / f"{name}.yaml").data.eval
    return [*words, *(["--data.eval", str(folder / "held.jsonl")] if named else [])]


def test_there_are_the_ten_that_were_promised():
    promised = ["chat", "tone", "code", "delta", "refusals", "summaries", "zephyr", "smoltulu", "smollm3", "olmo3"]
    assert sorted(promised) == NAMES == sorted(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_its_section_names_data_licence_hardware_time_and_figures(name):
    config = load_config(EXAMPLES / f"{name}.yaml")
    section = re.search(rf"\n## [^\n]*`{name}\.yaml`\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL).group(1)
    for subject in ("Data", "Licence", "Columns", "Hardware", "Time", "Figures"):
        assert f"**{subject}.**" in section, subject
    assert f"`{config.model.path}`" in section and f"`{config.data.path}`" in section
    assert f"`{SHAPES[name]}`" in section
    assert all(f"`{column}`" in section for column in ROWS[name](0)), "a column of the data set is not named"


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_data_set_are_read_as_the_page_says(name):
    assert detect(ROWS[name](0)).name == SHAPES[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_group_of_knobs_says_why(name):
    """A comment on the first value of each section, and on most of the others."""
    lines = (EXAMPLES / f"{name}.yaml").read_text("utf-8").splitlines()
    knobs = [line for line in lines if re.match(r"  \w+: ", line)]
    assert sum("#" in line for line in knobs) >= 0.6 * len(knobs)
    assert any(re.search(r"arXiv \d{4}\.\d{5}", line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_planned_and_trains(name, tmp_path, cache, capsys):
    words = [str(EXAMPLES / f"{name}.yaml"), *words_for(name, tmp_path)]
    assert run(["plan", *words, "--json"]) == 0, capsys.readouterr()
    assert json.loads(capsys.readouterr().out)["plan"]["steps"] == 2
    assert run(["train", *words, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr()
    trained = Run.open(tmp_path / "run")
    assert trained.manifest()["data"]["pairs"] + trained.manifest()["data"]["heldout"] >= COUNT - 2
    assert (trained.adapter / "adapters.safetensors").is_file()


@pytest.mark.real
def test_tone_runs_where_it_stands(tmp_path, monkeypatch):
    """The real model and the bundled pairs, from the root of the repository; two steps, few held-out rows."""
    monkeypatch.chdir(EXAMPLES.parent)
    held = Path(load_config("examples/tone.yaml").data.eval).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(held[:4]))
    words = ["--train.steps", "2", "--data.eval", str(tmp_path / "held.jsonl"), "--out", str(tmp_path / "run")]
    assert run(["train", "examples/tone.yaml", *words]) == 0
    steps = [line for line in Run.open(tmp_path / "run").metrics() if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-3) and len(steps) == 2


def executed(name: str, folder: Path) -> dict:
    """The names that a notebook's cells leave, run on a tiny model in `folder`; plain Python needs no kernel."""
    write_model(folder / "tiny", chatml_tokenizer())
    names: dict = {}
    for cell in code_cells(name):
        exec("".join(cell["source"]).replace('"smollm2"', '"tiny"'), names)
    return names


def code_cells(name: str) -> list[dict]:
    """The cells with code."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def workplace(tmp_path, cache, monkeypatch):
    """A working folder; objectives that cells register are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    known = dict(LOSSES)
    yield tmp_path
    LOSSES.clear()
    LOSSES.update(known)


@pytest.mark.slow
def test_pairs_become_a_verdict(workplace):
    names = executed("pairs_to_verdict", workplace)
    assert names["again"].same and names["found"]["sentences"]
    assert "<svg" in names["run"]._repr_html_() and names["other"].config().loss.name == "squared"


def test_a_run_is_opened_judged_and_its_cost_is_shown(workplace, capsys):
    names = executed("is_it_better", workplace)
    areas = names["found"]["retained"]["changes"]["areas"]
    assert len(areas) == 6 and all(area["area"] in capsys.readouterr().out for area in areas[:1])
    assert {rate["judge"] for rate in names["found"]["winrates"]} == {"polite", "longest"}
    assert (names["run"].path / "report.html").exists() and "<th>before</th>" in names["run"]._repr_html_()


@pytest.mark.slow
def test_own_objective_reward_and_sweep(workplace):
    names = executed("own_objective_and_reward", workplace)
    losses = [run.config().loss for run in names["found"].runs]
    assert {(loss.name, loss.gamma) for loss in losses} == {("token_logistic", 0.5), ("token_logistic", 2.0)}
    assert names["again"].same
    assert not any((workplace / "cache").rglob("*logps*")), "the objective needs no reference"
    assert [rate["judge"] for rate in names["verdict"]["winrates"]] == ["eight_words"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_short_and_what_it_printed_is_of_no_machine(name):
    """Outputs are stored by `make notebooks`, of all cells in order."""
    cells = code_cells(name)
    counts = [cell["execution_count"] for cell in cells]
    assert len(cells) < 8 and counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert re.findall(r"/(?:tmp|home|root|Users|work|usr|opt)/|site-packages", json.dumps(outputs)) == []
