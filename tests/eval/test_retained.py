"""The retained checks: the set, its readers, the statistics of areas, and `mlxdpo eval --retained`."""

import json

import numpy as np
import pytest
from tiny_runs import untrain

import mlxdpo
from mlxdpo.cli import run as cli
from mlxdpo_eval.compare import latest_results
from mlxdpo_eval.metrics.areas import AreaScores, area_changes
from mlxdpo_eval.report.retained import elsewhere
from mlxdpo_eval.results import to_json
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.instructions import FORMATS, INSTRUCTIONS, instruction_checks, parsed_json

GOOD = {  # of each kind of instruction, an answer to its first item that keeps it
    "_capitals": "GREEN", "_lowercase": "green, mostly", "_one_word": "Green.", "_without_comma": "It is green.",
    "_with_word": "We swam in the River.", "_word_twice": "A meadow is a meadow.", "_yes_or_no": "Yes.",
    "_repeat": "The boat left the harbour at noon.", "_quoted": '"Green"', "_as_question": "How deep is a river?",
    "_avoided_word": "It is wide and blue.", "_tagged": "<answer>green</answer>", "_heading": "## River",
    "_numbered_list": "1. Cat\n2. Dog", "_bullets": "- Robin\n- Crow\n- Owl",
}  # fmt: skip


def test_the_set_is_the_same_every_time_and_large_enough():
    checks = retained_checks()
    again = retained_checks()
    assert [c[:3] for c in checks] == [c[:3] for c in again] and len(checks) >= 300
    areas = dict.fromkeys(c.area for c in checks)
    assert len(areas) == 6 and len({(c.prompt, c.options) for c in checks}) >= 0.98 * len(checks)
    assert all(len(set(c.options)) in (0, 1, 4) and c.right < 4 for c in checks)
    assert [c.area for c in retained_checks(2)] == [area for area in areas for _ in range(2)]


def test_calculations_are_right():
    """By another route: the text of the question, computed."""
    sums = [c for c in retained_checks() if c.prompt.startswith("What is") and c.area == "arithmetic"]
    for check in sums:
        text = check.prompt.split("?")[0].removeprefix("What is ")
        for words, sign in ((" times ", "*"), (" divided by ", "/"), (" % of ", "/100*")):
            text = text.replace(words, sign)
        assert (
            eval(text) == int(check.options[0]) and check.options[0] not in check.options[1:]
        )  # numbers and signs only
    assert len(sums) == 75


@pytest.mark.parametrize(
    "kind", [kind for kind in INSTRUCTIONS + FORMATS if kind.__name__ in GOOD], ids=lambda k: k.__name__
)
def test_a_check_takes_what_keeps_it_and_nothing_else(kind):
    import random

    _, passes = kind(random.Random(0), 0)
    assert (
        passes(GOOD[kind.__name__]) and not passes("") and not passes("No, Water and Grass, as a rule, are. wet cold")
    )


def test_every_check_refuses_silence_and_chatter():
    import random

    for check in instruction_checks(random.Random(0)):
        assert not check.passes("")
        assert (
            not check.passes("As you asked, Here is one, I hope: {it} helps; water, cold, bread")
            or "without" in check.prompt
        )


def test_json_is_read_with_and_without_a_fence():
    assert parsed_json('```json\n{"a": 1}\n```') == {"a": 1} == parsed_json('{"a": 1}') and parsed_json("a: 1") is None


def pass_fail(n, gained, lost, right=0.5):
    """Answers before and after with exactly that many turned over."""
    before = (np.arange(n) < right * n).astype(float)
    after = before.copy()
    after[:lost] = 0
    after[n - gained :] = 1
    return AreaScores(before, after)


def test_a_drop_is_found_and_the_worst_area_comes_first():
    found = area_changes({"a": pass_fail(100, 5, 5), "b": pass_fail(100, 0, 30), "c": pass_fail(100, 10, 3)})
    assert [area.area for area in found.areas] == ["b", "a", "c"]
    assert [area.worse for area in found.areas] == [True, False, False] and found.verdict == "worse"
    assert found.change == pytest.approx((0 - 30 + 7) / 300) and found.n == 300
    assert found.areas[0].lost == 30 and found.areas[0].gained == 0
    text = elsewhere(to_json(found))
    assert text.startswith("worse elsewhere: -7.7 points over 300 checks") and "b by 30.0 points" in text


def test_the_interval_of_answers_is_agresti_and_mins():
    """By hand: 100 pairs, 4 gained, 10 lost; cells with a half more: 4.5 and 10.5 of 102."""
    found = area_changes({"a": pass_fail(100, 4, 10)})
    centre = (
        4.5 - 10.5
    ) / 102  # of one area the alarms are 1.5 % + 2 %: Student's t with 99 degrees at 0.965 is 1.8317
    half = 1.8317202 * np.sqrt(15 / 102 - centre**2) / np.sqrt(102)
    assert found.areas[0].interval.low == pytest.approx(centre - half, abs=1e-6)
    assert found.areas[0].change == pytest.approx(-0.06)


def test_all_answers_lost_is_worse_and_none_changed_is_unchanged():
    assert area_changes({"a": pass_fail(20, 0, 20, right=1.0)}).verdict == "worse"
    same = area_changes({"a": pass_fail(50, 0, 0), "b": AreaScores(np.full(9, 0.3), np.full(9, 0.3))})
    assert same.verdict == "unchanged" and same.areas[1].interval is None
    assert elsewhere(to_json(same)).startswith("unchanged elsewhere: all 59 checks")


def test_a_sure_drop_below_a_point_is_no_cost():
    before = np.linspace(0.2, 0.9, 200)
    small = AreaScores(before, before - 0.005 + 0.0005 * np.sin(np.arange(200)))
    found = area_changes({"a": small})
    assert found.interval.high < 0 and found.verdict == "no worse"
    assert area_changes({"a": small._replace(after=small.after - 0.02)}).verdict == "worse"


def test_a_likelihood_does_not_enter_the_change_over_all():
    answers, text = pass_fail(100, 0, 0), AreaScores(np.ones(30), np.linspace(0.7, 0.8, 30), counted=False)
    found = area_changes({"a": answers, "text": text})
    assert found.n == 100 and found.change == 0 and found.verdict == "worse" and found.areas[0].area == "text"


def test_sides_that_differ_are_refused():
    with pytest.raises(ValueError, match="3 items before, 2 after"):
        area_changes({"a": AreaScores(np.ones(3), np.ones(2))})
    with pytest.raises(ValueError, match="no areas"):
        area_changes({})


ARGS = ["--prompts", "2", "--samples", "1", "--max-tokens", "2", "--retained", "--limit", "2"]


def test_an_untouched_run_is_unchanged_and_the_report_says_so(run, capsys):
    assert cli(["eval", str(untrain(run).path), *ARGS]) == 0
    found = latest_results(run)["retained"]
    assert found["changes"]["verdict"] == "unchanged" and found["perplexity"][0] == found["perplexity"][1]
    assert "at what was asked, unchanged elsewhere" in " ".join(capsys.readouterr().out.split())
    for page in ("report.md", "report.html"):
        assert "What it cost elsewhere" in (run.path / page).read_text()
    lines = [json.loads(line) for line in (run.path / "eval" / "eval_retained.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(line["before"] == line["after"] for line in lines)
    assert all(len(line["answers"]) == 2 for line in lines if line["area"] == "instructions and formats")


def test_python_checks_what_the_command_checks(run):
    assert cli(["eval", str(run.path), *ARGS]) == 0
    by_command = latest_results(run)["retained"]
    found = mlxdpo.evaluate(run, prompts=2, samples=1, max_tokens=2, retained=True, limit=2, quiet=True)
    assert to_json(found["retained"]["changes"]) == by_command["changes"]
    assert mlxdpo.evaluate(run, prompts=2, samples=1, max_tokens=2, quiet=True)["retained"] is None
    for limit, retained in ((2, False), (0, True)):
        with pytest.raises(mlxdpo.UserError, match=f"limit is {limit}: .* with retained=True"):
            mlxdpo.evaluate(run, retained=retained, limit=limit)


def test_limit_without_what_it_limits_is_refused(run, capsys):
    assert cli(["eval", str(run.path), "--limit", "2"]) == 2
    assert "--retained" in capsys.readouterr().err
