"""A report as Markdown: the same words and tables, samples as fenced text, plots by their captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mlxdpo_eval.report.blocks import Document, Part, SampleBlock, Table
from mlxdpo_eval.report.plots import Figure


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
