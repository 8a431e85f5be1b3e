"""The report reads from the top: verdict, three answers, cost, then statistics; on a terminal in 80 columns."""

import io
import json
import subprocess
import sys

import pytest
from planted_judges import Planted, coin
from rich.console import Console

from mlxdpo.types import UserError
from mlxdpo_eval.judges import Verdict
from mlxdpo_eval.metrics.intervals import Interval
from mlxdpo_eval.metrics.length import length_baseline, length_report
from mlxdpo_eval.report.blocks import smallest_effect
from mlxdpo_eval.report.cost import cost_sentences
from mlxdpo_eval.report.samples import more_samples, three_samples
from mlxdpo_eval.report.screen import on_one_line, print_first_screen
from mlxdpo_eval.report.write import write_report
from mlxdpo_eval.run import evaluate
from mlxdpo_eval.sampling import Sampling

LONG = Sampling(prompts=18, samples=1, max_tokens=24)
SPENT = {
    "asked_by": "free text, after reasoning", "requests": 1200, "retries": 3, "failed": 2, "prompt_tokens": 50_000,
    "completion_tokens": 9_000, "reasoning_tokens": 8_000, "dollars": 0.125,
}  # fmt: skip


class Paid(Planted):
    """A judge that counts what it used, and gives reasons."""

    def spent(self):
        return SPENT


def found_by(run, judge):
    """Results of an evaluation, and its lines of samples."""
    results = evaluate(run, [judge], LONG).results
    lines = (run.path / "eval" / "eval_samples.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_the_report_begins_with_verdict_answers_and_cost(run, laid_out):
    found_by(run, Paid(coin, "a judge"))
    page, markdown = write_report(run).read_text(), (run.path / "report.md").read_text()
    order = ["Three answers before and after", "What it cost", "How often the tuned answers win", "Held-out pairs"]
    for text, mark in ((page, "<h2>{}</h2>"), (markdown, "\n## {}\n")):
        places = [text.index(mark.format(name)) for name in order]
        assert places == sorted(places)
        cost = text[places[1] : places[2]]
        assert "a judge (free text, after reasoning): 1,200 answers, 3 requests repeated, 2 failed" in cost
        assert "50,000 + 9,000 tokens, 8,000 of them reasoning, 0.12 dollars" in cost
        answers = text[places[2] : places[3]]
        assert all(name in answers for name in ("asked", "answered", "invalid", "equal"))
        assert "length alone" in answers and "length alone (always the" in text[places[3] :]


def test_an_answer_that_is_no_text_is_one_sentence_and_no_half_of_a_report(run):
    _, lines = found_by(run, Paid(coin, "a judge"))
    samples = run.path / "eval" / "eval_samples.jsonl"
    samples.write_text("".join(json.dumps(line | {"after": []}) + "\n" for line in lines))
    before = {file: file.read_bytes() for file in run.path.glob("report.*")}
    with pytest.raises(UserError, match=r"is not what mlxdpo wrote \(TypeError.*; run `mlxdpo eval"):
        write_report(run)
    assert {file: file.read_bytes() for file in run.path.glob("report.*")} == before


@pytest.mark.parametrize(
    "judge", [Paid(coin, "a judge of a very long name " * 5), Planted(lambda q: Verdict(None, "no"))]
)
def test_the_terminal_has_80_columns_and_the_four_numbers(run, judge):
    results, samples = found_by(run, judge)
    wide = [
        line | {"prompt": "短い質問です " * 60, "after": "wide " + "長" * 300, "before": "x" * 300} for line in samples
    ]
    for lines in (samples, wide):
        out = io.StringIO()
        console = Console(file=out, width=200, soft_wrap=True, highlight=False)
        print_first_screen(console, results, lines)
        shown = out.getvalue()
        assert max(sum(1 + ("⺀" <= c <= "￯") for c in line) for line in shown.splitlines()) <= 80
    flat = " ".join(shown.split())
    assert " ".join(results["headline"]["sentence"].split()) in flat
    (w,) = results["winrates"]
    assert f"{w['asked']} {w['answered']} {w['invalid']} {w['equal']}" in flat
    assert flat.index("Three answers") < flat.index("What it cost") < flat.index("What the judges were asked")


def sample(i, changed):
    verdicts = {"j": {"logit": 1.0, "equal": not changed, "reason": ""}}
    after = f"new {i}" if changed else f"old {i}"
    return {"sample": 0, "prompt": f"p{i}", "before": f"old {i}", "after": after, "verdicts": verdicts}


def test_the_three_are_the_first_that_changed_and_the_others_follow():
    lines = [sample(i, changed=i % 2 == 1) for i in range(20)]
    told, three = three_samples([*lines, lines[1] | {"sample": 1}])
    assert [block.prompt for block in three] == ["p1", "p3", "p5"]
    assert "first of 10 prompts with another answer" in told and "10 of 20 prompts have the same answer" in told
    assert [block.prompt for block in more_samples(lines)[1:]] == ["p0", "p2", "p4", "p6", "p7"]
    told, none = three_samples([sample(i, changed=False) for i in range(4)])
    assert none == [] and told == "The first answers to all 4 prompts are the same word for word."


def test_cost_in_words():
    side = lambda *values: dict(zip(("length", "stopped", "repetition"), ({"value": v} for v in values), strict=True))  # noqa: E731
    drift = {"before": side(20.0, 1.0, 0.01), "after": side(30.0, 0.9, 0.05), "length_ratio": {"value": 1.5}}
    drift |= {"kl": 2.5, "same": 0.25}
    results = {
        "drift": drift,
        "pairs": {"rewards": {"displacement": {"mean": -0.75}}},
        "winrates": [
            {"judge": "j", "answered": 20, "cut_off": 8, "complete": {"estimate": 0.5, "low": 0.25, "high": 0.75}}
        ],
        "when": {"judges": {"panel": {"one": SPENT}}},
    }
    assert cost_sentences(results)[:-1] == [
        "Answers are 1.50 times as long as before: 20 tokens became 30.",
        "90 % of them end with an end token, 100 % before.",
        "5.0 % of their 3-grams are repetitions, 1.0 % before.",
        "8 of 20 verdicts of j are on an answer cut off at the limit of tokens; over the others the win rate is 50.0 % "
        "(25.0 to 75.0).",
        "The model is 2.50 nats an answer from its reference (KL); 25 % of its answers are identical to before.",
        "The chosen answers of held-out pairs are 0.75 nats less likely than before.",
    ]
    assert cost_sentences(results)[-1].startswith("one (free text")


def test_what_length_alone_reaches_is_the_better_way():
    assert length_baseline(0.3, Interval(0.3, 0.2, 0.45, 9)) == ("shorter", 0.7, (0.7, 0.55, 0.8, 9))
    assert length_baseline(0.6, None) == ("longer", 0.6, None)
    found = length_report([1.0, 1, 1, -1], [1, 2, 3, 9], [4, 5, 6, 7], ["a", "b", "c", "d"])
    assert (found.longer_baseline, found.baseline.rule, found.baseline.rate) == (0.25, "shorter", 0.75)
    assert found.baseline.interval.low == pytest.approx(1 - found.longer_interval.high)


def test_effects_are_said_in_points():
    assert smallest_effect(100, 0.56) == "an effect smaller than 6 points would not have been seen (n = 100 prompts)"
    assert smallest_effect(1, None) == "n = 1 prompt is too few to show any effect"


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert on_one_line("a\x1b[2J\nb", 50) == "a\\x1b[2J b" and on_one_line("x" * 60, 50) == "x" * 48 + " …"


WITHOUT_MLX = """
import importlib, pkgutil, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "openai"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Missing())
for folder in ("judges", "metrics", "report"):
    package = importlib.import_module(f"mlxdpo_eval.{folder}")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""


def test_judges_metrics_and_report_are_imported_without_mlx():
    subprocess.run([sys.executable, "-c", WITHOUT_MLX], check=True)
