"""The floors of the house, and the imports of its files, read from their syntax trees."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FLOORS = {
    "types": 0, "machine": 0,
    "io": 1, "distributed": 1,
    "config": 2, "__init__": 2, "inner": 2,
    "runs": 3,
    "data": 4, "losses": 4, "model": 4,
    "forward": 5, "recipes": 5,
    "training": 6,
    "inference": 7, "estimate": 7, "selfcheck": 7,
    "online": 8, "exporters": 8, "baselines": 8,
    "demo": 9, "ui": 9,
    "commands": 10, "api": 10,
    "cli": 11,
}  # fmt: skip
ROOF = {"api", "cli", "commands", "demo", "ui"}


class Import(NamedTuple):
    """An import statement: the module it names, the names taken from it, whether it runs when the file is imported."""

    module: str
    names: tuple[str, ...]
    at_import: bool
    line: int


def files():
    return sorted(p for folder in ("mlxdpo", "eval") for p in (ROOT / folder).rglob("*.py"))


FILES = files()


def each_file(check):
    """A test that makes `check` of every file and tells at once what is wrong with which: a test a file takes long."""

    def test():
        wrong = []
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                wrong.append(f"{path.relative_to(ROOT)}: {error}")
        assert not wrong, "\n".join(wrong)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def room_of(path):
    """The second word of a module's name: mlxdpo/data/dataset.py is `data`; eval files are `eval`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "eval" if parts[0] == "eval" else parts[1]


@cache
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
