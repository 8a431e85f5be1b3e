"""Every small fault that is planted in a file, found on its syntax tree.

Left alone, because no number and no decision hangs on them: annotations and type aliases, docstrings, imports,
decorators, `__all__`, f-strings and texts of more than one word (sentences for people), what a `raise` says (that it
raises is mutated).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Change = tuple[str, ast.AST]
"""An operator's name, and what stands in the node's place."""

ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
TWINS = [
    ("min", "max"), ("all", "any"), ("minimum", "maximum"), ("startswith", "endswith"), ("lstrip", "rstrip"),
    ("argmin", "argmax"), ("exp", "expm1"), ("log", "log1p"), ("zeros", "ones"), ("zeros_like", "ones_like"),
    ("removesuffix", "removeprefix"), ("log_sigmoid", "sigmoid"), ("partition", "rpartition"),
]  # fmt: skip
TWIN = dict(TWINS) | {b: a for a, b in TWINS}


class Mutant(NamedTuple):
    """One fault. `lines` are those whose tests may see it; `at_import`: it acts while the file is imported."""

    path: str
    where: str
    line: int
    lines: range
    at_import: bool
    operator: str
    before: str
    after: str
    nth: int

    @property
    def name(self) -> str:
        """What is changed where, however the lines above move."""
        again = f" [{self.nth}]" if self.nth else ""
        return f"{self.where}: {self.before} -> {self.after}{again}"

    @property
    def key(self) -> str:
        """A short name for the log."""
        return hashlib.sha256(f"{self.path} {self.operator} {self.name}".encode()).hexdigest()[:16]


class Place(NamedTuple):
    """Where a walk is: the function, the lines of the statement, whether that runs at import."""

    where: str
    lines: range
    at_import: bool


class Site(NamedTuple):
    """A change and how to make it in the tree that was walked."""

    place: Place
    node: ast.AST
    operator: str
    after: ast.AST
    put: Callable[[ast.AST], None]


def mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    return [mutant for mutant, _ in _named(path, ast.parse(source))]


def planted(mutant: Mutant, source: str) -> ast.Module:
    """The file's tree with this one fault in it. Raises `LookupError` where the file no longer has it."""
    tree = ast.parse(source)
    for other, site in _named(mutant.path, tree):
        if other.key == mutant.key:
            site.put(site.after)
            return tree
    raise LookupError(f"{mutant.path} has no {mutant.name}")


def _named(path: str, tree: ast.Module) -> Iterator[tuple[Mutant, Site]]:
    seen: dict[tuple[str, str, str], int] = {}
    for site in _sites(tree, Place("", range(0), True)):
        before, after = _text(site.node), _text(site.after)
        same = (site.place.where, before, after)
        nth = seen[same] = seen.get(same, -1) + 1
        line: int = getattr(site.node, "lineno", 0)
        place = site.place
        yield Mutant(path, place.where, line, place.lines, place.at_import, site.operator, before, after, nth), site


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def _sites(node: ast.AST, place: Place) -> Iterator[Site]:
    """Changes of a node's children, and of theirs."""
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        at = value if isinstance(value, list) else [value]
        for i, child in enumerate(at):
            if not isinstance(child, ast.AST) or _left_alone(child):
                continue
            within = _place(node, name, child, place)
            put = _putter(node, name, i if isinstance(value, list) else None)
            for operator, after in _changes(child, name, within):
                yield Site(within, child, operator, ast.fix_missing_locations(ast.copy_location(after, child)), put)
            if not isinstance(child, ast.Raise):
                yield from _sites(child, within)


def _putter(node: ast.AST, name: str, index: int | None) -> Callable[[ast.AST], None]:
    def put(new: ast.AST) -> None:
        """Exchange the child."""
        if index is None:
            setattr(node, name, new)
        else:
            getattr(node, name)[index] = new

    return put


def _place(parent: ast.AST, name: str, child: ast.AST, place: Place) -> Place:
    """Defaults of a function belong to what is around it, its body to itself."""
    where, lines, at_import = place
    if isinstance(parent, ast.FunctionDef | ast.ClassDef) and name == "body":
        where = f"{where}.{parent.name}".lstrip(".")
    inside = isinstance(parent, ast.FunctionDef | ast.Lambda) and name == "body"
    if isinstance(child, ast.stmt) or isinstance(parent, ast.If | ast.While | ast.For | ast.With | ast.Try):
        start = getattr(child, "lineno", lines.start)
        lines = range(start, (getattr(child, "end_lineno", None) or start) + 1)
    return Place(where, lines, at_import and not inside)


def _left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name == "__all__" or (name[0].isupper() and not name.isupper())  # a type alias
    return False


def _changes(node: Any, field: str, place: Place) -> Iterator[Change]:
    """What an expression or a statement, which stands in this field of its parent, is replaced by."""
    if field in {"test", "ifs"} and not isinstance(node, ast.Compare | ast.UnaryOp):  # those have their opposite below
        yield "condition", ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.BinOp() | ast.AugAssign() if type(node.op) in ARITHMETIC:
            yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.Compare():
            yield from _compared(node)
        case ast.BoolOp():
            yield "boolean", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield "sign or not", node.operand
        case ast.Constant():
            yield from _constant(node)
        case ast.Call():
            yield from _called(node)
        case ast.Lambda():
            yield "lambda", _with(node, body=ast.Constant(None))
        case ast.Break():
            yield "break", ast.Continue()
        case ast.Continue():
            yield "break", ast.Break()
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield "return", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield "call left out", ast.Pass()
        case ast.Raise():
            yield "raise left out", ast.Pass()
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value) if not place.at_import:
            if not _is_none(value):
                yield "assignment", _with(node, value=ast.Constant(None))


def _with(node: Any, **fields: Any) -> Any:
    return type(node)(**{name: fields.get(name, value) for name, value in ast.iter_fields(node)})


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _compared(node: ast.Compare) -> Iterator[Change]:
    for i, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            yield "comparison", _with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])


def _constant(node: ast.Constant) -> Iterator[Change]:
    match node.value:
        case bool():
            yield "constant", ast.Constant(not node.value)
        case int() | float():
            yield "constant", ast.Constant(node.value + 1)
        case str() if len(node.value.split()) == 1:
            yield "text", ast.Constant(f"XX{node.value}XX")


def _called(node: ast.Call) -> Iterator[Change]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "argument left out", _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    match node.func:
        case ast.Name(id=name) if name in TWIN:
            yield "other function", _with(node, func=ast.Name(TWIN[name], ast.Load()))
        case ast.Attribute(attr=name) if name in TWIN:
            yield "other function", _with(node, func=_with(node.func, attr=TWIN[name]))
