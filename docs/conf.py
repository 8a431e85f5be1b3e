"""Sphinx settings of the reference; `docs/build.py` lays out the pages and runs it, with warnings as errors."""

import importlib.metadata
import re
import sys
from pathlib import Path

import mlxdpo  # noqa: F401 (before anything imports mlx: it puts the fast BLAS in front)

sys.path.insert(0, str(Path(__file__).parent))

project = "mlxdpo"
author = "the authors of mlxdpo"
release = importlib.metadata.version("mlxdpo")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "index"
html_theme = "furo"
html_title = f"mlxdpo {release}"
html_copy_source = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_default_options = {"no-value": True}  # a registry printed whole is no documentation
add_module_names = False
autodoc_mock_imports = ["inspect_ai"]  # its scorer is documented where it is not installed
# A type that is imported for type checkers alone is known by its last word, which two rooms may share.
suppress_warnings = ["ref.python"]
python_display_short_literal_types = True

INLINE = re.compile(r"`([^`\n]+)`")
SPECIAL = re.compile(r"([\\*|<]|(?<=\w)_(?!\w))")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: `code` stays code, formulas with * and | are text, laid-out text stays as it is.

    Docstrings here are plain text with Markdown's backticks. A paragraph in which a line is indented was laid out by
    hand (shapes, tables of fields): it is shown as it stands.
    """
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.split("\n")
        if any(row.startswith(" ") for row in rows):
            made += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            made += [*_inline(paragraph).split("\n"), ""]
    return made


def _inline(text: str) -> str:
    """Prose with its `code`; everything that would mean something else in reStructuredText is escaped."""
    parts = INLINE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = SPECIAL.sub(r"\\\1", parts[i])
    # An escaped space on both sides lets code touch letters, as in `rank`s.
    return "".join(rf"\ ``{part}``\ " if i % 2 else part for i, part in enumerate(parts)).removeprefix("\\ ")


def process_docstring(app, what, name, obj, options, lines):
    """Called by autodoc; what is public and undocumented is a warning, and so an error."""
    from sphinx.util import logging

    ours = what == "module" or getattr(obj, "__module__", "").startswith("mlxdpo")
    if not any(line.strip() for line in lines) and ours and not name.endswith(".__init__"):
        logging.getLogger(__name__).warning("%s has no docstring", name)
    if lines and lines[0].startswith("Alias for field number"):  # what Python says of a NamedTuple's field
        lines.clear()
    lines[:] = as_rst(lines)


def skip_member(app, what, name, obj, skip, options):
    """pydantic's own settings of a model are none of ours."""
    return True if name == "model_config" else None


def setup(app):
    """Register the above; diagrams that a Git host draws are shown as their text."""
    from pygments.lexers.special import TextLexer

    app.add_lexer("mermaid", TextLexer)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
