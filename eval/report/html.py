"""A report as one HTML page that needs nothing else: reads on a phone, in the dark and on paper.

Everything from models and data is escaped here, in one place; a policy that allows no script and no outside resource
stands in the page's own head, for whatever an escape might miss.
"""

from __future__ import annotations

import re
from html import escape
from importlib import resources
from typing import Any

from mlxdpo_eval.report.blocks import Document, Part, SampleBlock, Table
from mlxdpo_eval.report.plots import Figure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TONES = {"better": "good", "worse": "bad"}


def unbroken(words: str) -> str:
    """Escaped, with no line break inside `70.0 %`, `n = 100` and `[0.5, 0.7]`."""
    whole = re.sub(r"(\[[-+.\d]+,) (?=[-+.\d]+\])", r"\1&nbsp;", escape(words))
    return whole.replace(" %", "&nbsp;%").replace("n = ", "n&nbsp;=&nbsp;")


def html_page(document: Document) -> str:
    """The whole page."""
    lead = document.sentence.removeprefix(f"{document.verdict.capitalize()}: ")  # the heading says it already
    style = resources.files("mlxdpo_eval.report").joinpath("page.css").read_text("utf-8")
    tone = TONES.get(document.verdict, "open")
    tiles = "".join(
        f"<div><dt>{escape(n)}</dt><dd>{unbroken(v)}<small>{unbroken(i)}</small></dd></div>" for n, v, i in document.tiles
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(document.title)}: {escape(document.verdict)}</title>
<style>
{style}</style>
</head>
<body>
<header class="{tone}">
<p class="name">{escape(document.title)}</p>
<h1>{escape(document.verdict.capitalize())}</h1>
<p class="lead">{unbroken(lead)}</p>
<p class="meta">{escape(document.subtitle)}</p>
<dl>{tiles}</dl>
</header>
<main>
{"".join(_section(section) for section in document.sections)}</main>
</body>
</html>
"""


def _section(section: Part) -> str:
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{_plots_together(section)}</section>\n"


def _plots_together(section: Part) -> str:
    """Blocks in order; plots that follow one another share a row where there is room."""
    plots = [block for block in section.blocks if isinstance(block, Figure)]
    rest = "".join(_block(block) for block in section.blocks if not isinstance(block, Figure))
    shown = "".join(f"<figure>{p.svg}<figcaption>{unbroken(p.caption)}</figcaption></figure>" for p in plots)
    return rest + (f'<div class="plots">{shown}</div>\n' if shown else "")


def _block(block: Any) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, SampleBlock):
        return _sample(block)
    return f"<p>{unbroken(block)}</p>\n"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-name="{escape(name)}">{unbroken(cell)}</td>'
            for name, cell in zip(table.header[1:], row[1:], strict=True)
        )
        + "</tr>\n"
        for row in table.rows
    )
    note = f'<p class="note">{unbroken(table.note)}</p>\n' if table.note else ""
    caption = f"<caption>{escape(table.header[0])}</caption>"
    return f"<table>\n{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n{note}"


def _sample(sample: SampleBlock) -> str:
    sides = "".join(
        f"<div><h4>{name}</h4><p>{escape(answer.strip()) or '<em>empty</em>'}</p></div>"
        for name, answer in (("before", sample.before), ("after", sample.after))
    )
    note = f'<p class="note">{escape(sample.note)}</p>' if sample.note else ""
    return f'<article><h3>{escape(sample.prompt)}</h3><div class="sides">{sides}</div>{note}</article>\n'
