"""The Constitution tab: what a model said of its own answers, and what became pairs. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.json_file import as_written, read_json, read_lines
from mlxdpo.io.words import counted
from mlxdpo.online.constitution.run import REPORT, RULES, SETTINGS, TALKS, constitution_sentences
from mlxdpo.online.constitution.schema import Constitution, load_constitution
from mlxdpo.types import UserError
from mlxdpo.ui.choices import folders
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.widgets import (
    QUIET,
    alert,
    connect_list,
    holds_text,
    html_table,
    list_widgets,
    or_alert,
    page_table,
    short,
    turned_page,
)

CHOOSE = "<p>Choose a folder.</p>"
OPEN = "<p>Click a conversation above to open it.</p>"
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
    with gr.Tabs(elem_id="constitution-opened"):
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
    offered = found(runs, Path.cwd())
    if not name or name not in offered:
        raise UserError(f"there is no such folder {str(name)[:80]!r} here; choose one from the list")
    return offered[name]


def _folder_choices(gr: Any, runs: Path) -> Any:
    names = list(found(runs, Path.cwd()))
    return gr.update(choices=names), CHOOSE if names else NONE


def _folder_opened(gr: Any, runs: Path, name: str | None) -> Any:
    """Principles to choose from, no number, what the folder is, the first page."""
    if not name:
        return gr.update(choices=[ANY], value=ANY), None, "", 0
    try:
        folder = _folder(runs, name)
        names = [one.name for one in rules_of(folder).principles]
        return gr.update(choices=[ANY, *names], value=ANY), None, summary_html(folder), 0
    except UserError as error:
        return gr.update(choices=[ANY], value=ANY), None, alert(error), 0


def listed(runs: Path, move: int, *now: Any) -> tuple[str, int]:
    """The page of conversations, `move` pages on, and its number; `now` is what the form holds."""
    name, text, kind, principle, page, number = now  # a number field that is left empty arrives as 0
    if not name:
        return CHOOSE, 0
    try:
        talks = open_talks(_folder(runs, name))
    except UserError as error:
        return alert(error), 0
    shown = matching_talks(talks, TalkFilter(text or "", kind or EVERY, principle or ANY))
    page = turned_page(shown, page, move)
    return talks_html(talks, shown, page, number or None), page


@or_alert
def read(runs: Path, name: str | None, number: float | None) -> str:
    """One conversation in full."""
    if not name or not number:
        return OPEN
    folder = _folder(runs, name)
    return talk_html(open_talks(folder), int(number), rules_of(folder))


Talk = Mapping[str, Any]
EVERY, PAIRED, LEFT = "all", "pairs", "left out"
ANY = "any principle"
PARTS = {
    "initial": "Initial answer (rejected)",
    "critique": "Critique",
    "revision": "Revision (chosen)",
    "first": "First answer",
    "second": "Second answer",
}
STYLE = """<style>
.talk { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); max-height: 320px; overflow: auto; }
</style>"""


class TalkFilter(NamedTuple):
    """A filter: `text` anywhere (any case), whether there is a pair, the principle of the critique."""

    text: str = ""
    kind: str = EVERY
    principle: str = ANY


def found(runs: Path, top: Path) -> dict[str, Path]:
    """Folders that `mlxdpo constitution` filled, below the working folder and below the runs, by name."""
    result: dict[str, Path] = {}
    for start in (top, runs):
        for folder, names in folders(start):
            if TALKS in names and SETTINGS in names and RULES in names:
                name = folder.relative_to(top).as_posix() if folder.is_relative_to(top) else str(folder)
                result.setdefault(name, folder)
    return result


def open_talks(folder: Path) -> tuple[Talk, ...]:
    """The conversations so far; a run that still works on them may have more the next time."""
    file = folder / TALKS
    if not file.is_file():
        raise UserError(f"{folder.name}: its {TALKS} no longer exists; reload the page")
    about = file.stat()
    return _read_talks(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=2)
def _read_talks(file: Path, modified: int, size: int) -> tuple[Talk, ...]:
    return tuple(read_lines(file))


def rules_of(folder: Path) -> Constitution:
    """The constitution as it was used."""
    return load_constitution(folder / RULES)


def matching_talks(talks: Sequence[Talk], wanted: TalkFilter) -> list[int]:
    """Indices of the conversations that fit."""
    return [at for at, talk in enumerate(talks) if _talk_fits(talk, wanted)]


def _talk_fits(talk: Talk, wanted: TalkFilter) -> bool:
    if wanted.kind != EVERY and bool(talk["left_out"]) != (wanted.kind == LEFT):
        return False
    if wanted.principle != ANY and talk.get("principle") != wanted.principle:
        return False
    return holds_text((talk_prompt(talk), *(talk[part]["text"] for part in PARTS if part in talk)), wanted.text)


def talk_prompt(talk: Talk) -> str:
    """The turns of the prompt; a single one as it stands."""
    turns = talk["prompt"]
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{t['role']}: {t['content']}" for t in turns)


def talks_html(talks: Sequence[Talk], shown: Sequence[int], page: int, chosen: int | None = None) -> str:
    """One page of the conversations found, numbered from 1 as they stand in the file."""
    headers = ["number", "prompt", "principle", "before", "after", "label", "left out"]
    return page_table("conversation", headers, lambda at: _talk_cells(at, talks[at]), shown, page, chosen)


def _talk_cells(at: int, talk: Talk) -> list[str]:
    old, new = (talk.get(a) or talk.get(b) or {} for a, b in (("initial", "first"), ("revision", "second")))
    p = talk.get("probability")
    label = "" if p is None else f"{p:.3f}"
    texts = (short(old.get("text", "")), short(new.get("text", "")))
    return [str(at + 1), short(talk_prompt(talk)), talk.get("principle", ""), *texts, label, talk["left_out"]]


def talk_html(talks: Sequence[Talk], number: int, rules: Constitution) -> str:
    """A conversation in full: everything that was asked and said, and what each principle says of the two answers.

    Raises `UserError` when there is none of that number.
    """
    if not 1 <= number <= len(talks):
        raise UserError(f"there is no conversation {number}; there are {len(talks)}")
    talk = talks[number - 1]
    drawn = next((one for one in rules.principles if one.name == talk.get("principle")), None)
    asked = {"critique": drawn.critique, "revision": drawn.revision} if drawn else {}
    parts = [_part("Prompt", talk_prompt(talk))]
    for part, title in PARTS.items():
        if part in talk:
            request = f"<p><em>{escape(asked[part])}</em></p>" if part in asked else ""
            parts.append(_part(f"{title}{_remark(talk[part])}", talk[part]["text"], request))
    why = f"<p role='status'>No pair: {escape(talk['left_out'])}</p>" if talk["left_out"] else ""
    return f"{STYLE}{why}{''.join(parts)}{_votes(talk)}"


def _remark(reply: Mapping[str, Any]) -> str:
    cut = ", cut off" if reply["finish"] == "length" else ""
    return f": {counted(reply['tokens'], 'token')}{cut}"


def _part(title: str, text: str, request: str = "") -> str:
    return f'<h4>{escape(title)}</h4>{request}<div class="talk" tabindex="0">{escape(text)}</div>'


def _votes(talk: Talk) -> str:
    if "votes" not in talk:
        return ""
    better = "the revision" if "revision" in talk else "the first answer"
    rows = [
        [name, f"{vote['shown_first']:+.2f}", f"{vote['shown_second']:+.2f}", f"{vote['probability']:.3f}"]
        for name, vote in talk["votes"].items()
    ]
    rows.append(["all", "", "", f"{talk['probability']:.3f}"])
    headers = ["principle", "log-odds, shown as A", "log-odds, shown as B", "probability"]
    return html_table(f"How probably {better} is the better one", headers, rows)


def summary_html(folder: Path) -> str:
    """The report of a finished run as a list, and the principles."""
    file = folder / REPORT
    if not file.is_file():
        lines = ["not finished: the same command resumes it"]
    else:
        report = read_json(file)
        with as_written(file):
            lines = [
                f"{counted(report['rows'], 'pair')} from {counted(report['prompts'], 'prompt')}",
                *constitution_sentences(report),
            ]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    rows = [[one.name, one.critique, one.revision, one.comparison] for one in rules_of(folder).principles]
    return f"<ul>{items}</ul>{html_table('The constitution', ['name', 'critique', 'revision', 'comparison'], rows)}"
