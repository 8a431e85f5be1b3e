"""The Data tab: browse and search a preference file, the doctor's findings, edit a pair, see it as the model does."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data.findings import FLAGS
from mlxdpo.data.report import BadRow
from mlxdpo.io.words import counted
from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.data import audit, view
from mlxdpo.ui.data.view import ANY, FIELDS, RowFilter
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.jobs import job_html, written_at
from mlxdpo.ui.runs.run_list import choose, scan
from mlxdpo.ui.widgets import (
    QUIET,
    alert,
    connect_clicks,
    connect_list,
    list_widgets,
    or_alert,
    row_clicks,
    row_number,
    show_errors,
    turned_page,
)

AS_RUN = "as run "
EVERY = 2.0  # seconds between looks at an audit
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
        _audit_tab(gr, runs, guard, file)

    number, shown = widgets.number, gr.State(None)

    def saved(request: gr.Request, name: str, row: Any, *texts: str) -> Any:
        """Save the row, and show the file that holds it now."""
        guard(request)
        with show_errors():
            target = _save_edit(runs, name, row, texts)
        words = f"<p role='status'>Saved in {escape(str(target))}; the original is unchanged.</p>"
        files = choices.data_files(runs, Path.cwd())
        mine = next((one for one in files if Path(one).resolve() == target.resolve()), None)
        return gr.update(choices=files, value=mine), words

    gr.context.Context.root_block.load(lambda: _file_choices(gr, runs), None, [file, model, widgets.listing], **QUIET)
    opened = (lambda name: _file_opened(gr, runs, name), [column, number, findings, widgets.page])
    connect_list(widgets, file, [text, column, least, most], opened, lambda *now: listed_rows(runs, *now))
    number.change(lambda *now: _row_opened(gr, runs, *now), [file, number], [shown, into, keep, *boxes], **QUIET)
    for happening in (number.change, model.change):
        happening(lambda *now: _seen(runs, *now), [file, number, model], seen, **QUIET)
    check.click(lambda name: _doctor_findings(runs, name), file, findings, **QUIET)
    keep.click(saved, [file, shown, *boxes], [file, news], **QUIET)


def _audit_tab(gr: Any, runs: Path, guard: Guard, file: Any) -> None:
    """What an audit found in each row, and the buttons that decide."""
    with gr.Tab("Audit"):
        with gr.Row():
            model = gr.Dropdown([], label="Model", info="The one that will be trained.", elem_id="data-audit-model")
            wanted = gr.Dropdown([audit.ANY, *FLAGS, audit.EVERY], value=audit.ANY, label="Show rows with")
        begin = gr.Button("Audit the whole file", elem_id="data-audit")
        status = gr.HTML(elem_id="data-audit-status")
        listing = gr.HTML(
            "<p>Choose a file above.</p>", elem_id="data-audit-rows", js_on_load=row_clicks("data-opened")
        )
        with gr.Row():
            all_rows = [gr.Button(f"{word} all shown", size="sm") for word in audit.ACTS.values()]
        write = gr.Button("Write the decided rows to a new file", variant="primary", elem_id="data-audit-write")
        written = gr.HTML(elem_id="data-audit-written")
    before = gr.State(None)

    def started(request: gr.Request, name: str | None, which: str | None) -> str:  # pyright: ignore[reportInvalidTypeForm]
        """Begin the audit."""
        guard(request)
        with show_errors():
            path = _path(runs, name)
            offered = choices.models(runs, Path.cwd())
            chosen = choices.checked_choice(which, offered, "the model", choices.NOTHING)
            if chosen is None:
                raise UserError("choose the model that will be trained first")
            audit.start_audit(runs, path, chosen)
        return job_html(audit.audit_folder(runs, path), "Audit")

    def decided(act: str, numbers: Sequence[int] | None, name: str | None, kind: str) -> str:
        """Keep a decision on one row, or on all shown."""
        path = _path(runs, name)
        audit.decide(path, audit.shown_rows(audit.findings_of(path), kind) if numbers is None else numbers, act)
        return _findings_html(runs, name, kind)

    def saved(request: gr.Request, name: str | None) -> str:  # pyright: ignore[reportInvalidTypeForm]
        """Write the new file."""
        guard(request)
        with show_errors():
            target, dropped, flipped = audit.write_audited(_path(runs, name))
        words = f"{target}: {counted(dropped, 'row')} dropped, {flipped} flipped; the original is unchanged."
        return f'<p role="status">{escape(words)}</p>'

    page, timer = gr.context.Context.root_block, gr.Timer(EVERY)
    page.load(lambda: gr.update(choices=choices.models(runs, Path.cwd())), None, model, **QUIET)
    for happening in (file.change, wanted.change, timer.tick):
        happening(partial(_audit_changes, gr, runs), [file, wanted, before], [before, status, listing], **QUIET)
    begin.click(started, [file, model], status, concurrency_limit=1, **QUIET)
    write.click(saved, file, written, **QUIET)
    one_row = lambda row, act, *now: decided(act, [row_number(row)], *now)  # noqa: E731
    connect_clicks(listing, one_row, [file, wanted], listing, guard)
    for act, button in zip(audit.ACTS, all_rows, strict=True):
        button.click(_deciding(gr, guard, decided, act), [file, wanted], listing, **QUIET)


def _deciding(gr: Any, guard: Guard, decided: Any, act: str) -> Any:
    def handler(request: gr.Request, *now: Any) -> str:  # pyright: ignore[reportInvalidTypeForm]
        """Decide on all rows that are shown."""
        guard(request)
        with show_errors():
            return decided(act, None, *now)

    return handler


def _audit_changes(gr: Any, runs: Path, name: str | None, kind: str, last: Sequence[Any] | None) -> Any:
    """Process and findings, where something has changed: findings are not read at every tick."""
    if not name:
        return (gr.skip(),) * 3
    files = audit.files_of(Path(name)) if name in choices.data_files(runs, Path.cwd()) else ()
    now = (
        name,
        kind,
        [written_at(file) for file in files],
        job_html(audit.audit_folder(runs, Path(name)), "Audit"),
    )
    if last is not None and list(now) == list(last):
        return (gr.skip(),) * 3
    same = last is not None and list(now[:3]) == list(last[:3])
    return now, now[3], gr.skip() if same else _findings_html(runs, name, kind)


def _findings_html(runs: Path, name: str | None, kind: str) -> str:
    try:
        path = _path(runs, name)
        book = view.open_book(path)
    except UserError as error:
        return alert(error)
    rows = {view.number_of(where): row for where, row in book.rows if not isinstance(row, BadRow)}
    return audit.audit_view(path, rows, kind)


def _path(runs: Path, name: str | None) -> Path:
    """The chosen file, when it is one of those that were found. Raises `UserError` otherwise."""
    if not name or name not in choices.data_files(runs, Path.cwd()):
        raise UserError(f"there is no data file {str(name)[:80]!r} here; choose one from the list")
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
    words = "Saving continues in" if target == book.path else "Saving makes the new file"
    into = f"<p>{words} <code>{escape(str(target))}</code>; every other row is copied unchanged.</p>"
    button = gr.update(visible=True, value=f"Save into {target.name}")
    return (where, row), into, button, *boxes, *none[len(boxes) :]


def _save_edit(runs: Path, name: str, shown: Any, texts: tuple[str, ...]) -> Path:
    if shown is None:
        raise UserError("no row is open; click one first")
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
        raise UserError(f"{where}: {row.sentence}; fix it in a text editor")
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
