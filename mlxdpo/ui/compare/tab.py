"""The Compare tab: one prompt, answers before and after tuning, several turns, numbers afterwards.

No postponed annotations: Gradio reads `gr.Request` off them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from types import SimpleNamespace
from typing import Any, NamedTuple

from mlxdpo.inference.run_prompts import one_line, text_of
from mlxdpo.inference.trained_run import prompt_text
from mlxdpo.types import Text, UserError
from mlxdpo.ui.compare.answers import (
    LONGEST_PROMPT,
    Answer,
    Settings,
    answer_together,
    chat_prompt,
    score,
    settings_from,
)
from mlxdpo.ui.compare.columns import TUNED, Column, Exchange, columns_html
from mlxdpo.ui.compare.influence import TOKEN_CLICKS, build_influence
from mlxdpo.ui.engine import NOBODY, AppState
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.variants import RunVariants, Variant
from mlxdpo.ui.widgets import MANY, alert, session_of, show_errors

PACE = 0.12  # seconds between two updates of the page
DRIFT = "Reward and KL say how far tuning moved the model on these words, not which answer is better: vote for that."


@dataclass(frozen=True)
class Chat:
    """A conversation with all variants at once. It belongs to one run and one third variant."""

    run: str = ""
    third: str = NOBODY
    system: str = ""
    strength: float = 1.0
    columns: tuple[Column, ...] = ()


class ColumnVariants(NamedTuple):
    """The variants of the columns, and by which policy each column's answers are scored."""

    loaded: RunVariants
    variants: tuple[Variant, ...]
    judges: tuple[Variant, ...]


def column_variants(app: AppState, name: str | None, third: str, strength: float = 1.0) -> ColumnVariants:
    """Who answers: before, after at a strength, and perhaps a third. The first two are scored by the tuned model."""
    loaded = app.at_strength(app.load(name), strength)
    other = app.third(loaded, third)
    extra = (other,) if other else ()
    return ColumnVariants(loaded, (loaded.before, loaded.after, *extra), (loaded.after, loaded.after, *extra))


def empty_columns(answering: ColumnVariants, strength: float = 1.0) -> tuple[Column, ...]:
    """Columns in which nothing has been said."""
    base, run = answering.loaded.config.model, answering.loaded.run.path.name
    tuned = run if strength == 1 else f"{run} at strength {strength:g}"
    subtitles = [base.path + (f" with {base.adapter}" if base.adapter else ""), tuned]
    titles = ["Before tuning", TUNED]
    for variant in answering.variants[2:]:
        titles.append(f"{TUNED}: {variant.name}" if not variant.name.startswith("step-") else f"At {variant.name}")
        subtitles.append(run if variant.name.startswith("step-") else "another run")
    return tuple(Column(title, subtitle) for title, subtitle in zip(titles, subtitles, strict=True))


def converse(
    app: AppState,
    chat: Chat,
    name: str | None,
    third: str,
    text: str,
    system: str,
    settings: Settings,
    stopped: Callable[[], bool],
    strength: float = 1.0,
) -> Iterator[Chat]:
    """The chat as it grows by one exchange; the last one is scored. Raises `UserError` for a prompt it cannot take."""
    answering = column_variants(app, name, third, strength)
    wanted = Chat(answering.loaded.run.path.name, third, system, strength, empty_columns(answering, strength))
    same = (chat.run, chat.third, chat.system, chat.strength) == (wanted.run, third, system, strength)
    chat = chat if same and len(chat.columns) == len(answering.variants) else wanted
    prompts = [_next_prompt(answering.loaded, column, text, system) for column in chat.columns]

    def task() -> Iterator[tuple[Answer, ...]]:
        """What the engine's thread does: all columns, as far as they have come."""
        return answer_together(answering.loaded, answering.variants, prompts, settings, stopped=stopped)

    answers: tuple[Answer, ...] = ()
    for answers in app.engine.latest(task, PACE):
        yield _with(chat, text, answers)
    scores = [
        app.engine.call(lambda p=p: score(answering.loaded, *p)) for p in zip(answering.judges, answers, strict=True)
    ]
    grown = _with(chat, text, answers)
    scored = [
        column._replace(exchanges=(*column.exchanges[:-1], column.exchanges[-1]._replace(score=found)))
        for column, found in zip(grown.columns, scores, strict=True)
    ]
    yield replace(grown, columns=tuple(scored))


def _next_prompt(loaded: RunVariants, column: Column, text: str, system: str) -> Text:
    return chat_prompt(loaded, [(e.prompt, e.answer.text) for e in column.exchanges], text, system)


def _with(chat: Chat, text: str, answers: tuple[Answer, ...]) -> Chat:
    grown = [
        c._replace(exchanges=(*c.exchanges, Exchange(text, a))) for c, a in zip(chat.columns, answers, strict=True)
    ]
    return replace(chat, columns=tuple(grown))


def recolour(app: AppState, chat: Chat, strength: float) -> Chat:
    """The chat with the answers of its first two columns scored again by the tuned model at another strength.

    The texts stay: they are what was said. Raises `UserError` as `variants.at_strength`.
    """
    loaded = app.at_strength(app.load(chat.run), strength)

    def again(exchange: Exchange) -> Exchange:
        """An exchange with the numbers of this strength."""
        found = app.engine.call(lambda: score(loaded, loaded.after, exchange.answer))
        return exchange._replace(score=found)

    columns = [c._replace(exchanges=tuple(map(again, c.exchanges))) if i < 2 else c for i, c in enumerate(chat.columns)]
    return replace(chat, columns=tuple(columns))


def chat_html(chat: Chat) -> str:
    """What the page shows of a chat."""
    done = any(e.score for column in chat.columns for e in column.exchanges)
    return columns_html(chat.columns, DRIFT if done else "")


WELCOME = (
    "Write a prompt and press Enter, or pick one not used in training: the model before and after tuning answers "
    "at the same time, with the same seed and settings."
)
NO_RUNS = "No tuned run yet. Make one with `mlxdpo demo` (minutes, offline) or in the Train tab, then reload this page."


LOADING = '<p class="empty" role="status">Loading the model …</p>'


class SendRequest(NamedTuple):
    """What a press of the button asks for."""

    chat: Chat
    run: str
    third: str
    text: str
    system: str
    strength: float


def welcome(app: AppState) -> str:
    """The empty columns, or what to do where there is no run."""
    if not app.names():
        return f'<p class="empty">{escape(NO_RUNS)}</p>'
    return columns_html([Column("Before tuning", ""), Column("After tuning", "")], WELCOME)


def prompt_choices(app: AppState, name: str | None) -> tuple[list[tuple[str, str]], str]:
    """(label, number) of the held-out prompts of a run, and a note where there are none.

    A number is text, as every value of a dropdown here (`guard.problem`).
    """
    if not name:
        return [], ""
    found = app.gallery(name)
    return [(one_line(row), str(i)) for i, row in enumerate(found.heldout)], found.note


def picked_prompt(app: AppState, name: str | None, number: str | None) -> tuple[str, str]:
    """A held-out prompt by its number, and its chosen and rejected answers as HTML."""
    rows = app.gallery(name).heldout if name else ()
    row = {str(i): row for i, row in enumerate(rows)}.get(number or "")
    if row is None:
        return "", ""
    pair = [("Chosen in the data", row.chosen), ("Rejected in the data", row.rejected)]
    cards = "".join(
        f'<section class="voice"><h2>{name}</h2><div class="answer">{escape(text_of(text))}</div></section>'
        for name, text in pair
    )
    heading = '<p class="quiet">What the data have for the prompt picked above:</p>'
    return prompt_text(row.prompt), f'{heading}<div class="voices small">{cards}</div>'


def another(app: AppState, name: str | None, now: str | None) -> tuple[str, str, str]:
    """One of the held-out prompts, another than `now` where there are two: its number, and what `picked` says of it.

    Raises `UserError` where there are none.
    """
    found = app.gallery(name).heldout if name else ()
    if not name or not found:
        note = app.gallery(name).note if name else "choose a run first"
        raise UserError(f"no held-out prompts: {note}; write your own prompt")
    others = [number for number in map(str, range(len(found))) if number != now] or ["0"]
    number = random.choice(others)
    return number, *picked_prompt(app, name, number)


def _without_last(chat: Chat) -> tuple[Chat, str]:
    """The chat before its last exchange, and what was said in it. Raises `UserError` when nothing was said."""
    if not chat.columns or not chat.columns[0].exchanges:
        raise UserError("nothing to regenerate yet; send a prompt first")
    columns = tuple(column._replace(exchanges=column.exchanges[:-1]) for column in chat.columns)
    return replace(chat, columns=columns), chat.columns[0].exchanges[-1].prompt


def build(app: AppState, guard: Guard, page: Any) -> Any:
    """Make the tab inside the current `gr.Tab`; returns the run's dropdown."""
    import gradio as gr

    see, do = _compare_widgets(gr, app), _compare_handlers(app, guard)
    knobs = list(see.knobs.values())
    outputs = [see.chat, see.text, see.board, see.knobs["seed"]]
    asked, strength = [see.run, see.third], see.strength
    gr.on(
        [see.text.submit, see.send.click],
        do.send,
        [see.chat, *asked, see.text, see.system, strength, *knobs],
        outputs,
        **MANY,
    )
    see.again.click(do.again, [see.chat, *asked, see.system, strength, *knobs], outputs, **MANY)
    see.strength.release(do.recolour, [see.chat, see.strength], [see.board], **MANY)
    see.stop.click(do.stop, None, None, **MANY)
    gr.on([see.new.click, see.third.change], do.clear, None, [see.chat, see.board], **MANY)
    changed = [see.chat, see.board, see.third, see.pick, see.pair, see.knobs["max_tokens"]]
    see.run.change(do.run, see.run, changed, **MANY)
    see.pick.change(do.pick, [see.run, see.pick], [see.text, see.pair], **MANY)
    # Not through the drop-down alone: set to what it shows already, it says nothing.
    see.chance.click(do.chance, [see.run, see.pick], [see.pick, see.text, see.pair], **MANY)
    page.load(do.load, None, see.run, **MANY)
    build_influence(gr, app.runs, guard, see.board, see.chat)
    return see.run


def _compare_widgets(gr: Any, app: AppState) -> SimpleNamespace:
    """The widgets, from top to bottom."""
    names = app.names()
    first = names[0] if names else None
    see = SimpleNamespace(chat=gr.State(Chat()))
    with gr.Row():
        see.run = gr.Dropdown(names, value=first, label="Run", elem_id="compare-run")
        see.third = gr.Dropdown(app.thirds(first), value=NOBODY, label="Third column", elem_id="compare-third")
    choices, note = prompt_choices(app, first)
    with gr.Row(equal_height=True, elem_classes="buttons"):
        see.pick = gr.Dropdown(
            choices,
            value=None,
            label="A prompt not used in training",
            info=note,
            elem_id="compare-pick",
            scale=5,
            min_width=220,
        )
        see.chance = gr.Button("Random one", elem_id="compare-random", min_width=110)
    see.text = gr.Textbox(
        label="Prompt", placeholder="Enter sends, Shift+Enter starts a new line", lines=1, max_lines=8,
        max_length=LONGEST_PROMPT, elem_id="compare-prompt", autofocus=True,
    )  # fmt: skip
    with gr.Row(elem_classes="buttons"):
        see.send = gr.Button("Send", variant="primary", elem_id="compare-send", min_width=90)
        see.stop = gr.Button("Stop", elem_id="compare-stop", min_width=90)
        see.again = gr.Button("Next seed", elem_id="compare-again", min_width=90)
        see.new = gr.Button("New chat", elem_id="compare-new", min_width=90)
    see.strength = gr.Slider(
        0,
        2,
        1.0,
        step=0.05,
        label="Strength of the tuning",
        info="0 before tuning, 1 as trained. Colours follow at once; the next answer is written at it.",
        elem_id="compare-strength",
    )
    with gr.Accordion("Settings", open=False):
        see.system = gr.Textbox(
            label="System prompt (chat models)", max_length=LONGEST_PROMPT, elem_id="compare-system"
        )
        see.knobs = knobs_of(gr, "compare", Settings(max_tokens=usual_tokens(app, first)))
    see.board = gr.HTML(welcome(app), elem_id="columns", elem_classes="board", js_on_load=TOKEN_CLICKS)
    see.pair = gr.HTML(elem_id="compare-pair")
    return see


def _compare_handlers(app: AppState, guard: Guard) -> SimpleNamespace:
    """What the widgets call."""
    import gradio as gr

    def answers(request: Any, asked: SendRequest, knobs: tuple[Any, ...]) -> Iterator[Any]:
        """Page updates while the columns grow: the chat, the text field, the page's columns, the seed."""
        guard(request)
        chat, name, third, text, system, strength = asked
        with app.stoppable(session_of(request)) as halt:
            yield chat, gr.skip(), LOADING + chat_html(chat), gr.skip()
            try:
                settings = settings_from(**dict(zip(Settings.model_fields, knobs, strict=True)))
                written: Any = ""  # cleared once: what is typed while the answers grow stays
                for grown in converse(app, chat, name, third, text, system, settings, halt.is_set, strength):
                    yield grown, written, chat_html(grown), settings.seed
                    written = gr.skip()
            except UserError as error:
                yield chat, gr.skip(), alert(error, "empty") + chat_html(chat), gr.skip()

    def send(chat, name, third, text, system, strength, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        """The button `Send`, and Enter."""
        yield from answers(request, SendRequest(chat, name, third, text or "", system or "", strength), (t, p, n, seed))

    def again(chat, name, third, system, strength, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        """The same question with the next seed."""
        with show_errors():
            shorter, text = _without_last(chat)
        yield from answers(
            request, SendRequest(shorter, name, third, text, system or "", strength), (t, p, n, (seed or 0) + 1)
        )

    def stop(request: gr.Request) -> None:
        """End this page's answers where they are."""
        app.stop(session_of(request))

    def chosen(name: str) -> tuple[Any, ...]:
        """Another run: an empty chat, its third variants, its prompts and its usual length."""
        choices, note = prompt_choices(app, name)
        third = gr.Dropdown(app.thirds(name), value=NOBODY)
        return Chat(), welcome(app), third, gr.Dropdown(choices, value=None, info=note), "", usual_tokens(app, name)

    def load() -> Any:
        """The runs that can answer, the one the page opens with chosen."""
        names = app.names()
        return gr.Dropdown(names, value=names[0]) if names else gr.skip()

    return SimpleNamespace(
        send=send,
        again=again,
        recolour=_strength_handler(app, guard),
        stop=stop,
        run=show_errors()(chosen),
        load=load,
        clear=lambda: (Chat(), welcome(app)),
        pick=show_errors()(
            lambda name, number: (gr.skip(), "") if number is None else picked_prompt(app, name, number)
        ),
        chance=show_errors()(lambda name, now: another(app, name, now)),
    )


def _strength_handler(app: AppState, guard: Guard) -> Callable[..., Any]:
    """What the slider calls when it was moved."""
    import gradio as gr

    def coloured(chat: Chat, strength: float, request: gr.Request) -> Any:
        """What is shown, coloured by the tuned model at that strength."""
        guard(request)
        with show_errors():
            return chat_html(recolour(app, chat, strength)) if chat.columns else gr.skip()

    return coloured


def usual_tokens(app: AppState, name: str | None) -> int:
    """How long answers usually are in a run's data, in tokens."""
    return app.gallery(name).tokens if name else 128


def knobs_of(gr: Any, where: str, start: Settings) -> dict[str, Any]:
    """The widgets of `Settings`, in the order of its fields."""
    with gr.Row():
        temperature = gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature", elem_id=f"{where}-temperature")
        top_p = gr.Slider(0.05, 1, start.top_p, step=0.05, label="Top-p", elem_id=f"{where}-top-p")
        tokens = gr.Slider(1, 1024, start.max_tokens, step=1, label="Max tokens", elem_id=f"{where}-tokens")
        seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id=f"{where}-seed")
    return {"temperature": temperature, "top_p": top_p, "max_tokens": tokens, "seed": seed}
