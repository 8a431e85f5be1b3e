"""A report as Markdown: the same words and tables, samples as fenced text, plots by their captions."""

from __future__ import annotations

import re
from typing import Any

from mlxdpo_eval.report.blocks import Document, Part, SampleBlock, Table
from mlxdpo_eval.report.plots import Figure


def markdown_page(document: Document) -> str:
    """The whole report. What comes from models or data cannot become markup."""
    tiles = Table(("number", "value", "95 % interval"), list(document.tiles))
    head = [f"# {escape_markdown(document.title)}", f"**{escape_markdown(document.sentence)}**", escape_markdown(document.subtitle), _table(tiles)]
    return "\n\n".join([*head, *(_markdown_section(section) for section in document.sections)]) + "\n"


def escape_markdown(text: str) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _markdown_section(section: Part) -> str:
    return "\n\n".join([f"## {escape_markdown(section.title)}", *(_markdown_block(block) for block in section.blocks)])


def _markdown_block(block: Any) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return f"Plot (in report.html): {escape_markdown(block.caption)}"
    if isinstance(block, SampleBlock):
        parts = [("prompt", block.prompt), ("before", block.before), ("after", block.after)]
        shown = "\n\n".join(f"{name}:\n\n{_fenced(text)}" for name, text in parts)
        return f"{shown}\n\n{escape_markdown(block.note)}".rstrip()
    return escape_markdown(block)


def _table(table: Table) -> str:
    rows = [table.header, tuple("---" for _ in table.header), *table.rows]
    lines = [f"| {' | '.join(cell if i == 1 else escape_markdown(cell) for cell in row)} |" for i, row in enumerate(rows)]
    return "\n".join(lines) + (f"\n\n{escape_markdown(table.note)}" if table.note else "")


def _fenced(text: str) -> str:
    """Text in a fence longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
