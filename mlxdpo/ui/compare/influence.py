"""Which training pairs taught a word: a click on a token of an answer asks `mlxdpo influence` and shows what it finds.

The command is a process of its own, as all that loads a model a second time. The pairs can be dropped or flipped, by
the decisions that the Data tab keeps too. No postponed annotations: Gradio reads `gr.Request` off them.
"""

import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxdpo.inference.run_prompts import short_line, text_from_json, text_of
from mlxdpo.io.json_file import as_written, read_lines
from mlxdpo.io.words import counted
from mlxdpo.types import UserError
from mlxdpo.ui.data import audit
from mlxdpo.ui.data.view import number_of
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.jobs import job_html, spawn
from mlxdpo.ui.runs.run_list import JOB, choose, raw_settings, refuse_strange_code
from mlxdpo.ui.widgets import MANY, QUIET, Act, alert, connect_clicks, html_table, row_clicks, show_errors

if TYPE_CHECKING:
    from mlxdpo.ui.compare.tab import Chat

NAME = "influence"
TOP = 5  # pairs of each kind
EVERY = 1.0  # seconds between two looks at the process
ACTS = {name: word for name, word in audit.ACTS.items() if name != "keep"}
HEADERS = ("pair", "influence", "prompt", "chosen", "rejected", "decide")
TOKEN_CLICKS = """
const ask = (event) => {
  const token = event.target.closest('.tok'), answer = token && token.closest('.answer');
  if (!answer || String(getSelection()) || (event.key || 'Enter') !== 'Enter') return;
  const column = answer.closest('.voice'), at = (one, all) => [...all].indexOf(one);
  const place = [at(column, element.querySelectorAll('.voice')), at(answer, column.querySelectorAll('.answer')),
    at(token, answer.querySelectorAll('.tok'))];
  trigger('click', {row: place.join(','), act: ''});
};
element.addEventListener('click', ask);
element.addEventListener('keydown', ask);
"""


class AskedWord(NamedTuple):
    """A word of a first answer: the run that is asked, prompt, answer, word, and which occurrence of it is meant."""

    run: str
    prompt: str
    completion: str
    word: str
    occurrence: int


def asked_word(chat: "Chat", place: str) -> AskedWord:
    """The word at "column,exchange,token". Raises `UserError` for one that cannot be asked about."""
    if not re.fullmatch(r"\d{1,6},\d{1,6},\d{1,6}", place):
        raise UserError("this click names no word; reload the page")
    column, turn, token = map(int, place.split(","))
    if column > 1:
        raise UserError("the third column belongs to another model; click a word of the first two")
    if turn or chat.system:
        raise UserError("only the first answer of a chat without a system prompt can be asked about; start a new chat")
    try:
        exchange = chat.columns[column].exchanges[turn]
        pieces = [piece.text for piece in exchange.score.pieces] if exchange.score else []
        word = pieces[token].strip()
    except IndexError:
        raise UserError("this answer has changed; click the word again") from None
    if not word:
        raise UserError("this token is only space; click a word next to it")
    start = len("".join(pieces[:token])) + pieces[token].index(word)
    text = "".join(pieces)
    before = [found.start() for found in re.finditer(re.escape(word), text) if found.start() <= start]
    return AskedWord(chat.run, exchange.prompt, text, word, max(1, len(before)))


def start_influence(path: Path, asked: AskedWord) -> Path:
    """Begin `mlxdpo influence`; gives the file that it will write. Raises `UserError` where one is at work already."""
    if "\0" in asked.prompt + asked.completion:
        raise UserError("a text with NUL characters cannot be asked about; write another prompt")
    folder = path / JOB / NAME
    out = folder / f"pairs-{time.time_ns()}.jsonl"
    words = [f"--completion={asked.completion}", f"--part={asked.word}", f"--occurrence={asked.occurrence}"]
    command = ["mlxdpo", NAME, *words, f"--out={out}", "--", str(path), asked.prompt]
    refuse_strange_code(path, command)
    spawn(folder, command, f"a word of {path.name} is being asked about already; wait for it to end")
    for old in folder.glob("pairs-*.jsonl"):
        if old != out:
            old.unlink(missing_ok=True)
    return out


def training_file(path: Path) -> Path | None:
    """The run's data file where it is one on this machine, whose rows can be dropped and flipped."""
    section = raw_settings(path).get("data")
    source = section.get("path") if isinstance(section, dict) else None
    return Path(source) if isinstance(source, str) and isfile(source) else None


def taught(found: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The pairs that taught a word and those that taught against it, most first, `TOP` of each."""
    with as_written(found, "click the word again"):
        rows = list(read_lines(found))
        return [r for r in rows[:TOP] if r["influence"] > 0], [r for r in rows[::-1][:TOP] if r["influence"] < 0]


def influence_html(path: Path, found: Path, word: str) -> str:
    """Both lists with their buttons; what the process says until it has ended."""
    if not isfile(found):
        return job_html(path / JOB / NAME, f'Pairs that taught "{word}"', most=4)
    data = training_file(path)
    decided = audit.decisions_of(data) if data else {}

    def acts(row: str) -> list[Act]:
        """The buttons of a pair."""
        return [(act, name, decided.get(number_of(row)) == act) for act, name in ACTS.items()]

    titles = (f'Pairs that taught "{word}"', f'Pairs that taught against "{word}"')
    tables = [
        html_table(title, HEADERS, [_influence_cells(one) for one in ones], acts=acts if data else None)
        for title, ones in zip(titles, taught(found), strict=True)
        if ones
    ]
    return "".join(tables) or f"<p>No pair taught “{escape(word)}”, and none taught against it.</p>"


def _influence_cells(one: Mapping[str, Any]) -> list[str]:
    texts = [short_line(text_of(text_from_json(one[name]))) for name in ("prompt", "chosen", "rejected")]
    return [one["where"], f"{one['influence']:+.3f}", *texts]


def decide_pair(path: Path, found: Path, where: str, act: str) -> None:
    """Drop or flip a pair that is shown, or take that back. Raises `UserError` for others."""
    shown = [one["where"] for ones in taught(found) for one in ones]
    data = training_file(path)
    if data is None or act not in ACTS or where not in shown:
        raise UserError("no such pair or decision; click the word again")
    if act == "flip" and [number_of(one["where"]) for one in read_lines(found)].count(number_of(where)) > 1:
        raise UserError(f"{where} is one of several pairs of its row; flip it in a terminal: mlxdpo data audit {data}")
    audit.record_decisions(data, [number_of(where)], act)


def build_influence(gr: Any, runs: Path, guard: Guard, board: Any, chat: Any) -> None:
    """The panel below the answers in `board`."""
    about = gr.HTML(elem_id="compare-influence")
    listing = gr.HTML(elem_id="compare-taught", js_on_load=row_clicks("compare-influence"))
    write = gr.Button("Write the decided rows to a new file", visible=False, elem_id="compare-influence-write")
    now, timer = gr.State(None), gr.Timer(EVERY, active=False)

    def asked(row: str, _: str, chat: "Chat") -> Any:
        """A token was clicked."""
        wanted = asked_word(chat, row)
        path = choose(runs, wanted.run)
        found = start_influence(path, wanted)
        told = f"Pairs that taught “{wanted.word}”: one gradient for each training pair, kept for the next question."
        now = (str(path), str(found), wanted.word)
        return now, f'<p class="quiet" role="status">{escape(told)}</p>', *shown(now)

    def shown(now: Sequence[str] | None) -> Any:
        """The lists, the button once there are some, and whether to look again."""
        if now is None:
            return gr.skip(), gr.skip(), gr.skip()
        path, found, word = Path(now[0]), Path(now[1]), now[2]
        ended = isfile(found) or (path / JOB / NAME / "ended.json").exists()
        try:
            page = influence_html(path, found, word)
        except UserError as error:
            page = alert(error)
        return page, gr.update(visible=isfile(found) and training_file(path) is not None), gr.Timer(active=not ended)

    def decided(row: str, act: str, now: Sequence[str] | None) -> Any:
        """A pair's button was pressed."""
        if now is None or not act:
            return gr.skip()
        decide_pair(Path(now[0]), Path(now[1]), row, act)
        return influence_html(Path(now[0]), Path(now[1]), now[2])

    def saved(request: gr.Request, now: Sequence[str] | None) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Write the new file."""
        guard(request)
        with show_errors():
            data = training_file(Path(now[0])) if now else None
            if data is None:
                raise UserError("the run's data file is not here; choose another run")
            target, dropped, flipped = audit.write_audited(data)
        told = f"{target}: {counted(dropped, 'row')} dropped, {flipped} flipped; the original is unchanged."
        return f'<p role="status">{escape(told)}</p>'

    connect_clicks(board, asked, chat, [now, about, listing, write, timer], guard)
    timer.tick(shown, now, [listing, write, timer], **QUIET)
    connect_clicks(listing, decided, now, listing, guard)
    write.click(saved, now, about, **MANY)
