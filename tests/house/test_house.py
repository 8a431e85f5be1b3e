"""The house: imports point down, heavy libraries come late, files and functions stay small and documented.

A file imports its own room and the rooms of strictly lower floors.
"""

import ast

from house import FILES, FLOORS, ROOF, ROOT, each_file, imports, own_rooms, room_of, tree_of

COUNTERPARTS = {"main", "run", "build"}  # of a program, a command, a tab of the app
COUNTERPARTS |= {"__getattr__", "evaluate", "generate", "objective", "open_run"}  # of the doors
HEAVY = {"gradio", "matplotlib", "datasets", "huggingface_hub", "transformers", "torch"}
MAY_IMPORT_MLX_LM = {"model", "forward", "inference", "exporters", "selfcheck"}


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
def test_the_evaluation_enters_by_the_doors(path):
    statements = [s for s in imports(path) if s.module.split(".")[0] in ("mlxdpo", "mlxdpo_eval")]
    if room_of(path) == "eval":
        assert [s for s in statements if s.module.startswith("mlxdpo.") and s.module != "mlxdpo.inner"] == []
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


def test_a_name_stands_in_one_file():
    """But for what each command, tab or program has: a reader who searches for a name finds it."""
    homes = {}
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1 and name not in COUNTERPARTS} == {}


def test_no_drawers_for_odds_and_ends():
    assert [path for path in FILES if path.stem in ("utils", "util", "common", "helpers", "misc")] == []


def test_the_walk_finds_what_it_looks_for(tmp_path, monkeypatch):
    """The walker itself: late, early, relative, type-checking-only and front-door imports."""
    monkeypatch.setattr("house.ROOT", tmp_path)
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
