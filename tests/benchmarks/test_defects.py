"""The suite of planted defects: ours is right on all, its data are written, and what is wrong is noticed."""

import json

import pytest

from benchmarks import defects
from mlxdpo_eval import winrate


@pytest.mark.parametrize("case", defects.cases(), ids=lambda case: case.name)
def test_ours_is_right(case):
    assert defects.is_right(case, defects.ours(case))


@pytest.mark.parametrize("case", defects.cases(), ids=lambda case: case.name)
def test_the_defect_itself_is_called_wrong(case):
    """What a harness with the defect would say, worked by hand; an interval of no width is wrong everywhere."""
    won = [row["verdict"] for row in case.rows]
    decided = sum(v in ("a", "b") for v in won)
    planted = {
        "position": won.count("b") / len(won),
        "ties": won.count("b") / decided,
        "invalid": won.count("b") / len(won),
        "clusters": case.truth,
        "truncated": won.count("b") / len(won),
        "subsets": won.count("b") / len(won),
        "contaminated": won.count("b") / len(won),
        "length": won.count("b") / len(won),
    }[case.name]
    half = 1.96 * (planted * (1 - planted) / len(won)) ** 0.5
    assert not defects.is_right(case, defects.Reported(planted, planted - half, planted + half))
    assert not defects.is_right(case, defects.Reported(case.truth, case.truth, case.truth))


def test_pairing_decides_what_two_samples_do_not():
    found = defects.paired()["pairing"]
    assert found["mlxdpo_eval"][3] and not found["lm-eval"][3]
    assert found["mlxdpo_eval"][0] == pytest.approx(-0.08) == pytest.approx(found["lm-eval"][0])


def test_shared_seeds_make_a_narrow_interval_and_own_seeds_a_wide_one():
    """Each model's own figures are the same in both, so two standard errors cannot tell them apart."""
    found = defects.paired()
    shared, apart = found["seeds_shared"], found["seeds_apart"]
    assert shared["lm-eval"][:3] == pytest.approx(apart["lm-eval"][:3]) and not shared["lm-eval"][3]
    assert shared["mlxdpo_eval"][3] and apart["mlxdpo_eval"][3]
    assert shared["mlxdpo_eval"][2] < 0 and apart["mlxdpo_eval"][1] < -0.13


def test_cut_off_answers_are_counted_and_left_out_of_one_rate():
    found = winrate(next(case.rows for case in defects.cases() if case.name == "truncated"))
    assert (found.cut_off, found.rate, found.complete.estimate) == (50, pytest.approx(0.4), pytest.approx(0.6))


def test_the_mean_over_subsets_by_hand():
    parts = (("x", 30, 27), ("y", 10, 5))
    rows = [{"prompt": f"{s}{i}", "verdict": "ab"[i < won], "subset": s} for s, n, won in parts for i in range(n)]
    found = winrate(rows)
    error = (0.25 * (0.9 * 0.1 / 30 + 0.25 / 10) * 40 / 39) ** 0.5  # 40 prompts
    assert found.macro.estimate == pytest.approx(0.7) and found.subsets["y"].estimate == 0.5
    assert found.macro.high - 0.7 == pytest.approx(2.0227 * error, rel=1e-4)


def test_the_data_can_be_read_by_anybody(tmp_path):
    defects.write_data(tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers.keys() == {case.name for case in defects.cases()}
    assert winrate(tmp_path / "ties.jsonl").rate == answers["ties"]["truth"]


def test_environments_are_joined():
    one, two = {"ties": {"a": [1, None, None, True], "b": None}}, {"ties": {"a": None, "b": [2, None, None, False]}}
    assert defects.joined([one, two]) == {"ties": {"a": [1, None, None, True], "b": [2, None, None, False]}}
