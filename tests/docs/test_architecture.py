"""docs/architecture.md says what is so: the drawing is the one the imports make, and every function named is there."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


@pytest.fixture(scope="module")
def drawing():
    """docs/drawing.py as a module."""
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "docs" / "drawing.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "drawing", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan(drawing):
    """What it draws of this house."""
    return drawing.house()


def test_the_committed_drawing_is_the_one_that_the_imports_make(drawing, plan):
    """When stale: `python docs/drawing.py`."""
    assert drawing.TARGET.read_text("utf-8") == drawing.draw(plan)


def test_the_drawing_sees_what_the_test_of_the_house_sees(plan):
    """Two walkers over the same files, written apart, find the same imports between rooms."""
    found = {}
    for path in house.FILES:
        room = house.room_of(path)
        for statement in house.imports(path):
            first = statement.module.split(".")[0]
            others = {"eval"} if first == "mlxdpo_eval" else house.own_rooms(statement)
            if room == "eval" and first == "mlxdpo":
                others = {"inner"} if statement.module == "mlxdpo.inner" else {"__init__"}
            found.setdefault(room, set()).update(others - {room})
    assert plan.below == {room: found.get(room, set()) for room in plan.rooms}
    assert plan.floor == {room: house.FLOORS.get(room, -1) for room in plan.rooms}


def test_an_import_that_points_up_would_be_drawn_left_of_the_diagonal(drawing, tmp_path):
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "tests" / "support" / "house.py").write_text('FLOORS = {"low": 0, "high": 4}\n')
    for name, text in (("mlxdpo/low.py", "def f():\n    from mlxdpo.high import x\n"), ("mlxdpo/high.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    plan = drawing.house(tmp_path)
    assert plan.rooms == ["high", "low"] and plan.below == {"high": set(), "low": {"high"}}
    assert f'cx="{drawing.LEFT + drawing.CELL / 2}" cy="{drawing.TOP + 1.5 * drawing.CELL}"' in drawing.draw(plan)


def test_every_function_of_the_walk_is_where_the_page_says():
    """In the text and in the second column a file is followed by functions or classes of it."""
    walk = [line for line in PAGE.split("## One row")[1].splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in walk] == list(range(1, len(walk) + 1)) and len(walk) >= 12
    checked = 0
    for line in walk:
        for file, names in re.findall(r"`([\w/]+\.py)`((?:,? `\w+`)+)", line):
            defined = {getattr(n, "name", None) for n in ast.parse((ROOT / file).read_text("utf-8")).body}
            wanted = re.findall(r"\w+", names)
            assert set(wanted) <= defined, f"{file} has no {', '.join(set(wanted) - defined)}"
            checked += len(wanted)
    assert checked >= 25


def test_the_page_names_every_room():
    rooms = set(house.FLOORS) | house.ROOF
    assert [room for room in rooms if not re.search(rf"`{room}(\.py|/)`", PAGE)] == []
