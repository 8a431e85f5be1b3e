"""What the tabs share: tables, lists turned page by page, errors as sentences, the session's name, events.

Tables are escaped HTML: on a narrow screen each row becomes a card, and a row may open with a click. Gradio's Dataframe
draws a table at least as wide as its content, which on a phone widens the whole page. No postponed annotations: Gradio
reads `gr.EventData` off them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any, NamedTuple

from mlxdpo.machine.errors import error_message
from mlxdpo.types import UserError

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""An event without a progress bar that is not part of the API."""
MANY = QUIET | {"concurrency_limit": 8}
"""The same for several users at once."""
STYLE = """<style>
.lines { contain: inline-size; overflow: auto; max-height: 420px; }
.lines table { border: 0 !important; border-collapse: collapse; width: 100%; font-size: .92em;
  color: var(--body-text-color); }
.lines caption { text-align: left; font-weight: 600; padding-bottom: 4px; overflow-wrap: anywhere; }
.lines th, .lines td { text-align: left !important; padding: 5px 10px !important; vertical-align: top;
  border: 0 solid var(--border-color-primary) !important; border-bottom-width: 1px !important; }
.lines thead th { position: sticky; top: 0; background: var(--background-fill-primary); white-space: nowrap; }
.lines tbody th { font-weight: 600; white-space: nowrap; }
.lines tr { border: 0 solid var(--border-color-primary) !important; }
.lines td { min-width: 3.5em; overflow-wrap: break-word; }
.lines tr[data-row] { cursor: pointer; }
.lines tr[data-row]:hover { background: var(--background-fill-secondary); }
.lines button { font: inherit; color: inherit; background: none !important; border: 0 !important;
  padding: 0 !important; min-width: 0; cursor: pointer; }
.lines .open { font-weight: 600; text-align: left; text-decoration: underline; overflow-wrap: anywhere; }
.lines .acts { white-space: nowrap; }
.lines .acts button { padding: 2px 8px !important; margin: 0 4px 4px 0; border-radius: 6px;
  border: 1px solid currentColor !important; }
.lines .acts button[aria-pressed=true] { background: var(--body-text-color) !important;
  color: var(--background-fill-primary); }
@media (max-width: 640px) {
  .lines { max-height: 70vh; }
  .lines thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  .lines table, .lines caption, .lines tbody, .lines tr, .lines th, .lines td { display: block; }
  .lines tr { padding: 6px 0 !important; border-bottom-width: 1px !important; }
  .lines tbody th, .lines td { border: 0 !important; padding: 1px 6px !important; white-space: normal;
    overflow-wrap: anywhere; }
  .lines td:empty { display: none; }
  .lines td[data-name]::before { content: attr(data-name) ": "; color: var(--body-text-color-subdued); }
}
.lines tr.chosen { background: var(--background-fill-secondary); box-shadow: inset 3px 0 var(--color-accent); }
</style>"""


Act = tuple[str, str, bool]
"""A button of a row: its name, its word, whether it is pressed."""


def html_table(
    caption: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    chosen: str | None = None,
    *,
    opens: bool = False,
    acts: Callable[[str], Sequence[Act]] | None = None,
) -> str:
    """A table whose first column names the row; the row named `chosen` is marked.

    A click on a row that `opens`, or on one of its buttons (`acts`, of the row's name), reaches the
    handlers of `row_clicks`.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headers)
    body = ""
    for first, *rest in rows:
        named = zip(headers[1:], rest, strict=False)
        cells = "".join(f'<td data-name="{escape(name)}">{escape(cell)}</td>' for name, cell in named)
        if acts is not None:
            cells += f'<td class="acts">{"".join(_act_button(first, act) for act in acts(first))}</td>'
        title = f'<button type="button" class="open">{escape(first)}</button>' if opens else escape(first)
        marked = ' class="chosen" aria-current="true"' if first == chosen else ""
        row = f' data-row="{escape(first)}"' if opens or acts else ""
        body += f'<tr{marked}{row}><th scope="row">{title}</th>{cells}</tr>'
    return (
        f'{STYLE}<div class="lines" tabindex="0" role="group" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _act_button(row: str, act: Act) -> str:
    name, word, pressed = act
    return (
        f'<button type="button" data-act="{escape(name)}" aria-pressed="{str(pressed).lower()}"'
        f' aria-label="{escape(f"{word} row {row}")}">{escape(word)}</button>'
    )


def row_clicks(shows: str) -> str:
    """`js_on_load` of the HTML that holds a table: a click names its row, and what it opens, `shows`, comes into view.

    Marking a text in a row is no click on it.
    """
    return (
        "element.addEventListener('click', (event) => {"
        " const row = event.target.closest('tr[data-row]'), act = event.target.closest('[data-act]');"
        " if (!row || (String(getSelection()) && !event.target.closest('button'))) return;"
        " trigger('click', {row: row.dataset.row, act: act ? act.dataset.act : ''});"
        f" if (!act) document.getElementById('{shows}')?.scrollIntoView({{block: 'nearest', behavior: 'smooth'}});"
        "});"
    )


def clicked_row(event: Any) -> tuple[str, str]:
    """The row that was clicked and the button in it, "" for none. Raises `UserError` for what no page of ours sends."""
    sent = event._data if isinstance(event._data, dict) else {}
    row, act = sent.get("row"), sent.get("act")
    if not isinstance(row, str) or not isinstance(act, str):
        raise UserError("this click names no row; reload the page")
    return row, act


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
        raise gr.Error(escape(sentence), title="Something went wrong", duration=8, print_exception=False) from None


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


PAGE = 20  # entries shown at once
WIDTH = 90  # characters of a cell


class ListWidgets(NamedTuple):
    """The page's number, the list itself, the buttons that turn its pages, and the number of the entry to open."""

    page: Any
    listing: Any
    back: Any
    forth: Any
    number: Any


def list_widgets(gr: Any, tab: str, hint: str, ends: tuple[str, str], label: str, number_id: str) -> ListWidgets:
    """The widgets of a list, below its filters; `ends` are the words of the two buttons."""
    page, listing = gr.State(0), gr.HTML(hint, elem_id=f"{tab}-rows", js_on_load=row_clicks(f"{tab}-opened"))
    with gr.Row():
        back, forth = gr.Button(ends[0], size="sm"), gr.Button(ends[1], size="sm", elem_id=f"{tab}-later")
        number = gr.Number(None, label=label, precision=0, elem_id=number_id)
    return ListWidgets(page, listing, back, forth, number)


def connect_list(
    widgets: ListWidgets,
    chosen: Any,
    filters: Sequence[Any],
    opened: tuple[Callable[[str | None], Any], Sequence[Any]],
    listed: Callable[..., tuple[str, int]],
) -> None:
    """Show the list again when something else is `chosen`, filtered, paged or opened.

    `opened` is a handler of the choice with the widgets that it sets, the page among them. `listed(move, *values)`
    gives the list, `move` pages on, and its page, from the values of `chosen`, `filters`, the page and the number.
    """
    page, listing, back, forth, number = widgets
    browse: dict[str, Any] = {"inputs": [chosen, *filters, page, number], "outputs": [listing, page], **QUIET}
    again = lambda *now: listed(0, *now)  # noqa: E731
    chosen.change(opened[0], chosen, list(opened[1]), **QUIET).then(again, **browse)
    for widget in filters:
        widget.change(lambda *now: listed(0, *now[:-2], 0, now[-1]), **browse, trigger_mode="always_last")
    back.click(lambda *now: listed(-1, *now), **browse)
    forth.click(lambda *now: listed(1, *now), **browse)
    number.change(again, **browse)
    connect_clicks(listing, lambda row, act: row_number(row), None, number)


def row_number(row: str) -> int:
    """The number that names a row. Raises `UserError` for what is none."""
    if not (row.isdecimal() and len(row) < 16):
        raise UserError("this click names no row; reload the page")
    return int(row)


def connect_clicks(
    listing: Any, clicked: Callable[..., Any], inputs: Any, outputs: Any, guard: Callable[[Any], None] | None = None
) -> None:
    """Call `clicked(row, act, *values of inputs)` when a row of a table, or a button in it, is clicked.

    What a click writes asks the `guard` first.
    """
    import gradio as gr

    def handler(event: gr.EventData, request: gr.Request, *values: Any) -> Any:
        """What the click says, and the values."""
        if guard is not None:
            guard(request)
        with show_errors():
            return clicked(*clicked_row(event), *values)

    listing.click(handler, inputs, outputs, **MANY)


def turned_page(found: Sequence[int], page: int, move: int) -> int:
    """The page `move` pages on, kept within the entries found."""
    return max(0, min(page + move, (len(found) - 1) // PAGE))


def page_table(
    noun: str,
    headers: Sequence[str],
    cells: Callable[[int], Sequence[str]],
    found: Sequence[int],
    page: int,
    chosen: float | None,
    limit: str = "",
) -> str:
    """One page of the entries found, by their indices; the entry whose first cell is `chosen` is marked."""
    rows = [cells(at) for at in found[page * PAGE : (page + 1) * PAGE]]
    if not rows:
        return f"<p>No {noun} matches. Clear or widen the search.</p>"
    first = page * PAGE + 1
    caption = f"{noun.capitalize()}s {first:,} to {first + len(rows) - 1:,} of {len(found):,} found{limit}"
    return html_table(caption, headers, rows, None if chosen is None else str(chosen), opens=True)


def holds_text(texts: Iterable[str], asked: str) -> bool:
    """Whether `asked` stands in one of the texts, in any case; nothing stands in all of them."""
    asked = asked.casefold()
    return not asked or any(asked in text.casefold() for text in texts)


def short(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 2 * WIDTH].split())
    return line if len(line) <= WIDTH and len(text) <= 2 * WIDTH else line[:WIDTH] + "…"
