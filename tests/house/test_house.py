"""The house: imports point down, heavy libraries come late, files and functions stay small and documented.

A file imports its own room and the rooms of strictly lower floors.
"""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "types": 0, "machine": 0,
    "io": 1, "distributed": 1,
    "config": 2, "__init__": 2,
    "runs": 3,
    "data": 4, "losses": 4, "model": 4,
    "forward": 5,
    "training": 6,
    "inference": 7, "estimate": 7, "selfcheck": 7,
    "online": 8, "exporters": 8, "baselines": 8,
    "demo": 9, "ui": 9,
    "commands": 10,
    "cli": 11,
}  # fmt: skip
ROOF = {"cli", "commands", "demo", "ui"}
HEAVY = {"gradio", "matplotlib", "datasets", "huggingface_hub", "transformers", "torch"}
MAY_IMPORT_MLX_LM = {"model", "forward", "inference", "exporters", "selfcheck"}


class Import(NamedTuple):
    """An import statement: the module it names, the names taken from it, whether it runs when the file is imported."""

    module: str
    names: tuple[str, ...]
    at_import: bool
    line: int


def files():
    return sorted(p for folder in ("mlxdpo", "eval") for p in (ROOT / folder).rglob("*.py"))


FILES = files()
IDS = [str(path.relative_to(ROOT)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=IDS)


@cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def room_of(path):
    """The second word of a module's name: mlxdpo/data/dataset.py is `data`; eval files are `eval`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "eval" if parts[0] == "eval" else parts[1]


def imports(path):
    """Every import of a file, relative ones spelled out; those for type checkers alone are left out."""
    package = ("mlxdpo_eval" if room_of(path) == "eval" else "mlxdpo", *path.relative_to(ROOT).parts[1:-1])
    found = []

    def walk(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), at_import, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append(Import(module, tuple(alias.name for alias in node.names), at_import, node.lineno))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, at_import and not inside)

    walk(tree_of(path), True)
    return found


def own_rooms(statement):
    """Rooms of mlxdpo that an import reaches; `from mlxdpo import runs` reaches `runs`."""
    first, *rest = statement.module.split(".")
    if first != "mlxdpo":
        return set()
    if rest:
        return {rest[0]}
    return {name for name in statement.names if name in FLOORS} or {"__init__"}


def test_every_file_of_mlxdpo_has_a_floor():
    assert {room_of(path) for path in FILES} - {"eval"} <= FLOORS.keys()


@each_file
def test_imports_point_down(path):
    room = room_of(path)
    if room == "eval":
        return
    for statement in imports(path):
        for other in own_rooms(statement) - {room}:
            where = f"{path.name}:{statement.line} imports {other}"
            assert FLOORS[other] < FLOORS[room], f"{where}, which is not below it"
            assert other not in ROOF or room in ROOF, f"{where}: nobody imports the roof"


@each_file
def test_only_some_rooms_import_mlx_lm(path):
    if room_of(path) not in MAY_IMPORT_MLX_LM:
        assert [s for s in imports(path) if s.module.split(".")[0] == "mlx_lm"] == []


@each_file
def test_heavy_libraries_are_imported_inside_functions(path):
    assert [s for s in imports(path) if s.at_import and s.module.split(".")[0] in HEAVY] == []


@each_file
def test_the_evaluation_enters_by_the_front_door(path):
    statements = [s for s in imports(path) if s.module.split(".")[0] in ("mlxdpo", "mlxdpo_eval")]
    if room_of(path) == "eval":
        assert [s for s in statements if s.module.startswith("mlxdpo.")] == []
    elif room_of(path) not in ROOF:
        assert [s for s in statements if s.module.split(".")[0] == "mlxdpo_eval"] == []


@each_file
def test_small_and_documented(path):
    text, tree = path.read_text("utf-8"), tree_of(path)
    assert len(text.splitlines()) <= 500
    assert not text or ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    public += [method for node in public if isinstance(node, ast.ClassDef) for method in node.body]
    for node in public:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@each_file
def test_nothing_is_swallowed_and_nothing_is_left_for_later(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            assert any(isinstance(inner, ast.Raise | ast.Call) for inner in ast.walk(node)), "an error is swallowed"
        if isinstance(node, ast.Name):
            assert node.id != "NotImplementedError"
    assert not {"TODO", "FIXME", "XXX"} & set(path.read_text("utf-8").replace(":", " ").split())


def test_no_drawers_for_odds_and_ends():
    assert [path for path in FILES if path.stem in ("utils", "util", "common", "helpers", "misc")] == []


def test_the_walk_finds_what_it_looks_for(tmp_path, monkeypatch):
    """The walker itself: late, early, relative, type-checking-only and front-door imports."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "mlxdpo" / "data" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nfrom mlxdpo import runs, UserError\nfrom . import read\n"
        "from ..model import policy\nif TYPE_CHECKING:\n    import gradio\ndef f():\n    import datasets\n"
    )
    found = {s.module: s for s in imports(file)}
    assert found["torch"].at_import and not found["datasets"].at_import and "gradio" not in found
    assert own_rooms(found["mlxdpo"]) == {"runs"}
    assert own_rooms(found["mlxdpo.data"]) == {"data"} and own_rooms(found["mlxdpo.model"]) == {"model"}
