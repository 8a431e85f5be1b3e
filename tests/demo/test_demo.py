"""The demo's controls and measurements on a tiny model; once, marked `real`, the demo itself."""

import json
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from outlines import alone
from tiny_models import tiny_model
from tiny_runs import finish, recipe
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.commands.demo import duration_sentence
from mlxdpo.config import LoraConfig, load_config
from mlxdpo.data.planning import plan_epoch
from mlxdpo.demo.material import bundled, bundled_labels, flipped, judge_change, prepare_demo, shuffled
from mlxdpo.inference.trained_run import TrainedRun, encode_pairs, heldout_pairs, open_trained_run, pair_logps
from mlxdpo.model.adapters import adapters_off, attach_lora
from mlxdpo.model.policy import Policy
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo_eval.metrics.rewards import margins
from mlxdpo_eval.sampling import Answers, on_policy_kl


def tiny_policy(moved=True):
    """A tiny policy whose adapter has left its start, or has not."""
    model = attach_lora(tiny_model("llama"), LoraConfig(rank=4))
    if moved:
        for _, module in model.named_modules():
            if "lora_b" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
    tokenizer = chatml_tokenizer()
    return Policy(model, tokenizer, {}, None, frozenset({tokenizer.eos_token_id}), {})


def opened(policy, config):
    """The policy as a trained run whose reference is the model under the adapter."""
    run, start = (
        SimpleNamespace(config=lambda: config, need=lambda *names, **how: None),
        partial(adapters_off, policy.model),
    )
    return TrainedRun(run, config, policy, start, start)


def test_bundled_data_is_what_the_issue_of_a_demo_needs():
    pairs, heldout, prompts = bundled("pairs"), bundled("heldout"), bundled("prompts")
    assert len(pairs) >= 200 and len(heldout) >= 64 and len(prompts) >= 64
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in heldout + prompts}
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs + heldout)


def test_controls_exchange_labels_with_everything_that_belongs_to_them():
    rows = bundled("pairs")
    swapped = flipped(rows, seed=0)
    assert bundled_labels(rows, seed=0) == rows == flipped(swapped, seed=0)
    assert all(
        s["chosen"] == r["rejected"] and s["score_chosen"] == r["score_rejected"]
        for s, r in zip(swapped, rows, strict=True)
    )
    half = [row != other for row, other in zip(shuffled(rows, seed=0), rows, strict=True)]
    order = [i for w in plan_epoch(alone([1] * len(rows)), 8, 1, 0, 0).windows for batch in w for i in batch]
    assert 0.4 < np.mean([half[i] for i in order[:216]]) < 0.6  # whatever order the run sees them in
    assert sum(half) == len(rows) // 2 and shuffled(rows, seed=0) != shuffled(rows, seed=1)


def test_a_second_demo_does_not_write_into_the_first(tmp_path):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("textblob")
    config = prepare_demo(tmp_path / "run", 3, bundled_labels)
    assert config.train.seed == 3 and config.data.eos == "leave" and config.data.template == "plain"
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="already holds a run; choose another --out"):
        prepare_demo(tmp_path / "run", 3, bundled_labels)


def test_margins_of_the_last_evaluation_are_those_of_the_finished_run(tmp_path):
    """Beta times the difference of log-ratios, in the data's order; all zero before the first step."""
    config = recipe(tmp_path, loss={"beta": 0.5}, train={"epochs": 2})
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": config.data.path})})
    found = [np.array(event.pairs["margin"]) for event in finish(config) if event.kind == "eval"]
    assert not found[0].any()
    trained = open_trained_run(Run.open(config.out))
    rows, examples, _ = encode_pairs(trained, heldout_pairs(trained.run)[0])
    assert len(rows) == 18 and np.abs(found[-1]).max() > 0.01
    assert found[-1] == pytest.approx(margins(pair_logps(trained, examples), 0.5), abs=1e-4)


def test_how_long_the_demo_takes_is_said_for_training_and_for_the_rest():
    assert duration_sentence(40.0, 200.0).startswith("about 4:00 to go here: 0:40 of training, then 3:20 of")


def test_kl_counts_every_sampled_step_and_no_padding():
    policy = tiny_policy()
    answers = Answers(["a", "b"], ["a", "b"], [[1, 2], [3]], ["", ""], [[5, 6, 7], [8]], [False, True])
    wanted = []
    for ids, drawn, stopped in zip(answers.ids, answers.tokens, answers.stopped, strict=True):
        rows = mx.array([ids + drawn])
        tuned = np.array(policy.model(rows)[0], np.float64)
        with adapters_off(policy.model):
            start = np.array(policy.model(rows)[0], np.float64)
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (tuned, start))
        steps = (p * np.log(p / q)).sum(-1)[len(ids) - 1 :]
        wanted.append(steps[: len(drawn) + stopped].sum())
    assert on_policy_kl(opened(policy, load_config()), answers, 1.0) == pytest.approx(wanted, rel=1e-3)


def test_change_of_a_judge_is_paired_and_clustered_by_opening():
    pytest.importorskip("vaderSentiment")
    openings, texts = ["x", "x", "y", "y"], [" bad", " fine", " bad", " awful"]
    before = Answers(openings, openings, [[1]] * 4, texts, [[1]] * 4, [False] * 4)
    after = before._replace(texts=[" good", " fine", " good", " good"])
    change = judge_change("vader", before, after)["change"]
    assert change.clusters == 2 and change.low > 0


@pytest.mark.real
def test_demo_raises_the_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--out", "runs/demo"]) == 0
    figures = json.loads((tmp_path / "runs/demo/eval/demo.json").read_text())
    assert figures["rewards"]["vader"]["change"]["low"] > 0
    assert figures["accuracy"]["low"] > 0.5 and 0 < figures["kl"]["estimate"] < 30
    assert run(["generate", "runs/demo", "--prompt", "The soup at the station", "--max-tokens", "8"]) == 0
