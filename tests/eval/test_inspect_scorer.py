"""The scorer and metric in a real inspect_ai task; skipped where inspect_ai is not installed."""

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed; pip install inspect_ai runs this")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.solver import generate

import mlxdpo_eval
from mlxdpo_eval.inspect_scorer import pairwise


def say(texts):
    """Outputs of the mock model; with their usage, which it would count by a tokenizer from the network."""
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in texts]
    for output in outputs:
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return outputs


def log_of(answers, verdicts, tmp_path, **given):
    """A task of one sample per answer, and a grader that gives these verdicts in turn."""
    model = get_model("mockllm/model", custom_outputs=say(answers))
    grader = get_model("mockllm/model", custom_outputs=say(verdicts), memoize=False)
    samples = [Sample(id=i, input=f"q{i}", target="the baseline") for i in range(len(answers))]
    task = Task(dataset=samples, solver=generate(), scorer=pairwise(grader))
    (log,) = eval(task, model=model, log_dir=str(tmp_path), display="none", max_samples=1, **given)
    assert log.status == "success", log.error
    return log


def test_both_orders_ties_and_no_verdict(tmp_path):
    """Better in both orders; first place twice is a tie; worse in both; chatter is no verdict; equal is not asked."""
    answers = ["good", "same", "bad", "odd", "the baseline"]
    verdicts = ["A", "B", "A", "A", "B", "A", "A", "I cannot say"]
    log = log_of(answers, verdicts, tmp_path)
    values = [sample.scores["pairwise"].value for sample in sorted(log.samples, key=lambda s: s.id)]
    assert values[:3] == [1.0, 0.5, 0.0] and values[3] != values[3] and values[4] == 0.5
    found = {name: m.value for name, m in log.results.scores[0].metrics.items()}
    assert found["rate"] == 0.5 and found["scored"] == 4 and found["low"] < 0.5 < found["high"]
    read = mlxdpo_eval.winrate(log.location)
    assert read.format == "inspect" and read.rate == 0.5 and sum(read.invalid.values()) == 1
    assert read.interval.low == pytest.approx(found["low"])
