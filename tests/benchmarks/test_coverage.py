"""The coverage command at a few hundred runs, with bands as wide as so few runs need; `make coverage` runs 2,000."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.coverage import __main__
from benchmarks.coverage.studies import STUDIES

RUNS = 60


@pytest.fixture(scope="module")
def rows():
    return [row for study in STUDIES for row in __main__.run(study, RUNS, seed=1)]


@pytest.mark.slow
def test_ours_hold_the_truth(rows):
    """Four binomial standard errors below .95: a broken interval is further away."""
    least = 0.95 - 4 * np.sqrt(0.95 * 0.05 / RUNS)
    ours = [row for row in rows if row.ours]
    assert {row.study for row in ours} == {study.name for study in STUDIES}
    assert all(row.coverage >= least for row in ours), ours


@pytest.mark.slow
def test_the_others_fall_short_where_it_is_said_that_they_do(rows):
    shares = {row.method: row.coverage for row in rows}
    assert shares["AlpacaEval: sem of predictions"] == 0
    for method in (
        "row bootstrap",
        "Wald: p ± 1.96 sem",
        "z beyond ±1.96 at any look",
        "row bootstrap of ECE",
        "judge alone, Wald",
    ):
        assert shares[method] < 0.9, method


def test_a_run_without_an_interval_is_not_held():
    row = __main__._row(STUDIES[0], "clustered Wilson", [True, None, True, False], 2.0)
    assert (row.coverage, row.without, row.passed) == (0.5, 1, False) and row.width == pytest.approx(2 / 3)


def test_command(capsys, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{__main__.BEGIN}\nstale\n{__main__.END}\nafter\n")
    arguments = ["--runs", "200", "--only", "peeking", "--write", str(file)]
    assert __main__.main(arguments) == 0
    assert "**e-process, E ≥ 20**" in capsys.readouterr().out
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert __main__.main(["--runs", "200", "--only", "peeking", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found] == ["e-process, E ≥ 20", "z beyond ±1.96 at any look"]
    file.write_text("no markers")
    with pytest.raises(ValueError, match="add both"):
        __main__.main(arguments)
    with pytest.raises(SystemExit):
        __main__.main(["--only", "nothing"])
    assert "the studies are accuracy" in capsys.readouterr().err


def test_documentation_is_what_the_command_wrote():
    """Every study and method is in the page's table, with the full number of runs."""
    text = (Path(__file__).parents[2] / "docs" / "evidence" / "intervals.md").read_text("utf-8")
    part = text[text.index(__main__.BEGIN) : text.index(__main__.END)]
    assert "2,000 simulated evaluations" in part
    for study in STUDIES:
        assert f"- **{study.name}.** {study.about}" in part
        assert all(f"| {study.name} | **{method}** |" in part for method in study.ours)
