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
        "contaminated": won.count("b") / len(won),
        "length": won.count("b") / len(won),
    }[case.name]
    half = 1.96 * (planted * (1 - planted) / len(won)) ** 0.5
    assert not defects.is_right(case, defects.Reported(planted, planted - half, planted + half))
    assert not defects.is_right(case, defects.Reported(case.truth, case.truth, case.truth))


def test_pairing_decides_what_two_samples_do_not():
    found = defects.paired()
    assert found["mlxdpo_eval"][3] and not found["lm-eval"][3]
    assert found["mlxdpo_eval"][0] == pytest.approx(-0.08) == pytest.approx(found["lm-eval"][0])


def test_the_data_can_be_read_by_anybody(tmp_path):
    defects.write_data(tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers.keys() == {case.name for case in defects.cases()}
    assert winrate(tmp_path / "ties.jsonl").rate == answers["ties"]["truth"]


def test_environments_are_joined():
    one, two = {"ties": {"a": [1, None, None, True], "b": None}}, {"ties": {"a": None, "b": [2, None, None, False]}}
    assert defects.joined([one, two]) == {"ties": {"a": [1, None, None, True], "b": [2, None, None, False]}}
