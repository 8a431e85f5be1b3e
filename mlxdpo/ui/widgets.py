"""What handlers of the page have in common: errors as sentences, the session's name."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any

from mlxdpo.types import UserError

# Tables as escaped HTML: they scroll inside themselves on a narrow screen and are read out as tables.
#
# Gradio's Dataframe draws a table at least as wide as its content, which on a phone widens the whole page.

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


def html_table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], chosen: str | None = None) -> str:
    """A table whose first column names the row; the row named `chosen` is marked."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headers)
    body = "".join(_table_row(row, row[0] == chosen) for row in rows)
    return (
        f'{STYLE}<div class="lines" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table_row(cells: Sequence[str], marked: bool) -> str:
    first, *rest = (escape(cell) for cell in cells)
    start = '<tr class="chosen" aria-current="true">' if marked else "<tr>"
    return f'{start}<th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


@contextmanager
def show_errors() -> Iterator[None]:
    """A `UserError` becomes the page's message. Gradio renders messages as HTML, so the sentence is escaped."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(escaped(str(error)), title="This did not work", duration=8, print_exception=False) from None


def showing_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose `UserError`s the page shows."""

    @wraps(function)
    def handler(*args: Any, **kwargs: Any) -> Any:
        """The function, its errors said."""
        with show_errors():
            return function(*args, **kwargs)

    return handler


def sorry(error: UserError) -> str:
    """An error where the answers would be: it says what to do, and stays until something is done."""
    return f'<p class="empty" role="alert">{escaped(str(error))}</p>'


def session_of(request: Any) -> str:
    """The name of a browser tab's session."""
    return str(request.session_hash or "")


def escaped(text: str) -> str:
    """Text as inert HTML."""
    return html.escape(text, quote=True)
