"""Build the documentation: `make docs`, or `python docs/build.py`. Warnings and broken links are errors.

Pages are laid out under build/docs/source as they lie in the repository, so that their links stay what they are on a
Git host, and beside them the reference: what `import mlxdpo` offers, the rooms behind it, `mlxdpo_eval`, every key of a
recipe and every command. The reference is made from docstrings, schema and help texts; none of it is written twice.
"""

import argparse
import contextlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import unquote

import mlxdpo

ROOT = Path(__file__).parents[1]
PAGES = (
    "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/contributing/*.md", "docs/evidence/*.md",
    "examples/README.md",
)  # fmt: skip
FILES = ("docs/*.png", "docs/*.svg", "docs/evidence/*.svg", "examples/*.yaml", "examples/*.ipynb")
ROOMS = {"losses": "mlxdpo.losses", "data": "mlxdpo.data", "model": "mlxdpo.model", "export": "mlxdpo.exporters"}
GUIDES = (
    "docs/README", "docs/data", "docs/objectives", "docs/stages", "docs/evaluation", "docs/app", "docs/rounds",
    "docs/constitution", "docs/dial", "docs/export", "docs/frontier", "docs/benchmarks",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Lay out, build, look at every link of the result."""
    parser = argparse.ArgumentParser(description="Build the documentation; warnings are errors.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out = parser.parse_args(words).out
    shutil.rmtree(out, ignore_errors=True)
    lay_out(out / "source")
    from sphinx.cmd.build import main as sphinx

    options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(out / "trees")]
    if status := sphinx([*options, str(out / "source"), str(out / "html")]):
        return status
    for file in found(FILES):  # what raw HTML of a page shows
        (out / "html" / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / "html" / file.relative_to(ROOT))
    broken = broken_links(out / "html")
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(list((out / 'html').rglob('*.html')))} pages in {out / 'html' / 'index.html'}")
    return 1 if broken else 0


def found(patterns: tuple[str, ...]) -> list[Path]:
    """Files of the repository, sorted."""
    return sorted({file for pattern in patterns for file in ROOT.glob(pattern)})


def lay_out(source: Path) -> None:
    """Pages, pictures, recipes and the generated reference below `source`; README.md becomes the index."""
    for file in found(PAGES + FILES):
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(with_index(file), "utf-8")
        else:
            shutil.copyfile(file, target)
    (source / "index.md").write_text((ROOT / "README.md").read_text("utf-8") + contents(source), "utf-8")
    (source / "reference").mkdir()
    for name, text in reference().items():
        (source / "reference" / f"{name}.md").write_text(text, "utf-8")


def with_index(page: Path) -> str:
    """A page whose links to the README of the repository lead to the index; docs/README.md keeps its name."""

    def replaced(link: re.Match) -> str:
        """The link, if it leads there, under the new name."""
        is_front = (page.parent / link[1] / "README.md").resolve() == ROOT / "README.md"
        return f"]({link[1]}index.md" if is_front else link[0]

    return re.sub(r"\]\(([\w./-]*?)README\.md", replaced, page.read_text("utf-8"))


def contents(source: Path) -> str:
    """The table of contents. A page that is in no group would be a warning."""
    placed = {*GUIDES, "docs/architecture", "docs/decisions", "CONTRIBUTING", "CHANGELOG", "examples/README"}
    pages = [str(file.relative_to(source).with_suffix("")) for file in sorted(source.rglob("*.md"))]
    adding = [page for page in pages if "contributing/" in page]
    evidence = [page for page in pages if "evidence/" in page]
    more = [page for page in pages if page not in {*placed, *adding, *evidence, "index"}]
    groups = {
        "Guides": [*(page for page in GUIDES if page in pages), *more, "examples/README"],
        "Evidence": evidence,
        "Reference": [f"reference/{name}" for name in ("configuration", "commands", "python", *ROOMS, "evaluation")],
        "The project": ["docs/architecture", "CONTRIBUTING", *adding, "docs/decisions", "CHANGELOG"],
    }
    trees = (f"```{{toctree}}\n:hidden:\n:caption: {name}\n\n{chr(10).join(g)}\n```\n" for name, g in groups.items())
    return "\n" + "\n".join(trees)


def reference() -> dict[str, str]:
    """The generated pages by name."""
    pages = {"configuration": configuration(), "commands": commands(), "python": front_door()}
    pages |= {name: modules(package, f"The room `{package}`") for name, package in ROOMS.items()}
    return pages | {"evaluation": modules("mlxdpo_eval", "The evaluation, `mlxdpo_eval`")}


def configuration() -> str:
    """Every key of a recipe: type, default, meaning."""
    from mlxdpo.config import Config

    return (
        "# Configuration\n\nEvery key of a recipe (YAML), which is also every option of the command line: "
        "`lora: {rank: 32}` is `--lora.rank 32`. Unknown keys are refused. Made from the schema, `mlxdpo/config.py`.\n"
        + "".join(_section("", Config))
    )


def _section(prefix: str, model: Any) -> Iterator[str]:
    fields = model.model_fields
    nested = {name: field for name, field in fields.items() if hasattr(field.annotation, "model_fields")}
    rows = [_key(f"{prefix}{name}", field) for name, field in fields.items() if name not in nested]
    yield f"\n## {f'`{prefix[:-1]}`' if prefix else 'The run'}\n\n{cell(inspect.getdoc(model) or '')}\n\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
    for name, field in nested.items():
        yield from _section(f"{prefix}{name}.", field.annotation)


def _key(name: str, field: Any) -> str:
    if not field.description:
        raise SystemExit(f"{name} has no docstring in the schema")
    default = field.get_default(call_default_factory=True)
    shown = "unset" if default is None else repr(default) if default != "" else "unset"
    return f"| `{name}` | {cell(type_of(field))} | `{cell(shown)}` | {cell(field.description)} |\n"


def type_of(field: Any) -> str:
    """A field's type as a reader needs it: the values of a choice, the bounds of a number."""
    return ", ".join([_kind(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Any) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return [f"{sign} {getattr(m, key)}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]


def _kind(annotation: Any) -> str:
    """`Literal[4, 8] | None` as "4, 8": that a key may be unset, its default says."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, inside))
    if origin is Annotated:
        return " ".join([_kind(inside[0]), *_bounds(inside[1:])])
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in inside if one is not NoneType)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(_kind(one) for one in inside)}"
    return annotation.__name__


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    from mlxdpo.cli import COMMANDS, run

    parts = [
        "# Commands\n\nWhat `mlxdpo COMMAND --help-all` prints. Exit status: 0 done, 2 the input is wrong, "
        "130 interrupted after saving, 1 anything else.\n"
    ]
    os.environ["COLUMNS"] = "100"
    for name, about in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            run([*name.split(), "--help-all"])
        text = "\n".join(line.rstrip() for line in shown.getvalue().strip().splitlines())
        parts.append(f"## mlxdpo {name}\n\n{about}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def front_door() -> str:
    """Everything `import mlxdpo` offers, in the order of the door."""
    parts = ["# Python\n\nWhat `import mlxdpo` offers. The rooms behind it have pages of their own.\n"]
    for name in mlxdpo._DOOR:
        value = getattr(mlxdpo, name)
        if not callable(value):  # a registry: its docstring stands where it is defined
            parts.append(f"```{{eval-rst}}\n.. autodata:: {_defined(name, value)}\n   :no-index:\n```\n")
            continue
        kind = "class" if inspect.isclass(value) else "function"
        own = "\n   :members:" if kind == "class" else ""
        # What a room's page has too is indexed there.
        own += "\n   :no-index:" if _in_a_room(value) else ""
        parts.append(f"```{{eval-rst}}\n.. auto{kind}:: mlxdpo.{name}{own}\n```\n")
    return "\n".join(parts)


def _defined(name: str, value: Any) -> str:
    """The module of a room that assigns a value, where `from x import y` only passes it on."""
    package = mlxdpo._DOOR[name]
    homes = [m for m in sorted(sys.modules) if m.startswith(package) and vars(sys.modules[m]).get(name) is value]
    assigns = re.compile(rf"^{name}\b.*=", re.MULTILINE)
    return next(f"{m}.{name}" for m in homes if assigns.search(inspect.getsource(sys.modules[m])))


def _in_a_room(value: Any) -> bool:
    return ".".join(getattr(value, "__module__", "").split(".")[:2]) in ROOMS.values()


def modules(package: str, title: str) -> str:
    """The modules of a package, with their public functions and classes."""
    top = __import__(package, fromlist=["__path__"])
    names = [package, *(module.name for module in pkgutil.walk_packages(top.__path__, f"{package}."))]
    blocks = [
        f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :ignore-module-all:\n```\n"
        for name in names
    ]
    return f"# {title}\n\n" + "\n".join(blocks)


class _Links(HTMLParser):
    """The anchors and the targets of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ids, and what is linked to or shown."""
        for key, value in attrs:
            if key == "id" and value:
                self.anchors.add(value)
            elif key in ("href", "src") and value and tag in ("a", "img", "link", "script"):
                self.targets.append(value)


def broken_links(folder: Path) -> list[str]:
    """Links between the pages of a site that lead nowhere: a missing file, or a missing place in it."""
    pages = {}
    for file in sorted(folder.rglob("*.html")):
        pages[file.resolve()] = links = _Links()
        links.feed(file.read_text("utf-8"))
    broken = []
    for file, links in pages.items():
        for link in links.targets:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            target = (file.parent / unquote(path.partition("?")[0])).resolve() if path else file
            known = pages[target].anchors if target in pages else None
            if not target.is_file():
                broken.append(f"{file.relative_to(folder.resolve())}: {link} is not there")
            elif anchor and known is not None and unquote(anchor) not in known:
                broken.append(f"{file.relative_to(folder.resolve())}: {link} names a place that is not there")
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
