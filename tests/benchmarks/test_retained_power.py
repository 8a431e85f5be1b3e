"""The simulation of `mlxdpo eval --retained`: what it plants is there, and what is found is counted."""

import numpy as np
import pytest

from benchmarks import retained


@pytest.mark.parametrize("draw", [retained.option_area, retained.answer_area, retained.passage_area])
@pytest.mark.parametrize("drop", [0.0, 0.05])
def test_the_drop_is_the_one_that_was_planted(draw, drop):
    found = draw(200_000, drop, np.random.default_rng(1))
    assert (found.before - found.after).mean() == pytest.approx(drop, abs=0.004)


def test_answers_turn_over_without_a_drop():
    found = retained.answer_area(200_000, 0.0, np.random.default_rng(2))
    assert (found.before != found.after).mean() == pytest.approx(retained.CHURN, abs=0.004)


def test_a_drop_everywhere_is_found_and_untouched_models_are_left_alone():
    everywhere = retained.scenario("everywhere", list(retained.areas_of_checks()), 20, 0)
    untouched = retained.scenario("untouched", [], 40, 0)
    assert everywhere.worse >= 0.8 and untouched.worse <= 0.1 and untouched.named is None
    assert "| everywhere | 20 | 100.0 % |" in retained.table([everywhere])


def test_the_command_writes_between_the_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{retained.BEGIN}\nold\n{retained.END}\nafter\n")
    assert retained.main(["--repetitions", "5", "--untouched", "40", "--write", str(page)]) in (0, 1)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "5 points everywhere" in text and "untouched" in capsys.readouterr().out
