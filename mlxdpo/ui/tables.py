"""Tables as escaped HTML: they scroll inside themselves on a narrow screen and are read out as tables.

Gradio's Dataframe draws a table at least as wide as its content, which on a phone widens the whole page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """<style>
.lines { contain: inline-size; overflow: auto; max-height: 420px; }
.lines table { border: 0 !important; border-collapse: collapse; width: 100%; font-size: .92em;
  color: var(--body-text-color); }
.lines caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.lines th, .lines td { text-align: left !important; padding: 5px 10px !important; vertical-align: top;
  border: 0 solid var(--border-color-primary) !important; border-bottom-width: 1px !important; }
.lines thead th { position: sticky; top: 0; background: var(--background-fill-primary); white-space: nowrap; }
.lines tbody th { font-weight: 600; white-space: nowrap; }
.lines tr { border: 0 !important; }
.lines td { min-width: 3.5em; overflow-wrap: break-word; }
.lines tr.chosen { background: var(--background-fill-secondary); box-shadow: inset 3px 0 var(--color-accent); }
</style>"""


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], chosen: str | None = None) -> str:
    """A table whose first column names the row; the row named `chosen` is marked."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headers)
    body = "".join(_row(row, row[0] == chosen) for row in rows)
    return (
        f'{STYLE}<div class="lines" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str], marked: bool) -> str:
    first, *rest = (escape(cell) for cell in cells)
    start = '<tr class="chosen" aria-current="true">' if marked else "<tr>"
    return f'{start}<th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
