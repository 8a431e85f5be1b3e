"""The Constitution tab: look through what a model said of its own answers, and what became pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxdpo.types import UserError
from mlxdpo.ui.constitution import view
from mlxdpo.ui.constitution.view import ANY, EVERY, LEFT, PAIRED, TalkFilter
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.listing import connect_list, list_widgets, turned_page
from mlxdpo.ui.widgets import QUIET, alert, or_alert

CHOOSE = "<p>Choose a folder.</p>"
OPEN = "<p>Open a conversation by its number above.</p>"
NONE = (
    "<p>There is no folder here that <code>mlxdpo constitution MODEL --prompts FILE --out DIR</code> filled. Run it"
    " below the folder that the app was started in, and reload this page.</p>"
)


def build(runs: Path, guard: Guard) -> None:
    """Fill the tab. It only reads, so the guard has nothing to refuse here that it has not refused at the door."""
    import gradio as gr

    folder = gr.Dropdown([], label="Folder", elem_id="constitution-folder")
    with gr.Row():
        text = gr.Textbox(label="Search", placeholder="part of a text", elem_id="constitution-search")
        kind = gr.Radio([EVERY, PAIRED, LEFT], value=EVERY, label="Show")
        principle = gr.Dropdown([ANY], value=ANY, label="Principle")
    label, ends = "Conversation to open", ("Earlier", "Later")
    widgets = list_widgets(gr, "constitution", CHOOSE, ends, label, "constitution-number")
    with gr.Tab("Conversation"):
        talk = gr.HTML(OPEN, elem_id="constitution-talk")
    with gr.Tab("Constitution and report"):
        about = gr.HTML(elem_id="constitution-about")

    number = widgets.number
    gr.context.Context.root_block.load(lambda: _folder_choices(gr, runs), None, [folder, widgets.listing], **QUIET)
    opened = (lambda name: _folder_opened(gr, runs, name), [principle, number, about, widgets.page])
    connect_list(widgets, folder, [text, kind, principle], opened, lambda *now: listed(runs, *now))
    number.change(lambda *now: read(runs, *now), [folder, number], talk, **QUIET)


def _folder(runs: Path, name: str | None) -> Path:
    """The chosen folder, when it is one of those that were found. Raises `UserError` otherwise."""
    offered = view.found(runs, Path.cwd())
    if not name or name not in offered:
        raise UserError(f"there is no such folder {str(name)[:80]!r} here; choose one of the list")
    return offered[name]


def _folder_choices(gr: Any, runs: Path) -> Any:
    names = list(view.found(runs, Path.cwd()))
    return gr.update(choices=names), CHOOSE if names else NONE


def _folder_opened(gr: Any, runs: Path, name: str | None) -> Any:
    """Principles to choose from, no number, what the folder is, the first page."""
    if not name:
        return gr.update(choices=[ANY], value=ANY), None, "", 0
    try:
        folder = _folder(runs, name)
        names = [one.name for one in view.rules_of(folder).principles]
        return gr.update(choices=[ANY, *names], value=ANY), None, view.summary_html(folder), 0
    except UserError as error:
        return gr.update(choices=[ANY], value=ANY), None, alert(error), 0


def listed(runs: Path, move: int, *now: Any) -> tuple[str, int]:
    """The page of conversations, `move` pages on, and its number; `now` is what the form holds."""
    name, text, kind, principle, page, number = now  # a number field that is left empty arrives as 0
    if not name:
        return CHOOSE, 0
    try:
        talks = view.open_talks(_folder(runs, name))
    except UserError as error:
        return alert(error), 0
    shown = view.matching_talks(talks, TalkFilter(text or "", kind or EVERY, principle or ANY))
    page = turned_page(shown, page, move)
    return view.talks_html(talks, shown, page, number or None), page


@or_alert
def read(runs: Path, name: str | None, number: float | None) -> str:
    """One conversation in full."""
    if not name or not number:
        return OPEN
    folder = _folder(runs, name)
    return view.talk_html(view.open_talks(folder), int(number), view.rules_of(folder))
