"""A list to look through: searched, filtered, page by page, one entry of it opened by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mlxdpo.ui.widgets import QUIET, html_table

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
    page, listing = gr.State(0), gr.HTML(hint, elem_id=f"{tab}-rows")
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
        return f"<p>No {noun} fits. Clear the search, or make it wider.</p>"
    first = page * PAGE + 1
    caption = f"{noun.capitalize()}s {first:,} to {first + len(rows) - 1:,} of {len(found):,} found{limit}"
    return html_table(caption, headers, rows, None if chosen is None else str(chosen))


def holds_text(texts: Iterable[str], asked: str) -> bool:
    """Whether `asked` stands in one of the texts, in any case; nothing stands in all of them."""
    asked = asked.casefold()
    return not asked or any(asked in text.casefold() for text in texts)


def short(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 2 * WIDTH].split())
    return line if len(line) <= WIDTH and len(text) <= 2 * WIDTH else line[:WIDTH] + "…"
