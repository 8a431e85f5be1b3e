"""Every command and the Python of docs/stages.md run, in order, with a tiny stand-in for the built-in model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.model import policy

PAGE = (Path(__file__).parents[2] / "docs" / "stages.md").read_text("utf-8")
FRUIT = ["An apple.", "A pear.", "A plum.", "A fig.", "A lime.", "A date.", "A kiwi.", "A peach."]
QUICK = [
    "--train.batch-size",
    "2",
    "--train.gradient_accumulation",
    "1",
    "--train.steps",
    "2",
    "--data.eval-fraction",
    "0.3",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    """A folder with pairs and thumbs; smollm2 is a model of a few thousand weights."""
    write_model(tmp_path / "stand-in", chatml_tokenizer())
    monkeypatch.setitem(policy.BUILTIN, "smollm2", lambda: tmp_path / "stand-in")
    rows = [{"prompt": f"Name a fruit, {i}.", "chosen": f, "rejected": "Trains."} for i, f in enumerate(FRUIT)]
    thumbs = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
    for name, some in (("pairs", rows), ("thumbs", thumbs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_page_runs(place, capsys):
    commands = [shlex.split(line)[1:] for block in blocks("sh") for line in block.splitlines() if line]
    assert {words[0] for words in commands} == {"train", "generate", "eval", "data"}
    for words in commands:
        more = {
            "train": QUICK,
            "generate": ["--max-tokens", "4"],
            "eval": ["--prompts", "3", "--samples", "1", "--max-tokens", "4"],
        }.get(words[0], [])
        assert run([*words, *more]) == 0, (words, capsys.readouterr())
    [results] = (place / "runs/dpo/eval").glob("results_*.json")
    assert "reward:rm" in results.read_text()
    for block in blocks("python"):
        capsys.readouterr()
        exec(compile(block, "docs/stages.md", "exec"), {})
        first, second = map(float, capsys.readouterr().out.strip(" []\n").split())
        assert first != second
