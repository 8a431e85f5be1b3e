"""The command line: what a user meets. Exit status, one sentence per mistake, numbers that are right."""

import json
import re
import shlex

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from row_shapes import FIXTURES
from tiny_models import write_model
from tiny_runs import finish, recipe, write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.commands import terminal
from mlxdpo.config import ModelConfig
from mlxdpo.data.encode import encode_all
from mlxdpo.data.read import read_pairs
from mlxdpo.forward.logprobs import completion_logps
from mlxdpo.model.adapters import load_run
from mlxdpo.model.policy import load_policy


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A folder with a model, pairs and nothing else."""
    write_model(tmp_path / "model", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "train --model model --data nope.jsonl": "nope.jsonl: no such file or folder",
    "train --model nope --data pairs.jsonl": "nope: no such folder, and not a Hub id (owner/name) nor smollm2",
    "train --data pairs.jsonl": "no model given; pass --model",
    "train --model model": "no data given; pass --data",
    "train --model model --data pairs.jsonl --loss.name dpo": "loss.name `dpo` is unknown; known: sigmoid, ipo, hinge",
    "train --model model --data pairs.jsonl --loss.bta 1": "unknown option --loss.bta; did you mean --loss.beta?",
    "train --model model --data pairs.jsonl --loss.beta -1": "`loss.beta` is '-1': Input should be greater than 0",
    "train --model model --data pairs.jsonl --optim.name adamx": "optim.name `adamx` is unknown; known: adamw",
    "train --model model --data pairs.jsonl --loss.name ipo --loss.label-smoothing 0.1": "has no effect on `ipo`",
    "train --model model --data pairs.jsonl --lora.keys wq": "lora.keys: the model has no layer `wq`; in its blocks:",
    "train nope.yaml": "nope.yaml: no such recipe",
    "train bad.yaml": "bad.yaml: unknown key `loss.bta`; did you mean `loss.beta`?",
    "train --resume runs/none": "runs/none: no config.yaml in it; expected a run directory",
    "train bad.yaml --resume model": "--resume model uses the run's settings; drop bad.yaml",
    "generate runs/none --prompt hi": "runs/none: no config.yaml in it",
    "score --model model --data pairs.jsonl --adapter nope --out s.jsonl": "nope: no adapter in it; expected",
    "data check nope.jsonl": "nope.jsonl: no such file or folder",
    "demo --shuffle-labels --flip-labels": "are different controls; use one at a time",
    "objectivs": "unknown command objectivs; did you mean: mlxdpo objectives",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(line, place, capsys):
    (place / "bad.yaml").write_text("model: model\nloss: {bta: 1}\n")
    before = {path.name for path in place.iterdir()} - {"cache"}
    assert run(line.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and MISTAKES[line] in said.err
    assert "Traceback" not in said.err + said.out
    assert {path.name for path in place.iterdir()} - {"cache"} == before


def test_recipe_and_dotted_names_give_one_resolved_configuration(place, capsys):
    (place / "recipe.yaml").write_text("model: model\ndata: pairs.jsonl\noptim: {lr: 1e-5}\ntrain: {steps: 1}\n")
    line = "train recipe.yaml --optim.name sgd --lora.rank 2 --data.template plain --out runs/a"
    assert run(line.split()) == 0
    saved = (place / "runs/a/config.yaml").read_text()
    for line in ("lr: 1.0e-05", "name: sgd", "rank: 2", "template: plain", "steps: 1"):
        assert line in saved
    assert run(["train", "recipe.yaml", "--out", "runs/a"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_scores_are_log_probs_and_rewards_beta_times_their_ratios(tmp_path, cache, monkeypatch):
    config = recipe(tmp_path, "run", train={"steps": 3})
    finish(config)
    monkeypatch.chdir(tmp_path)
    line = "score --model llama --adapter run/adapter --data pairs.jsonl --data.template plain --beta 0.5 --out s.jsonl"
    assert run(line.split()) == 0
    rows = [json.loads(row) for row in (tmp_path / "s.jsonl").read_text().splitlines()]
    from mlxdpo.runs import Run

    models = {"reference": load_policy(config.model), "policy": load_run(Run.open(tmp_path / "run"))}
    examples, _ = encode_all(read_pairs(config.data)[0], models["policy"].tokenizer, config.data)
    assert [row["where"] for row in rows] == [e.where for e in examples]
    for row, example in zip(rows, examples, strict=True):
        for side in ("chosen", "rejected"):
            ids, count = np.concatenate([example.prompt, getattr(example, side)]), len(getattr(example, side))
            mask = mx.array(np.arange(len(ids) - 1) >= len(ids) - 1 - count)[None]
            for name, policy in models.items():
                want = completion_logps(policy.model, mx.array(ids[None]), mask).item()
                assert row[f"{name}_{side}"] == pytest.approx(want, abs=1e-3)
            assert row[f"{side}_tokens"] == count
            reward = 0.5 * (row[f"policy_{side}"] - row[f"reference_{side}"])
            assert row[f"reward_{side}"] == pytest.approx(reward, abs=1e-9)
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-9)
    assert any(abs(row["margin"]) > 1e-3 for row in rows)


def test_a_quantised_base_trains_and_its_reference_is_the_quantised_one(place, capsys):
    write_model(place / "wide", chatml_tokenizer(), hidden_size=64, head_dim=16)
    line = "train --model wide --model.quantize 4 --data pairs.jsonl --train.steps 2 --optim.lr 1e-3 --out runs/q"
    assert run([*line.split(), "--train.batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 bits" in out and "loss 0.6931" in out
    manifest = json.loads((place / "runs/q/manifest.json").read_text())
    assert manifest["reference"]["quantization"]["bits"] == 4
    assert run(["generate", "runs/q", "--prompt", "hi", "--max-tokens", "3", "--json"]) == 0
    policy = load_policy(ModelConfig(path="wide", quantize=4))
    arrays = dict(tree_flatten(policy.model.parameters()))
    mx.save_safetensors(str(place / "wide" / "model.safetensors"), arrays, {"format": "mlx"})
    settings = json.loads((place / "wide" / "config.json").read_text()) | {
        "quantization": {"group_size": 64, "bits": 4}
    }
    (place / "wide" / "config.json").write_text(json.dumps(settings))
    assert run(["generate", "runs/q", "--prompt", "hi"]) == 2
    assert "wide is already quantised (4 bits); drop model.quantize" in capsys.readouterr().err


def test_data_check_counts_tokens_and_shows_what_is_scored(place, capsys):
    (place / "mixed.jsonl").write_text(
        '{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "Trains."}\n'
        '{"prompt": "Name a fruit.", "chosen": true, "rejected": "Trains."}\n'
    )
    assert run(["data", "check", "mixed.jsonl", "--model", "model", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == 1 and found["would_stop"] == 1 and found["refused"] == {"wrong type": 1}
    assert [text for text, scored in found["first_pair"]["chosen"] if scored] == ["An apple.<|im_end|>"]
    assert found["tokens"]["chosen"]["median"] == len(chatml_tokenizer().encode("An apple.")) + 1
    (place / "thumbs.jsonl").write_text('{"prompt": "Hi", "completion": "Hello", "label": true}\n')
    assert run(["data", "check", "thumbs.jsonl"]) == 0
    assert "1 opinion from 1 row" in capsys.readouterr().out
    assert run(["data", "check", "thumbs.jsonl", "--model", "model"]) == 0
    shown = capsys.readouterr().out
    assert "completion: " in shown and "[[Hello<|im_end|>]]" in shown and "rejected" not in shown


SOUND_ROW = '{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "Trains."}\n'


def test_data_check_has_the_exit_status_that_training_would_have(place, capsys):
    """Bad rows among the held-out ones and rows that only the tokenizer refuses count too; what is skipped does not."""
    (place / "good pairs.jsonl").write_text(SOUND_ROW)
    (place / "held.jsonl").write_text(SOUND_ROW + '{"prompt": "Hi", "chosen": "", "rejected": "x"}\n')
    check = ["data", "check", "good pairs.jsonl"]
    assert run(check) == 0
    assert run([*check, "--data.eval", "held.jsonl"]) == 2
    out = capsys.readouterr().out
    assert "Held-out data: left out 1 x empty completion (first: held.jsonl:2:" in out
    assert "1 bad row would stop a training" in out
    said = re.search(r"`mlxdpo (data check .* --data.on-bad-row skip)`", out)
    assert run([*shlex.split(said[1]), "--data.eval", "held.jsonl"]) == 0
    with open(place / "good pairs.jsonl", "a") as file:
        file.write('{"prompt": "<|im_start|>user\\nHi", "chosen": "a", "rejected": "b"}\n')
    assert run(check) == 0
    assert run([*check, "--model", "model"]) == 2
    assert "already templated" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai", "sharegpt", "alpaca", "kto_sharegpt", "arena", "distilabel"])
def test_rows_of_other_programs_train_without_a_flag(place, capsys, name):
    texts = [json.dumps(FIXTURES[name]).replace("Hi?", asked) for asked in ("Hi?", "Ho?", "Hu?", "He?")]
    (place / "rows.json").write_text(json.dumps([row for text in texts for row in json.loads(text)]))
    kto = ["--loss.name", "kto"] if name.startswith("kto") else []
    assert run(["train", "--model", "model", "--data", "rows.json", "--train.steps", "2", "--out", "runs/a", *kto]) == 0
    assert "1 held out" in capsys.readouterr().out
    assert (place / "runs/a/adapter/adapters.safetensors").is_file()


def test_doctor_reports_the_fast_blas(capsys, ticking):
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fast_blas"] and found["problems"] == []
    assert found["matmul_gflops"] == pytest.approx(2 * 1024**3 / 0.02 / 1e9)


def test_the_clock_and_the_numbers_of_a_line():
    assert [terminal.clock(s) for s in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert terminal.numbers({"loss": 0.69314, "rewards/margins": 0.01, "other": 1}) == "loss 0.6931  margin +0.0100"
