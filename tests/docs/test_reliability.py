"""docs/reliability.md: every row of its table names tests, and they exist, as do those that its evidence names."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
EVIDENCE = "".join((ROOT / "docs" / "evidence" / f"{name}.md").read_text("utf-8") for name in ("kills", "long-run"))
ROWS = [line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`test_" in line]


@cache
def known() -> dict[str, str]:
    """Every test function and the source of its file."""
    found = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text("utf-8")
        found |= {node.name: text for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    return found


def test_every_row_of_the_table_names_tests_that_exist():
    tests = known()
    assert len(ROWS) >= 25
    for row in ROWS:
        assert len(row) == 4 and all(cell.strip() for cell in row), row
        names = re.findall(r"`(test_\w+)(?:\[([\w ]+)\])?`", row[3])
        assert names, row
        for name, case in names:
            assert name in tests, f"{row[0]}: there is no test `{name}`"
            assert not case or f'"{case}"' in tests[name] + (ROOT / "tests/support/stages.py").read_text(), (name, case)


def test_the_evidence_names_tests_that_exist():
    names = set(re.findall(r"`(test_\w+)", EVIDENCE))
    assert names and names <= set(known())


def test_every_fault_of_the_suite_is_in_the_table():
    """But for the full-size versions of the same, and the long run, which is in the evidence."""
    told = set(re.findall(r"`(test_\w+)", PAGE + EVIDENCE))
    for file in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        names = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        tests = {name for name in names if name.startswith("test_") and "hundred" not in name and "much" not in name}
        assert tests - told <= {"test_who_comes_second_does_not_replace_the_first"} | {
            "test_refusals_exit_2_with_one_sentence"
        }, file.name
