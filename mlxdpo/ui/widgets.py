"""What the tabs have in common: tables, errors as sentences, the session's name, how events are declared.

Tables are escaped HTML: they scroll inside themselves on a narrow screen and are read out as tables. Gradio's Dataframe
draws a table at least as wide as its content, which on a phone widens the whole page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any

from mlxdpo.machine.errors import error_message
from mlxdpo.types import UserError

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""An event that shows no progress of its own and is no part of the API."""
MANY = QUIET | {"concurrency_limit": 8}
"""The same for several users at once."""
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
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        marked = ' class="chosen" aria-current="true"' if first == chosen else ""
        body += f'<tr{marked}><th scope="row">{escape(first)}</th>{cells}</tr>'
    return (
        f'{STYLE}<div class="lines" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


@contextmanager
def show_errors() -> Iterator[None]:
    """A `UserError`, or what the machine refused, becomes the page's message; as a decorator, that of a handler.

    Gradio renders messages as HTML, so the sentence is escaped.
    """
    import gradio as gr

    try:
        yield
    except (UserError, RuntimeError, MemoryError) as error:
        sentence = str(error) if isinstance(error, UserError) else error_message(error)
        if sentence is None:
            raise
        raise gr.Error(escape(sentence), title="This did not work", duration=8, print_exception=False) from None


def alert(error: UserError, css: str = "") -> str:
    """An error where the answer would be, of a CSS class: it says what to do, and stays until something is done."""
    shown = f' class="{css}"' if css else ""
    return f'<p{shown} role="alert">{escape(str(error))}</p>'


def or_alert(function: Callable[..., str]) -> Callable[..., str]:
    """A function that gives HTML; its `UserError` as an alert instead."""

    @wraps(function)
    def shown(*args: Any, **kwargs: Any) -> str:
        """The HTML, or the alert."""
        try:
            return function(*args, **kwargs)
        except UserError as error:
            return alert(error)

    return shown


def session_of(request: Any) -> str:
    """The name of a browser tab's session."""
    return str(request.session_hash or "")
