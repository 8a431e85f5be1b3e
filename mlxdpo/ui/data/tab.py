"""The Data tab: browse and search a preference file, the doctor's findings, edit a pair, see it as the model does."""

from collections.abc import Mapping
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow
from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.data import view
from mlxdpo.ui.data.view import ANY, FIELDS, RowFilter
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.run_list import choose, scan
from mlxdpo.ui.widgets import QUIET, alert, connect_list, list_widgets, or_alert, show_errors, turned_page

AS_RUN = "as run "
CHOOSE = "<p>Choose a file.</p>"
OPEN = "<p>Click a row above to open it.</p>"
NO_DATA = (
    "<p>There is no data file below the folder that the app was started in. Put a file such as pairs.jsonl there and"
    " reload this page.</p>"
)


def build(runs: Path, guard: Guard) -> None:
    """Fill the tab."""
    import gradio as gr

    file = gr.Dropdown([], label="Preference file", elem_id="data-file")
    with gr.Row():
        text = gr.Textbox(label="Search", placeholder="part of a text", elem_id="data-search")
        column = gr.Dropdown([ANY], value=ANY, label="In column")
        least = gr.Number(0, label="Characters, at least", precision=0)
        most = gr.Number(0, label="Characters, at most (0: any)", precision=0)
    widgets = list_widgets(gr, "data", CHOOSE, ("Earlier rows", "Later rows"), "Row to open", "data-row")
    with gr.Tabs(elem_id="data-opened"):
        with gr.Tab("Edit"):
            boxes = [gr.Textbox(visible=False, lines=4, elem_id=f"data-field-{n}") for n in range(FIELDS)]
            into = gr.HTML(OPEN, elem_id="data-into")
            keep = gr.Button("Save", visible=False, elem_id="data-save")
            news = gr.HTML(elem_id="data-news")  # its own place: choosing the new file closes the row
        with gr.Tab("As the model sees it"):
            model = gr.Dropdown([], label="Seen by", info="A run: with its model and settings.", elem_id="data-model")
            seen = gr.HTML(OPEN, elem_id="data-seen")
        with gr.Tab("Check"):
            check = gr.Button("Check the whole file", elem_id="data-check")
            findings = gr.HTML(elem_id="data-findings")

    number, shown = widgets.number, gr.State(None)

    def saved(request: gr.Request, name: str, row: Any, *texts: str) -> Any:
        """Save the row, and show the file that holds it now."""
        guard(request)
        with show_errors():
            target = _save_edit(runs, name, row, texts)
        words = f"<p role='status'>Saved in {escape(str(target))}; the original is as it was.</p>"
        files = choices.data_files(runs, Path.cwd())
        mine = next((one for one in files if Path(one).resolve() == target.resolve()), None)
        return gr.update(choices=files, value=mine), words

    gr.context.Context.root_block.load(lambda: _file_choices(gr, runs), None, [file, model, widgets.listing], **QUIET)
    opened = (lambda name: _file_opened(gr, runs, name), [column, number, findings, widgets.page])
    connect_list(widgets, file, [text, column, least, most], opened, lambda *now: listed_rows(runs, *now))
    number.change(lambda *now: _row_opened(gr, runs, *now), [file, number], [shown, into, keep, *boxes], **QUIET)
    for happening in (number.change, model.change):
        happening(lambda *now: _seen(runs, *now), [file, number, model], seen, **QUIET)
    check.click(lambda name: _doctor_findings(runs, name), file, findings, api_visibility="private")
    keep.click(saved, [file, shown, *boxes], [file, news], api_visibility="private")


def _path(runs: Path, name: str | None) -> Path:
    """The chosen file, when it is one of those that were found. Raises `UserError` otherwise."""
    if not name or name not in choices.data_files(runs, Path.cwd()):
        raise UserError(f"there is no data file {str(name)[:80]!r} here; choose one of the list")
    if not Path(name).is_file():
        raise UserError(f"{name} is on the Hub; look at it with: mlxdpo data check {name}")
    return Path(name)


def _file_choices(gr: Any, runs: Path) -> Any:
    files = [name for name in choices.data_files(runs, Path.cwd()) if Path(name).is_file()]
    seers = [AS_RUN + name for name, path in scan(runs).items() if (path / "manifest.json").exists()]
    models = [m for m in choices.models(runs, Path.cwd()) if m == "smollm2" or Path(m).is_dir()]
    hint = CHOOSE if files else NO_DATA
    return gr.update(choices=files), gr.update(choices=[*seers, *models], value=[*seers, *models][0]), hint


def _file_opened(gr: Any, runs: Path, name: str | None) -> Any:
    try:
        columns = view.columns_of(view.open_book(_path(runs, name))) if name else []
    except UserError:
        columns = []  # the list below says why
    return gr.update(choices=[ANY, *columns], value=ANY), None, "", 0


def listed_rows(runs: Path, move: int, *now: Any) -> tuple[str, int]:
    """The page of rows, `move` pages on, and its number; `now` is what the form holds."""
    name, text, column, least, most, page, number = now  # a number field that is left empty arrives as 0
    if not name:
        return CHOOSE, 0
    try:
        book = view.open_book(_path(runs, name))
    except UserError as error:
        return alert(error), 0
    found = view.matching_rows(book, RowFilter(text or "", column or ANY, least or None, most or None))
    page = turned_page(found, page, move)
    return view.rows_html(book, found, page, number), page


def _row_opened(gr: Any, runs: Path, name: str | None, number: int | None) -> Any:
    """The row to remember, where an edit goes, the button, and the fields."""
    none = [gr.update(visible=False)] * FIELDS
    if not name or not number:
        return None, OPEN, gr.update(visible=False), *none
    try:
        book, where, row = _sound_row(runs, name, number)
    except UserError as error:
        return None, alert(error), gr.update(visible=False), *none
    fields = view.fields_of(book, row)
    boxes = [gr.update(visible=True, label=label, value=value) for label, value in fields]
    target = view.target_of(book.path)
    words = "Goes on in" if target == book.path else "Saving makes the new file"
    into = f"<p>{words} <code>{escape(str(target))}</code>; every other row is copied as it stands.</p>"
    button = gr.update(visible=True, value=f"Save into {target.name}")
    return (where, row), into, button, *boxes, *none[len(boxes) :]


def _save_edit(runs: Path, name: str, shown: Any, texts: tuple[str, ...]) -> Path:
    if shown is None:
        raise UserError("no row is open; open one by its number first")
    where, row = shown
    book = view.open_book(_path(runs, name))
    new = view.edited_row(book, where, row, texts)
    if new == row:
        raise UserError(f"{where}: nothing was changed, so nothing was saved")
    return view.save_row(book.path, where, row, new)


@or_alert
def _seen(runs: Path, name: str | None, number: int | None, seer: str | None) -> str:
    """The opened pair as the chosen model or run sees it."""
    if not name or not number or not seer:
        return OPEN
    book, where, row = _sound_row(runs, name, number)
    pair, count = view.preference(book, where, row)
    return view.as_seen(pair, count, *_encoding_of(runs, seer))


def _sound_row(runs: Path, name: str, number: int) -> tuple[view.Book, str, Mapping[str, Any]]:
    """A file, and where its row of that number stands. Raises `UserError` for a row that cannot be read."""
    book = view.open_book(_path(runs, name))
    where, row = view.row_at(book, number)
    if isinstance(row, BadRow):
        raise UserError(f"{where}: {row.sentence}; mend it in a text editor")
    return book, where, row


def _encoding_of(runs: Path, seer: str) -> tuple[DataConfig, Any]:
    """How a row is encoded, and the tokenizer: a run's, or a model's with the settings that a recipe starts from."""
    if seer.startswith(AS_RUN):
        from mlxdpo.runs import Run

        config = Run.open(choose(runs, seer.removeprefix(AS_RUN))).config()
        return config.data, _cached_tokenizer(config.model.path, config.model.revision)
    model = choices.checked_choice(seer, choices.models(runs, Path.cwd()), "the model", choices.NOTHING)
    return DataConfig(), _cached_tokenizer(model or "", None)


@lru_cache(maxsize=4)
def _cached_tokenizer(model: str, revision: str | None) -> Any:
    from mlxdpo.model.policy import find_model, load_tokenizer

    return load_tokenizer(find_model(model, revision), model)


@or_alert
def _doctor_findings(runs: Path, name: str | None) -> str:
    return view.doctor(_path(runs, name))
