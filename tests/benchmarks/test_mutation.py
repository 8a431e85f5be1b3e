"""The mutation tool: which faults it plants, that each is another program, and how it counts."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the folder of `benchmarks`, which no installation has

from benchmarks.mutation import equivalent, log  # noqa: E402
from benchmarks.mutation.areas import AREAS  # noqa: E402
from benchmarks.mutation.covering import Seen  # noqa: E402
from benchmarks.mutation.mutants import mutants, planted  # noqa: E402
from benchmarks.mutation.trial import module_name  # noqa: E402

SOURCE = '''"""Words that nobody computes with."""
import math
Alias = dict[str, int]
TABLE = {"key": "two words"}

def clip(x: float, top: float = 2.0, *, loud: bool = False) -> float:
    """Not mutated."""
    if x < top and loud:
        raise ValueError(f"{x + 1} is 1 too much")
    note(x)
    return min(x - 1, key=None)
'''
FILES = [path for area in AREAS.values() for path in area.files]


def test_faults_of_a_small_file():
    found = {(m.where, m.operator, m.before, m.after) for m in mutants("a.py", SOURCE)}
    assert found == {
        ("", "text", "'key'", "'XXkeyXX'"),
        ("", "constant", "2.0", "3.0"),
        ("", "constant", "False", "True"),
        ("clip", "condition", "x < top and loud", "not (x < top and loud)"),
        ("clip", "boolean", "x < top and loud", "x < top or loud"),
        ("clip", "comparison", "x < top", "x <= top"),
        ("clip", "comparison", "x < top", "x >= top"),
        ("clip", "raise left out", "raise ValueError(f'{x + 1} is 1 too much')", "pass"),
        ("clip", "call left out", "note(x)", "pass"),
        ("clip", "return", "return min(x - 1, key=None)", "return None"),
        ("clip", "argument left out", "min(x - 1, key=None)", "min(x - 1)"),
        ("clip", "other function", "min(x - 1, key=None)", "max(x - 1, key=None)"),
        ("clip", "arithmetic", "x - 1", "x + 1"),
        ("clip", "constant", "1", "2"),
    }


def test_what_acts_at_import_and_which_lines_count():
    at = {m.before: m for m in mutants("a.py", SOURCE)}
    assert at["2.0"].at_import and at["'key'"].at_import and not at["x < top"].at_import
    assert at["x < top"].lines == range(8, 9) and at["note(x)"].lines == range(10, 11)


def test_a_planted_fault_is_the_one_that_was_named():
    (mutant,) = (m for m in mutants("a.py", SOURCE) if m.after == "x + 1")
    assert ast.unparse(planted(mutant, "\n\n" + SOURCE)) == ast.unparse(ast.parse(SOURCE)).replace("x - 1", "x + 1")
    with pytest.raises(LookupError):
        planted(mutant, SOURCE.replace("x - 1", "x - 3"))


@pytest.mark.parametrize("path", FILES)
def test_every_fault_has_its_own_name_and_listed_equivalents_exist(path):
    found = mutants(path, (ROOT / path).read_text("utf-8"))
    assert len({m.key for m in found}) == len({m.name for m in found}) == len(found)
    assert set(equivalent.EQUIVALENT.get(path, {})) <= {m.name for m in found}
    assert all(len(reason) > 15 for reason in equivalent.EQUIVALENT.get(path, {}).values())


def test_files_are_known_by_the_names_they_are_imported_by():
    assert module_name("eval/metrics/intervals.py") == "mlxdpo_eval.metrics.intervals"
    assert module_name("mlxdpo/losses/loss.py") == "mlxdpo.losses.loss"


def test_tests_that_run_a_line_quickest_first():
    seen = Seen({"quick": 0.1, "slow": 2.0, "other": 3.0}, {"a.py": {4: frozenset({"slow", "quick"})}})
    assert seen.tests("a.py", range(4, 6), False) == ["quick", "slow"]
    assert seen.tests("a.py", range(9, 10), False) == []
    assert seen.tests("a.py", range(9, 10), True) == ["quick", "slow", "other"]


def test_counts_and_the_log(tmp_path, monkeypatch):
    found = mutants("a.py", SOURCE)
    outcomes = ["killed"] * 9 + ["timeout", "survived", "survived"]  # of 14: two are not tried
    monkeypatch.setitem(equivalent.EQUIVALENT, "a.py", {found[10].name: "it is the same program"})
    for mutant, outcome in zip(found, outcomes, strict=False):
        log.append(tmp_path / "log", log.Trial(mutant.key, "a.py", mutant.name, 1, outcome, "", 0.1, "today"))
    count = log.count("a.py", found, log.read(tmp_path / "log"), "today")
    assert count == log.Count("a.py", killed=9, timeout=1, survived=1, equivalent=1, left=2)
    assert count.share == 10 / 11
    tomorrow = log.count("a.py", found, log.read(tmp_path / "log"), "tomorrow")
    assert (tomorrow.survived, tomorrow.left) == (0, 3)  # other tests: what survived is tried again
    assert log.total([count, count]) == log.Count("all", 18, 2, 2, 2, 4)
    assert "| a.py | 12 | 9 | 1 | 1 | 1 | 90.9% (62% to 98%) |" in log.table([count])
