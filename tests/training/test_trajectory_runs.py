"""Trajectories through the command line on a tiny model: every stage and the commands that take pairs."""

import json
import math

import pytest
from row_shapes import turns
from slow_cases import rest_slow
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.runs import Run


def tool_log(n):
    """Two calls with an alternative each, what the tool returned in between, and the answer."""
    steps = [
        {"chosen": f"add {n}", "rejected": [f"sub {n}", "stop"]},
        {"role": "tool", "content": f"{n} is what it is"},
        {"chosen": f"twice {n}", "rejected": f"half {n}"},
        {"role": "tool", "content": f"{2 * n}"},
        {"role": "assistant", "content": f"It is {2 * n}."},
    ]
    return {"prompt": f"Add and double {n}.", "steps": steps}


def labelled(n):
    return {"messages": turns(f"Count {n}.", "one", "go on", f"two {n}"), "labels": [True, n % 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    write_model(folder / "tiny", chatml_tokenizer(), max_position_embeddings=512)
    for name, row in (("steps", tool_log), ("labels", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(3, 9)))
    return folder


WAYS = {
    "dpo": ("steps", ()),
    "ld": ("steps", ("--loss.ld_alpha", "0.5")),
    "kto": ("labels", ("--loss.name", "kto")),
    "kto of pairs": ("steps", ("--loss.name", "kto")),
    "sft": ("steps", ("--stage", "sft")),
    "reward": ("steps", ("--stage", "reward")),
}


@pytest.mark.parametrize("way", rest_slow(list(WAYS), list(WAYS)[::2]))
def test_every_stage_trains_on_them(folder, way, capsys):
    file, words = WAYS[way]
    out = folder / way.replace(" ", "-")
    sizes = ["--train.steps", "2", "--train.batch_size", "6", "--train.gradient_accumulation", "1"]
    given = ["--model", str(folder / "tiny"), "--data", str(folder / f"{file}.jsonl"), *words]
    assert run(["train", *given, *sizes, "--out", str(out)]) == 0
    metrics = Run.open(out).metrics()
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if way in ("dpo", "ld"):
        assert losses[0] == pytest.approx(
            math.log(2), abs=1e-6
        )  # nothing has moved: the reference scored the same rows
    said = capsys.readouterr().out
    assert "[[" in said and "is what it is]]" not in said


def test_score_and_eval_count_scored_tokens(folder):
    out, scores = folder / "evaluated", folder / "scores.jsonl"
    given = ["--model", str(folder / "tiny"), "--data", str(folder / "steps.jsonl")]
    assert run(["train", *given, "--train.steps", "1", "--train.batch_size", "6", "--out", str(out)]) == 0
    assert run(["eval", str(out)]) == 0
    assert run(["score", *given, "--out", str(scores)]) == 0
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 18 and all(row["chosen_tokens"] < 12 for row in rows)
