"""The Compare tab: its widgets and what they call. No postponed annotations: Gradio reads `gr.Request` off them."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlxdpo.reopen import prompt_text
from mlxdpo.types import UserError
from mlxdpo.ui.answers import LONGEST_PROMPT, Settings, settings_from
from mlxdpo.ui.columns import Column, columns_html
from mlxdpo.ui.compare import Chat, chat_html, converse
from mlxdpo.ui.desk import NOBODY, Desk
from mlxdpo.ui.gallery import label, text_of
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.handlers import said, saying, session_of
from mlxdpo.ui.heat import plain

WELCOME = (
    "Write a prompt and press Enter, or take one that training never saw: the model before and after tuning answers "
    "at the same time, with the same seed and settings."
)
NO_RUNS = (
    "No tuned run here yet. Make one with `mlxdpo demo` (minutes, offline) or in the Train tab, then reload this page."
)


def welcome(desk: Desk) -> str:
    """The empty columns, or what to do where there is no run."""
    if not desk.names():
        return f'<p class="empty">{plain(NO_RUNS)}</p>'
    return columns_html([Column("Before tuning", ""), Column("After tuning", "")], WELCOME)


def prompt_choices(desk: Desk, name: str | None) -> tuple[list[tuple[str, int]], str]:
    """(label, index) of the held-out prompts of a run, and a note where there are none."""
    if not name:
        return [], ""
    found = desk.gallery(name)
    return [(label(row), i) for i, row in enumerate(found.heldout)], found.note


def picked(desk: Desk, name: str | None, index: int | None) -> tuple[str, str]:
    """A held-out prompt, and its chosen and rejected answers as HTML."""
    rows = desk.gallery(name).heldout if name else ()
    if index is None or not 0 <= int(index) < len(rows):
        return "", ""
    row = rows[int(index)]
    pair = [("Chosen in the data", row.chosen), ("Rejected in the data", row.rejected)]
    cards = "".join(
        f'<section class="voice"><h3>{name}</h3><div class="answer">{plain(text_of(text))}</div></section>'
        for name, text in pair
    )
    heading = '<p class="quiet">What the data have for the prompt picked above:</p>'
    return prompt_text(row.prompt), f'{heading}<div class="voices small">{cards}</div>'


def random_index(desk: Desk, name: str | None) -> int:
    """One of the held-out prompts. Raises `UserError` where there are none."""
    found = desk.gallery(name).heldout if name else ()
    if not found:
        note = desk.gallery(name).note if name else "choose a run first"
        raise UserError(f"no held-out prompts: {note}; write a prompt of your own")
    return random.randrange(len(found))


def _without_last(chat: Chat) -> tuple[Chat, str]:
    """The chat before its last exchange, and what was said in it. Raises `UserError` when nothing was said."""
    if not chat.columns or not chat.columns[0].exchanges:
        raise UserError("nothing to draw again yet; send a prompt first")
    columns = tuple(column._replace(exchanges=column.exchanges[:-1]) for column in chat.columns)
    return replace(chat, columns=columns), chat.columns[0].exchanges[-1].said


def build(desk: Desk, guard: Guard, page: Any) -> Any:
    """Make the tab inside the current `gr.Tab`; returns the run's dropdown."""
    import gradio as gr

    names = desk.names()
    first = names[0] if names else None
    chat = gr.State(Chat())
    with gr.Row():
        run = gr.Dropdown(names, value=first, label="Run", elem_id="compare-run")
        third = gr.Dropdown(desk.thirds(first), value=NOBODY, label="Third column", elem_id="compare-third")
    choices, note = prompt_choices(desk, first)
    with gr.Row(equal_height=True, elem_classes="buttons"):
        pick = gr.Dropdown(
            choices, value=None, label="A prompt that training never saw", info=note, elem_id="compare-pick", scale=5
        )
        chance = gr.Button("Random one", elem_id="compare-random", min_width=110)
    text = gr.Textbox(
        label="Prompt", placeholder="Enter sends, Shift+Enter starts a new line", lines=1, max_lines=8,
        max_length=LONGEST_PROMPT, elem_id="compare-prompt", autofocus=True,
    )  # fmt: skip
    with gr.Row(elem_classes="buttons"):
        send = gr.Button("Send", variant="primary", elem_id="compare-send", min_width=90)
        stop = gr.Button("Stop", elem_id="compare-stop", min_width=90)
        again = gr.Button("Next seed", elem_id="compare-again", min_width=90)
        new = gr.Button("New chat", elem_id="compare-new", min_width=90)
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(label="System prompt (chat models)", max_length=LONGEST_PROMPT, elem_id="compare-system")
        knobs = knobs_of(gr, "compare", Settings(max_tokens=_tokens(desk, first)))
    board = gr.HTML(welcome(desk), elem_id="columns", elem_classes="board")
    pair = gr.HTML(elem_id="compare-pair")

    def answer(history: Chat, name: str, guest: str, prompt: str, system: str, *values: Any) -> Iterator[Any]:
        request, values = values[-1], values[:-1]
        settings = settings_from(**dict(zip(knobs, values, strict=True)))
        with desk.stoppable(session_of(request)) as halt:
            yield history, gr.skip(), '<p class="empty" role="status">Loading the model …</p>' + chat_html(history)
            for grown in converse(desk, history, name, guest, prompt or "", system or "", settings, halt.is_set):
                yield grown, "", chat_html(grown)

    def on_send(history, name, guest, prompt, system, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        guard(request)
        with said():
            for shown in answer(history, name, guest, prompt, system, t, p, n, seed, request):
                yield *shown, seed

    def on_again(history, name, guest, system, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        guard(request)
        with said():
            shorter, prompt = _without_last(history)
            following = (seed or 0) + 1
            for grown, _, html in answer(shorter, name, guest, prompt, system, t, p, n, following, request):
                yield grown, gr.skip(), html, following

    def on_stop(request: gr.Request) -> None:
        desk.stop(session_of(request))

    def on_run(name: str):  # type: ignore[no-untyped-def]
        choices, note = prompt_choices(desk, name)
        return (
            Chat(), welcome(desk), gr.Dropdown(desk.thirds(name), value=NOBODY),
            gr.Dropdown(choices, value=None, info=note), "", _tokens(desk, name),
        )  # fmt: skip

    def on_load():  # type: ignore[no-untyped-def]
        names = desk.names()
        return gr.Dropdown(names, value=names[0] if names else None)

    sent = [chat, run, third, text, system, *knobs.values()]
    outputs = [chat, text, board, knobs["seed"]]
    many: dict[str, Any] = {"concurrency_limit": 8, "api_visibility": "private", "show_progress": "hidden"}
    gr.on([text.submit, send.click], on_send, sent, outputs, **many)
    again.click(on_again, [chat, run, third, system, *knobs.values()], outputs, **many)
    stop.click(on_stop, None, None, **many)
    new.click(lambda: (Chat(), welcome(desk)), None, [chat, board], **many)
    third.change(lambda: (Chat(), welcome(desk)), None, [chat, board], **many)
    run.change(saying(on_run), run, [chat, board, third, pick, pair, knobs["max_tokens"]], **many)
    pick.change(saying(lambda name, i: picked(desk, name, i)), [run, pick], [text, pair], **many)
    chance.click(saying(lambda name: random_index(desk, name)), run, pick, **many)
    page.load(on_load, None, run, **many)
    return run


def _tokens(desk: Desk, name: str | None) -> int:
    return desk.gallery(name).tokens if name else 128


def knobs_of(gr: Any, where: str, start: Settings) -> dict[str, Any]:
    """The widgets of `Settings`, in the order of its fields."""
    with gr.Row():
        temperature = gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature", elem_id=f"{where}-temperature")
        top_p = gr.Slider(0.05, 1, start.top_p, step=0.05, label="Top-p", elem_id=f"{where}-top-p")
        tokens = gr.Slider(1, 1024, start.max_tokens, step=1, label="Max tokens", elem_id=f"{where}-tokens")
        seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id=f"{where}-seed")
    return {"temperature": temperature, "top_p": top_p, "max_tokens": tokens, "seed": seed}
