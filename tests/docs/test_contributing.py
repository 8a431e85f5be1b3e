"""Each page of docs/contributing/ holds a complete example. It is pasted into a copy of the repository: without the
part under "What the tests demand" the tests that the page names fail, with it they pass, and the house stands."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "contributing").glob("*.md"))
DEMANDS = "\n## What the tests demand\n"
WHERE = re.compile(
    r"`(?P<file>[\w/.-]+)`, (?P<how>a new file|at the end|with the imports|into `(?P<name>\w+)`"
    r"|behind the line of `(?P<line>[^`]+)`)"
)
COPIED = ("mlxdpo", "eval", "tests", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml")
HOUSE = (
    "test_imports_point_down",
    "test_small_and_documented",
    "test_the_evaluation_enters_by_the_doors",
    "test_heavy_libraries_are_imported_inside_functions",
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Paste(NamedTuple):
    """A block of a page and where it goes."""

    file: str
    how: str
    name: str | None
    line: str | None
    text: str


def pastes(text: str) -> list[Paste]:
    """The blocks of a page, each with the place named last before it."""
    parts = re.split(r"```\w+\n(.*?)```", text, flags=re.DOTALL)
    found = []
    for before, block in zip(parts[::2], parts[1::2], strict=False):
        *_, place = WHERE.finditer(before)
        found.append(Paste(place["file"], place["how"], place["name"], place["line"], block))
    return found


def demanded(page: Path) -> list[str]:
    """The tests that the page says fail without what they demand."""
    listed = re.search(r"\n\nWithout \w+ these fail:\n\n((?:- .*\n)+)", page.read_text("utf-8"))
    return re.findall(r"^- `(tests/[^`]+)`", listed.group(1), flags=re.MULTILINE)


def place_of(lines: list[str], block: Paste) -> int:
    """The line that a block goes before."""
    if block.how == "at the end":
        return len(lines)
    if block.how == "with the imports":
        return imports_end(lines)
    if block.name:
        return literal_end(lines, block.name)
    [at] = [i for i, line in enumerate(lines) if block.line in line]
    return at + 1


def paste(root: Path, block: Paste) -> None:
    """Do by hand what the page says."""
    file = root / block.file
    if block.how == "a new file":
        assert not file.exists()
        file.write_text(block.text)
        return
    lines = file.read_text("utf-8").splitlines()
    at = place_of(lines, block)
    lines[at:at] = [*(["", ""] if block.how == "at the end" else []), *block.text.rstrip("\n").split("\n")]
    file.write_text("\n".join(lines) + "\n")


def imports_end(lines: list[str]) -> int:
    """The line behind the last import at the top of a file."""
    body = ast.parse("\n".join(lines)).body
    return max(node.end_lineno for node in body if isinstance(node, ast.Import | ast.ImportFrom))


def literal_end(lines: list[str], name: str) -> int:
    """The line of the closing bracket of the dict or tuple that `name` is."""
    for node in ast.parse("\n".join(lines)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if [getattr(target, "id", None) for target in targets] == [name]:
            return node.value.end_lineno - 1
    raise AssertionError(f"no {name}")


def in_copy(root: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python in the copy, with the copy's packages before the installed ones."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, env=environment)


@pytest.fixture
def copied(tmp_path):
    """The repository's files, importable as installed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copyfile(source, tmp_path / name)
    (tmp_path / "mlxdpo_eval").symlink_to("eval")
    return tmp_path


@each_page
def test_a_page_names_places_and_tests_that_exist(page):
    text = page.read_text("utf-8")
    before, after = text.split(DEMANDS)
    assert pastes(before) and pastes(after) and demanded(page)
    new = {block.file for block in pastes(text) if block.how == "a new file"}
    for block in pastes(text):
        if block.file not in new:
            assert place_of((ROOT / block.file).read_text("utf-8").splitlines(), block)
    for node in demanded(page):
        file, _, name = node.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text("utf-8"), node
    for file in re.findall(r"`((?:tests|mlxdpo|eval|docs)/[\w/.-]+\.\w+)(?:::[^`]*)?`", text):
        assert file in new or (ROOT / file).is_file(), file


@pytest.mark.slow
@each_page
def test_the_example_is_demanded_by_the_tests_and_passes_them(page, copied):
    before, after = page.read_text("utf-8").split(DEMANDS)
    nodes = demanded(page)
    for block in pastes(before):
        paste(copied, block)
    (copied / "tests" / "__init__.py").unlink(missing_ok=True)
    without = in_copy(copied, "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *nodes)
    failed = {line.split(" ")[1] for line in without.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))}
    assert failed == set(nodes), without.stdout
    for block in pastes(after):
        paste(copied, block)
    changed = sorted({block.file for block in pastes(before + after) if block.file.endswith(".py")})
    subprocess.run([sys.executable, "-m", "ruff", "check", "--fix", "--quiet", *changed], cwd=copied, check=True)
    house = [f"tests/house/test_house.py::{test}" for test in HOUSE]
    within = in_copy(copied, "pytest", "-q", "-p", "no:cacheprovider", *nodes, *house)
    assert within.returncode == 0, within.stdout
