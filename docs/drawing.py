"""Draw the house from its imports: `python docs/drawing.py` writes docs/architecture.svg, `--check` compares it.

Rooms come from the files and what imports what from their syntax trees, late imports included; only the floor of a room
is looked up, in the table that the test of the house enforces. So the drawing cannot show an import that is not there,
nor hide one. A test fails when the committed drawing is not the one this makes.

Every room has a column as well as a row: a dot says that the row's room imports the column's. The rooms stand in the
order of the floors, so an import that points up would be a dot to the left of the diagonal.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "architecture.svg"
LEVELS = (11, 10, 9, -1, 8, 7, 6, 5, 4, 3, 2, 1, 0)
TITLES = {level: f"floor {level}" for level in LEVELS}
SAYS = {
    11: "the command line",
    10: "a file for each command",
    9: "the demo and the app",
    8: "rounds, exports, baselines",
    7: "a trained run; a run's cost",
    6: "from configuration to adapter",
    5: "a model meets a batch",
    4: "rooms that do not know each other",
    3: "the run directory",
    2: "every setting; the front door",
    1: "files and processes",
    0: "vocabulary and machine",
}
SHADES = ("#b5533c", "#c98a2b", "#7d8c3a", "#3f8f7a", "#3f78a8", "#6b5b95")
COLOURS = {level: SHADES[(11 - level) // 2] for level in LEVELS if level >= 0} | {-1: "#888888"}
CAPTION = "a dot: the row's room imports the column's; right of the diagonal is down"
CELL, LEFT, TOP, WIDTH = 17, 380, 150, 150


class House(NamedTuple):
    """Rooms from the roof down, the floor of each (-1: the annex), and the rooms each imports."""

    rooms: list[str]
    floor: dict[str, int]
    below: dict[str, set[str]]


def floors(root: Path = ROOT) -> dict[str, int]:
    """The table of floors in tests/support/house.py, which tests/house/test_house.py enforces."""
    tree = ast.parse((root / "tests" / "support" / "house.py").read_text("utf-8"))
    table = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    return ast.literal_eval(table)


def modules_of(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of every import of a file that runs; those for type checkers alone do not."""

    def walk(node: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, tuple(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text("utf-8")))


def reached(module: str, names: tuple[str, ...], known: dict[str, int]) -> set[str]:
    """The rooms that an import reaches."""
    first, *rest = module.split(".")
    if first == "mlxdpo_eval":
        return {"eval"}
    if first != "mlxdpo":
        return set()
    if rest:
        return {rest[0]}
    return {name for name in names if name in known} or {"__init__"}


def house(root: Path = ROOT) -> House:
    """Read every file of `mlxdpo/` and `eval/` once."""
    known = floors(root)
    below: dict[str, set[str]] = {}
    for path in sorted(p for folder in ("mlxdpo", "eval") for p in (root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        annex = parts[0] == "eval"
        room = "eval" if annex else parts[1]
        package = ("mlxdpo_eval" if annex else "mlxdpo", *path.relative_to(root).parts[1:-1])
        found = below.setdefault(room, set())
        for module, names in modules_of(path, package):
            found |= reached(module, names, known if not annex else {})
    for room, others in below.items():
        others.discard(room)
    if homeless := sorted(below.keys() - known.keys() - {"eval"}):
        raise SystemExit(f"no floor for {', '.join(homeless)}; give it one in FLOORS of tests/support/house.py")
    floor = {room: -1 if room == "eval" else known[room] for room in below}
    return House(_ordered(floor, below), floor, below)


def _ordered(floor: dict[str, int], below: dict[str, set[str]]) -> list[str]:
    """From the top down, the annex under who imports it; within one, who imports others stands over them."""
    rooms: list[str] = []
    for level in LEVELS:
        left = {room for room in floor if floor[room] == level}
        while left:
            free = {room for room in left if not any(room in below[other] for other in left)} or left
            rooms += sorted(free)
            left -= free
    return rooms


def draw(plan: House) -> str:
    """The SVG."""
    at = {room: i for i, room in enumerate(plan.rooms)}
    side = CELL * len(plan.rooms)
    parts = [_text(LEFT, 24, "What imports what", 15, weight="bold"), _text(LEFT, 42, CAPTION, 11)]
    for room, i in at.items():
        parts += _row(plan, room, i, side)
    for level in dict.fromkeys(plan.floor[room] for room in plan.rooms):
        parts += _floor(plan, level, at, side)
    for room, others in plan.below.items():
        colour = COLOURS[plan.floor[room]]
        parts += [_dot(LEFT + CELL * at[other], TOP + CELL * at[room], colour) for other in sorted(others)]
    parts.append(f'<path d="M{LEFT} {TOP}L{LEFT + side} {TOP + side}" stroke="#999" stroke-dasharray="3 3"/>')
    width, height = LEFT + side + 20, TOP + side + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" role="img">\n<title>Rooms of mlxdpo and what each imports</title>'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>\n"])


def _row(plan: House, room: str, i: int, side: int) -> list[str]:
    """A room's band, its name at its row and at its column, and the line to it."""
    y, x, colour = TOP + CELL * i, LEFT + CELL * i, COLOURS[plan.floor[room]]
    name = {"__init__": "front door (__init__)", "eval": "eval (annex)"}.get(room, room)
    up = f'transform="translate({x + CELL - 7} {TOP - 6}) rotate(-60)"'
    return [
        f'<rect x="{LEFT - WIDTH}" y="{y}" width="{WIDTH + side}" height="{CELL}" fill="{colour}"'
        f' fill-opacity="{0.06 + 0.05 * (i % 2):.2f}"/>',
        _text(LEFT - 6, y + 12.5, name, 11, anchor="end"),
        f'<text {up} font-size="10" fill="{colour}">{escape(name.split(" (")[0])}</text>',
    ]


def _floor(plan: House, level: int, at: dict[str, int], side: int) -> list[str]:
    """The box of a floor, from its first room to its last, and what it is."""
    rooms = [room for room in plan.rooms if plan.floor[room] == level]
    y, height = TOP + CELL * at[rooms[0]], CELL * len(rooms)
    title, says = ("annex", "only by the doors") if level == -1 else (TITLES[level], SAYS[level])
    return [
        f'<rect x="10" y="{y + 1}" width="{LEFT - WIDTH - 14}" height="{height - 2}" rx="4" fill="{COLOURS[level]}"/>',
        _text(18, y + 13, title, 12, weight="bold", fill="#fff"),
        *([_text(18, y + 28, says, 9.5, fill="#fff")] if height > CELL else []),
        f'<path d="M10 {y}H{LEFT + side}" stroke="{COLOURS[level]}"/>',
    ]


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x + CELL / 2}" cy="{y + CELL / 2}" r="4.5" fill="{colour}"/>'


def _text(
    x: float, y: float, text: str, size: float, anchor: str = "start", weight: str = "", fill: str = "#222"
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{bold}>{escape(text)}</text>'


def main(words: list[str]) -> int:
    """Write the drawing, or say whether the one that is there is up to date."""
    made = draw(house())
    if words == ["--check"]:
        if TARGET.read_text("utf-8") != made:
            print(f"{TARGET.name} is out of date; run: python docs/drawing.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
