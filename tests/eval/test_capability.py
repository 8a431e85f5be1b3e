"""`mlxdpo eval --tasks` with the real lm-evaluation-harness, on a task of our own that needs no network.

Skipped, and it says so, where lm-evaluation-harness is not installed: `pip install 'mlxdpo[tasks]'`.
"""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'mlxdpo[tasks]' runs this")

import mlx.core as mx
from tiny_runs import trained, untrain

from mlxdpo import open_trained_run
from mlxdpo.cli import run as cli

TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""

WRITTEN = """task: saying
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of six questions whose first choice is the right one half of the time."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"q{i} the user:", "choices": [f" red {i}", f" blue ok {i}"], "answer": i % 2} for i in range(6)
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("colours", TASK), ("saying", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "colours.jsonl"))
    return folder


def test_capabilities_before_and_after_by_the_real_harness(tmp_path, cache, tasks, capsys):
    run = trained(tmp_path)
    capsys.readouterr()
    args = ["eval", str(run.path), "--tasks", "colours,saying", "--include", str(tasks), "--json"]
    assert cli(args) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((run.path / "eval" / "capability.json").read_text()) == found
    assert found["after"]["colours"]["sample_len"] == 6.0
    assert found["after"]["colours"]["acc,none"] == right(run, tasks) and found["tasks"] == ["colours", "saying"]
    assert found["after"]["saying"]["exact_match,none"] == 0.0  # four tokens of a tiny model hit nothing
    assert cli([*args, "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["before"]["colours"]["sample_len"] == 2.0


def right(run, tasks):
    """Share of questions whose right choice has the higher log-prob under the tuned model, worked out by hand."""
    opened, rows = open_trained_run(run), (tasks / "colours.jsonl").read_text().splitlines()
    tokenizer, won = opened.policy.tokenizer, 0
    for row in map(json.loads, rows):
        scores = []
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for choice in row["choices"]:
            start, whole = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, prompt + choice))
            logits = opened.policy.model(mx.array([whole]))[0].astype(mx.float32)
            logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            scores.append(sum(logps[t - 1, whole[t]].item() for t in range(len(start), len(whole))))
        won += scores.index(max(scores)) == row["answer"]
    return won / len(rows)


def test_an_untuned_run_loses_nothing(tmp_path, cache, tasks, capsys):
    run = untrain(trained(tmp_path))
    capsys.readouterr()
    assert cli(["eval", str(run.path), "--tasks", "colours", "--include", str(tasks), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["before"] == found["after"]


def test_an_unknown_task_is_refused_before_anything_is_loaded(tmp_path, cache, tasks, capsys):
    run = trained(tmp_path)
    assert cli(["eval", str(run.path), "--tasks", "no_such_task", "--include", str(tasks)]) == 2
    assert "--tasks no_such_task: lm-evaluation-harness has no such task" in capsys.readouterr().err
