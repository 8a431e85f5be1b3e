"""`mlxdpo eval` and `mlxdpo compare` on tiny runs: an untrained one shows nothing, numbers repeat, reports are safe."""

import json
import re
import shutil
from html.parser import HTMLParser

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from planted_judges import Planted, coin
from tiny_runs import recipe, trained, untrain

from mlxdpo import UserError, at_checkpoints, open_trained_run
from mlxdpo.cli import run as cli
from mlxdpo.io.atomic import write_json
from mlxdpo_eval.checkpoints import measure_checkpoints
from mlxdpo_eval.compare import compare_runs, comparison_sentence, latest_results
from mlxdpo_eval.dial import sweep_strengths
from mlxdpo_eval.judges.protocol import invalid
from mlxdpo_eval.report.write import write_report
from mlxdpo_eval.run import evaluate
from mlxdpo_eval.sampling import Sampling

SMALL = Sampling(prompts=6, samples=2, max_tokens=5)


def numbers(results):
    """Everything but when and with what machine's speed."""
    return {name: value for name, value in results.items() if name != "when"}


def test_an_untrained_run_shows_no_difference(run):
    found = evaluate(untrain(run), [Planted(coin)], SMALL).results
    assert found["pairs"]["rewards"]["accuracy"] == 0.5 and found["pairs"]["rewards"]["margin"]["mean"] == 0.0
    assert (
        found["drift"]["kl"] == 0.0 and found["drift"]["same"] == 1.0 and found["drift"]["length_ratio"]["value"] == 1.0
    )
    (rate,) = found["winrates"]
    assert (rate["rate"], rate["overall"], rate["asked"], rate["equal"]) == (None, 0.5, 0, 12)
    assert found["headline"]["verdict"] == "no difference shown"
    assert all(text.startswith("No difference shown") for text in found["sentences"])
    write_report(run)
    assert "<h1>No difference shown</h1>" in (run.path / "report.html").read_text()


def test_pairs_ranked_rightly_are_not_called_better_where_no_answer_changed(tmp_path, cache):
    barely = trained(tmp_path, optim={"lr": 1e-6})  # log-probs move by less than any choice of a token
    found = evaluate(barely, [], Sampling(prompts=6, samples=1, max_tokens=5, temperature=1.0)).results
    assert found["drift"]["same"] == 1.0 and found["pairs"]["rewards"]["ties"] < found["pairs"]["rewards"]["n"]
    assert found["headline"]["verdict"] == "no difference shown"
    assert "writes all 6 answers exactly as before" in found["headline"]["sentence"]


def test_a_second_evaluation_repeats_every_number_whatever_the_batch(run):
    judge = Planted(coin)
    first = evaluate(run, [judge], SMALL).results
    lines = (run.path / "eval" / "eval_samples.jsonl").read_text()
    assert numbers(evaluate(run, [judge], SMALL).results) == numbers(first)
    assert first["drift"]["kl"] > 0 and first["drift"]["same"] < 1 and first["drift"]["answers"] == 6
    other = evaluate(run, [judge], Sampling(prompts=6, samples=2, max_tokens=5, batch_size=3)).results
    texts = [[json.loads(x)[side] for x in lines.splitlines()] for side in ("before", "after")]
    again = (run.path / "eval" / "eval_samples.jsonl").read_text().splitlines()
    assert texts == [[json.loads(x)[side] for x in again] for side in ("before", "after")]
    assert other["winrates"][0]["rate"] == first["winrates"][0]["rate"]
    assert other["drift"]["kl"] == pytest.approx(first["drift"]["kl"], rel=1e-4)


def test_the_lines_beside_the_results_are_enough_to_compute_them_again(run):
    found = evaluate(run, [Planted(coin)], SMALL).results
    pairs, samples = (
        [json.loads(x) for x in (run.path / "eval" / f"eval_{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "samples")
    )
    right = [0.5 * (1 + (p["margin"] > 0) - (p["margin"] < 0)) for p in pairs]
    assert sum(right) / len(right) == pytest.approx(found["pairs"]["rewards"]["accuracy"])
    logits = [v["logit"] for s in samples for v in [s["verdicts"]["planted"]] if not v["equal"]]
    rate = sum(0.5 * (1 + (x > 0) - (x < 0)) for x in logits) / len(logits)
    assert rate == pytest.approx(found["winrates"][0]["rate"])
    kl = [s["kl"] for s in samples if s["kl"] is not None]
    assert sum(kl) / len(kl) == pytest.approx(found["drift"]["kl"])


def test_another_reference_is_refused(run):
    manifest = run.manifest()
    manifest["reference"]["digest"] = "0" * 64
    write_json(run.path / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"its reference had digest 000000000000, the one here has \w{12}; rewards"):
        open_trained_run(run)


class Outside(HTMLParser):
    """Collects what a page would load or run, and its text."""

    def __init__(self):
        super().__init__()
        self.links, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and not v.startswith("#")
        ]
        self.links += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_the_report_escapes_everything_and_loads_nothing(run):
    evil = '<script>alert(1)</script><img src=x onerror=y> | ``` $x^2$ & "q"'
    judge = Planted(coin, name=evil)
    evaluate(run, [judge], SMALL)
    file = run.path / "eval" / "eval_samples.jsonl"
    lines = [
        json.loads(x) | {"prompt": evil, "before": evil, "after": f"</p>{evil}"} for x in file.read_text().splitlines()
    ]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = write_report(run).read_text()
    page = Outside()
    page.feed(text)
    assert page.links == [] and not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert page.text.count("<script>alert(1)</script>") > 10
    markdown = (run.path / "report.md").read_text()
    outside_fences = re.sub(r"^(`{3,})\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<script", outside_fences)
    rows = [line for line in outside_fences.splitlines() if line.startswith("| ")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) >= 3 for row in rows)


def test_report_can_be_made_again_to_the_byte(run):
    evaluate(run, [Planted(coin)], SMALL)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


ARGS = ["--prompts", "6", "--samples", "1", "--max-tokens", "5"]
LONG = ["--prompts", "18", "--samples", "2", "--max-tokens", "24"]  # answers that differ


def test_the_command_writes_everything_and_fails_when_a_judge_does(run, tmp_path, capsys):
    reward = tmp_path / "reward.py"
    reward.write_text("def half(prompt, answer):\n    return len(answer) if prompt < 'q13' else None\n")
    assert cli(["eval", str(run.path), "--judge", "longest", "--json", *ARGS]) == 0
    assert json.loads(capsys.readouterr().out)["headline"] == latest_results(run)["headline"]
    assert (run.path / "report.html").exists() and (run.path / "report.md").exists()
    assert cli(["eval", str(run.path), "--judge", f"{reward}:half", *LONG]) == 1
    assert re.search(
        r"No verdict: reward.py:half was asked about \d+ pairs of answers, \d+ were answered and \d+ are invalid "
        r"\(\d+ the reward raised TypeError\), more than 10.0 % of what was asked; \d+ of 36 pairs",
        capsys.readouterr().err,
    )
    assert latest_results(run)["headline"]["verdict"] == "no verdict"
    assert "<h1>No verdict</h1>" in (run.path / "report.html").read_text()
    assert cli(["eval", str(run.path), "--judge", f"{reward}:half", "--max-invalid", "1", *LONG]) == 0
    capsys.readouterr()
    assert cli(["eval", str(run.path), "--data", str(tmp_path / "none.jsonl"), *ARGS]) == 2
    assert "none.jsonl: no such file or folder" in capsys.readouterr().err


def test_capability_checks_say_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli(["eval", str(run.path), "--tasks", "arc_easy"]) == 2
    assert "pip install 'mlxdpo[tasks]'" in capsys.readouterr().err


def test_compare_pairs_by_item_and_fails_on_a_regression_only(run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"has no evaluation; run `mlxdpo eval .*run` first"):
        compare_runs(run, run)
    evaluate(run, [Planted(coin)], SMALL)
    assert compare_runs(run, run).regressed == [] and comparison_sentence(compare_runs(run, run)).startswith(
        "No difference shown"
    )
    assert cli(["compare", str(run.path), str(run.path)]) == 0
    worse = trained(tmp_path, "worse")
    evaluate(worse, [Planted(coin)], SMALL)
    for name, sign in ((run, 1.0), (worse, -1.0)):
        file = name.path / "eval" / "eval_pairs.jsonl"
        lines = [json.loads(x) for x in file.read_text().splitlines()]
        shown = [x | {"margin": sign * (1.0 if i else -1.0)} for i, x in enumerate(lines)]
        file.write_text("".join(json.dumps(x) + "\n" for x in shown[::-1]))
    found = compare_runs(run, worse)
    accuracy = found.changes[0]
    assert (accuracy.items, accuracy.gained, accuracy.lost, accuracy.verdict) == (18, 1, 17, "worse")
    assert accuracy.change == pytest.approx(-16 / 18) and accuracy.p == pytest.approx(2 * 19 / 2**18)
    assert [f["flip"] for f in found.flips if f["measure"] == "held-out accuracy"].count("lost") == 17
    capsys.readouterr()
    assert cli(["compare", str(run.path), str(worse.path)]) == 1
    assert "Worse: held-out accuracy" in capsys.readouterr().out
    assert cli(["compare", str(worse.path), str(run.path), "--json"]) == 0
    assert "held-out accuracy" in json.loads(capsys.readouterr().out)["sentence"]
    third = tmp_path / "third"
    shutil.copytree(run.path, third)
    assert cli(["compare", str(run.path), str(worse.path), str(third), "--json"]) == 1
    several = json.loads(capsys.readouterr().out)
    assert several["level"] == 0.975 and [one["run"] for one in several["runs"]] == [str(worse.path), str(third)]
    wide, narrow = several["runs"][0]["changes"][0]["interval"], accuracy.interval
    assert wide["low"] <= narrow.low and wide["high"] >= narrow.high and several["runs"][1]["flips"] == []
    assert cli(["compare", str(run.path)]) == 2


def test_a_win_that_becomes_a_tie_is_lost_and_counts_in_the_p_value(run, tmp_path):
    """Six outcomes fall from won to tied: an interval below 0 beside a p-value of 1 would contradict itself."""
    other = trained(tmp_path, "other")
    for one, margin in ((run, 1.0), (other, 0.0)):
        evaluate(one, [Planted(coin)], SMALL)
        file = one.path / "eval" / "eval_pairs.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        shown = [line | {"margin": margin if i < 6 else -1.0} for i, line in enumerate(lines)]
        file.write_text("".join(json.dumps(line) + "\n" for line in shown))
    found = compare_runs(run, other)
    accuracy, flips = found.changes[0], [f["flip"] for f in found.flips if f["measure"] == "held-out accuracy"]
    assert (accuracy.gained, accuracy.lost, accuracy.change) == (0, 6, pytest.approx(-3 / 18))
    assert accuracy.p == pytest.approx(2 / 2**6) and flips == ["lost"] * 6
    back = compare_runs(other, run).changes[0]
    assert (back.gained, back.lost, back.p) == (6, 0, accuracy.p)


def test_runs_sampled_with_different_settings_are_not_compared(run, tmp_path):
    other = trained(tmp_path, "other")
    evaluate(run, [Planted(coin)], SMALL)
    evaluate(other, [Planted(coin)], Sampling(prompts=6, samples=2, max_tokens=4))
    with pytest.raises(UserError, match="max_tokens 5 and 4; use the same value for both"):
        compare_runs(run, other)


def test_a_local_judge_reads_its_verdict_from_one_position(tmp_path, cache):
    from tiny_models import tiny_model

    from mlxdpo.forward.next_token import next_logits

    model, rows = tiny_model("llama", 300, 0), [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    found = next_logits(model, rows, [20, 30])
    for row, logits in zip(rows, found, strict=True):
        assert logits.tolist() == pytest.approx(model(mx.array([row]))[0, -1, mx.array([20, 30])].tolist(), abs=1e-5)
    assert next_logits(model, rows[::-1], [20, 30], tokens=1)[::-1].ravel().tolist() == pytest.approx(
        found.ravel().tolist(), abs=1e-5
    )
    recipe(tmp_path)  # writes a model folder
    from mlxdpo_eval.judges import Question, open_judge

    judge = open_judge(f"local:{tmp_path / 'llama'}")
    questions = [Question("p", "short", "a longer answer"), Question("p", "{braces}", "x")]
    verdicts = judge.ask(questions)
    assert all(v.logit is not None and 0 < v.probability < 1 for v in verdicts)
    assert [v.logit for v in judge.ask(questions[::-1])][::-1] == pytest.approx([v.logit for v in verdicts], abs=1e-4)


def test_a_sweep_has_a_point_for_each_checkpoint_and_the_adapter_stays(tmp_path, cache):
    run = trained(tmp_path, train={"steps": 4, "save_every": 2, "keep_checkpoints": 9})
    opened = open_trained_run(run)
    final = {k: v.tolist() for k, v in tree_flatten(opened.policy.model.trainable_parameters())}
    names = list(at_checkpoints(opened))
    assert names == [path.name for path in sorted(run.checkpoints.glob("step-*"))] and len(names) >= 2
    assert {k: v.tolist() for k, v in tree_flatten(opened.policy.model.trainable_parameters())} == final
    points = measure_checkpoints(run, Planted(coin), SMALL)
    assert [p.name for p in points] == [*names[:-1], f"{names[-1]} = adapter"]  # once, not twice
    assert points[-1].kl == pytest.approx(evaluate(run, [], SMALL).results["drift"]["kl"])
    write_report(run)
    assert "no other beats it" in (run.path / "report.html").read_text()
    assert cli(["frontier", str(run.path), "--judge", "longest", "--prompts", "3", "--max-tokens", "4"]) == 0


def test_an_untrained_run_is_a_point_without_drift(run):
    (*others, last) = measure_checkpoints(untrain(run), Planted(coin), SMALL)
    assert last.name == "adapter" and "adapter" not in "".join(p.name for p in others)
    assert (last.kl, last.reward) == (0.0, 0.5)


def test_dial_and_frontier_count_verdicts_too(run):
    said, how = [], Sampling(prompts=18, samples=1, max_tokens=24)
    measure_checkpoints(run, Planted(lambda question: invalid("odd")), how, said.append)
    assert any(re.search(r": (\d+) of \1 verdicts asked for are invalid", line) for line in said)
    first, last = sweep_strengths(run, [0.0, 1.0], how, Planted(coin)).points
    assert first.verdicts == (0, 0, 0, 18, 0) and first.win_rate == 0.5
    asked, answered, failed, equal, absent = last.verdicts
    assert asked == answered > 0 and (failed, absent) == (0, 0) and asked + equal == 18
