"""Writes `report.html` and `report.md` into a run directory from its result files.

The page needs nothing else: it reads on a phone, in the dark and on paper. The template escapes everything from models
and data; a policy that allows no script and no outside resource stands in the page's own head, for whatever an escape
might miss. Markdown has the same words and tables, samples as fenced text, plots by their captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from mlxdpo import UserError
from mlxdpo.inner import as_written, read_json, read_lines, write_text
from mlxdpo_eval.compare import latest_results
from mlxdpo_eval.report.blocks import Document, Part, SampleBlock, Table
from mlxdpo_eval.report.document import build_document
from mlxdpo_eval.report.plots import Figure
from mlxdpo_eval.results import FORMAT

if TYPE_CHECKING:
    from mlxdpo import Run  # it loads MLX


def write_report(run: Run) -> Path:
    """The report on the run's newest evaluation; returns the HTML file. Raises `UserError` without an evaluation."""
    results = latest_results(run)
    if results.get("format") != FORMAT:
        raise UserError(f"{run.path} was evaluated by another version; run `mlxdpo eval {run.path}` again")
    pairs, samples = (list(read_lines(run.path / "eval" / f"eval_{name}.jsonl")) for name in ("pairs", "samples"))
    frontier = run.path / "eval" / "frontier.json"
    with as_written(run.path / "eval", f"run `mlxdpo eval {run.path}` again"):
        document = build_document(results, pairs, samples, read_json(frontier) if frontier.exists() else None)
        return write_pages(run.path, document)


def write_pages(folder: Path, document: Document) -> Path:
    """`report.html` and `report.md`, neither when one of them cannot be made; returns the HTML file."""
    pages = {"report.md": markdown_page(document), "report.html": html_page(document)}
    for name, page in pages.items():
        write_text(folder / name, page)
    return folder / "report.html"


TONES = {"better": "good", "worse": "bad"}


def unbroken(words: str) -> str:
    """No line break inside `70.0 %`, `n = 100` and `[0.5, 0.7]`: their blanks become no-break spaces."""
    whole = re.sub(r"(\[[-+.\d]+,) (?=[-+.\d]+\])", "\\1\N{NO-BREAK SPACE}", words)
    return whole.replace(" %", "\N{NO-BREAK SPACE}%").replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def html_page(document: Document) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["unbroken"] = unbroken
    for name, kind in (("table", Table), ("sample", SampleBlock), ("figure", Figure)):
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    template, style = (
        resources.files("mlxdpo_eval.report").joinpath(name).read_text("utf-8") for name in ("page.html", "page.css")
    )
    page = environment.from_string(template).render(
        document=document,
        lead=document.sentence.removeprefix(f"{document.verdict.capitalize()}: "),  # the heading says it already
        tone=TONES.get(document.verdict, "open"),
        style=style,
    )
    return page.replace("\N{NO-BREAK SPACE}", "&nbsp;")  # an editor shows the entity


def markdown_page(document: Document) -> str:
    """The whole report. What comes from models or data cannot become markup."""
    tiles = Table(("number", "value", "95 % interval"), list(document.tiles))
    title, sentence, subtitle = map(escape_markdown, (document.title, document.sentence, document.subtitle))
    head = [f"# {title}", f"**{sentence}**", subtitle, _table_with_note(tiles)]
    return "\n\n".join([*head, *(_markdown_section(section) for section in document.sections)]) + "\n"


def escape_markdown(text: str) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _markdown_section(section: Part) -> str:
    return "\n\n".join([f"## {escape_markdown(section.title)}", *(_markdown_block(block) for block in section.blocks)])


def _markdown_block(block: Any) -> str:
    if isinstance(block, Table):
        return _table_with_note(block)
    if isinstance(block, Figure):
        return f"Plot (in report.html): {escape_markdown(block.caption)}"
    if isinstance(block, SampleBlock):
        parts = [("prompt", block.prompt), ("before", block.before), ("after", block.after)]
        shown = "\n\n".join(f"{name}:\n\n{_fenced(text)}" for name, text in parts)
        return f"{shown}\n\n{escape_markdown(block.note)}".rstrip()
    return escape_markdown(block)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells as they are; those from models or data need `escape_markdown` before."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _table_with_note(table: Table) -> str:
    header, *rows = ([escape_markdown(cell) for cell in row] for row in (table.header, *table.rows))
    return markdown_table(header, rows) + (f"\n\n{escape_markdown(table.note)}" if table.note else "")


def _fenced(text: str) -> str:
    """Text in a fence longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
