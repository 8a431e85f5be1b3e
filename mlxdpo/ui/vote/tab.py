"""The Blind vote tab: its widgets and what they call. No postponed annotations: Gradio reads `gr.Request` off them."""

import secrets
from html import escape
from types import SimpleNamespace
from typing import Any

from mlxdpo.online.votes_to_pairs import export_votes
from mlxdpo.types import UserError
from mlxdpo.ui.app_state import AppState
from mlxdpo.ui.compare.answers import LONGEST_PROMPT, Settings, settings_from
from mlxdpo.ui.compare.tab import NO_RUNS, knobs_of, usual_tokens
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.run_list import run_named
from mlxdpo.ui.vote.blind_round import Round, blind_html, judged, pick_prompt, play, revealed_html, waiting_html
from mlxdpo.ui.vote.vote_file import FILE, WINNERS, append_vote, asked, record, standing_html
from mlxdpo.ui.widgets import MANY, alert, session_of, show_errors
from mlxdpo_eval.judges.votes import problem_with

SOURCES = [
    ("Held-out prompts: is it better?", "heldout"),
    ("Training prompts: teach the next round", "train"),
    ("My own prompts: both", "own"),
]
KEYS = {"a": "1", "b": "2", "tie": "0", "both_bad": "9"}
TEACHING = (
    "Votes with a winner become training pairs. Votes on held-out prompts do not: those prompts must stay unseen, or "
    "nothing could be measured on them again."
)
START = (
    "Press “Next pair” (n). Two answers appear, one from before tuning and one from after; you do not see which. "
    "Vote with the buttons or the keys 1, 2, 0, 9, then see which was which."
)


def start_board(name: str | None) -> str:
    """What the board says before the first round."""
    return f'<p class="empty">{escape(START if name else NO_RUNS)}</p>'


def tally(app: AppState, name: str | None) -> str:
    """The running win rate of a run."""
    return standing_html(run_named(app.runs, name).path / FILE) if name else ""


def cast_vote(app: AppState, game: Round | None, winner: str, session: str) -> Round:
    """Write the vote to disk, then look behind the curtain. Raises `UserError` where there is nothing to vote on."""
    if game is None:
        raise UserError("there is nothing to vote on yet; press “Next pair” first")
    if game.winner:
        raise UserError("this pair has its vote already; go on to the next pair")
    loaded = app.load(game.run)
    append_vote(loaded.run, record(loaded, game, winner, session))
    return judged(app, loaded, game, winner)


def exported(app: AppState, name: str | None) -> tuple[str, str]:
    """Write the votes as pairs; (what was written, the command of the next round)."""
    found = export_votes(run_named(app.runs, name), problem_with)
    text = f"{found.sentence()} Written to {found.file}. The next round starts from this run's adapter and is measured "
    return f'<p class="standing" role="status">{escape(text)}against it.</p>', found.command


def build(app: AppState, guard: Guard, page: Any) -> Any:
    """Make the tab inside the current `gr.Tab`; returns the run's dropdown."""
    import gradio as gr

    see, do = _vote_widgets(gr, app), _vote_handlers(app, guard)
    buttons, knobs = list(see.buttons.values()), list(see.knobs.values())
    asked = [see.run, see.source, see.own, *knobs]
    gr.on([see.begin.click, see.own.submit], do.begin, asked, [see.game, see.board, *buttons], **MANY)
    see.stop.click(do.stop, None, None, **MANY)
    for winner, button in see.buttons.items():
        button.click(do.vote(winner), see.game, [see.game, see.board, see.result, *buttons], **MANY)
    see.write.click(do.export, see.run, [see.written, see.command], **MANY)
    see.source.change(lambda kind: gr.Textbox(visible=kind == "own"), see.source, see.own, **MANY)
    reset = [see.game, see.board, see.result, see.written, see.command, see.knobs["max_tokens"], *buttons]
    see.run.change(do.run, see.run, reset, **MANY)
    page.load(show_errors()(lambda name: tally(app, name)), see.run, see.result, **MANY)
    return see.run


def _vote_widgets(gr: Any, app: AppState) -> SimpleNamespace:
    """The widgets, from top to bottom."""
    names = app.names()
    first = names[0] if names else None
    see = SimpleNamespace(game=gr.State(None))
    with gr.Row():
        see.run = gr.Dropdown(names, value=first, label="Run", elem_id="vote-run", min_width=240)
        see.source = gr.Radio(SOURCES, value="heldout", label="Vote on", elem_id="vote-source", min_width=300, scale=2)
    see.own = gr.Textbox(
        label="Your prompt", lines=1, max_lines=8, visible=False, max_length=LONGEST_PROMPT, elem_id="vote-own"
    )
    with gr.Row(elem_classes="buttons"):
        see.begin = gr.Button("Next pair (n)", variant="primary", elem_id="vote-next", min_width=120)
        see.stop = gr.Button("Stop", elem_id="vote-stop", min_width=90)
    see.board = gr.HTML(start_board(first), elem_id="vote-board", elem_classes="board")
    with gr.Row(elem_classes="buttons"):
        see.buttons = {winner: _button(gr, winner, words) for winner, words in WINNERS.items()}
    see.result = gr.HTML(tally(app, first), elem_id="vote-standing")
    with gr.Accordion("Teach the next round with these votes", open=False, elem_id="vote-teach"):
        gr.HTML(f'<p class="quiet">{escape(TEACHING)}</p>')
        see.write = gr.Button("Export votes as training pairs", elem_id="vote-export")
        see.written = gr.HTML(elem_id="vote-written")
        see.command = gr.Code(
            label="Train the next round with", language="shell", visible=False, elem_id="vote-command"
        )
    with gr.Accordion("Settings", open=False):
        see.knobs = knobs_of(gr, "vote", Settings(temperature=1.0, max_tokens=usual_tokens(app, first)))
        gr.HTML('<p class="quiet">Seed 0 draws a new one for every pair.</p>')
    return see


def _button(gr: Any, winner: str, words: str) -> Any:
    name = f"vote-{winner.replace('_', '-')}"
    return gr.Button(f"{words} ({KEYS[winner]})", interactive=False, elem_id=name, min_width=130)


def _vote_handlers(app: AppState, guard: Guard) -> SimpleNamespace:
    """What the widgets call."""
    import gradio as gr

    def votable(ready: bool) -> list[Any]:
        """The vote's buttons, on or off."""
        return [gr.Button(interactive=ready) for _ in WINNERS]

    def begin(name, kind, text, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        """Page updates of a round: progress while both answers are written, then the answers."""
        guard(request)
        with app.stoppable("vote " + session_of(request)) as halt:
            yield None, waiting_html(0.0), *votable(False)
            try:
                loaded = app.load(name)
                prompt = pick_prompt(app.gallery(name), kind, text or "", asked(loaded.run, kind))
                drawn = settings_from(temperature=t, top_p=p, max_tokens=n, seed=seed or secrets.randbelow(2**32))
                for step in play(app, loaded, prompt, kind, drawn, stopped=halt.is_set):
                    if isinstance(step, Round):
                        yield step, blind_html(step), *votable(True)
                    else:
                        yield gr.skip(), waiting_html(step), *(gr.skip() for _ in WINNERS)
            except UserError as error:
                yield None, alert(error, "empty"), *votable(False)

    def vote(winner: str) -> Any:
        """The handler of one button."""

        def handler(state, request: gr.Request):  # type: ignore[no-untyped-def]
            """Keep the vote, and reveal which side was which."""
            guard(request)
            with show_errors():
                done = cast_vote(app, state, winner, session_of(request))
                return done, revealed_html(done), tally(app, done.run), *votable(False)

        return handler

    def export(name, request: gr.Request):  # type: ignore[no-untyped-def]
        """Write the votes as pairs, and show the command that trains on them."""
        guard(request)
        with show_errors():
            text, words = exported(app, name)
            return text, gr.Code(words, visible=True)

    def stop(request: gr.Request) -> None:
        """End this page's round."""
        app.stop("vote " + session_of(request))

    def chosen(name: str) -> tuple[Any, ...]:
        """Another run: no round, its tally and its usual length."""
        hidden = gr.Code(visible=False)
        return None, start_board(name), tally(app, name), "", hidden, usual_tokens(app, name), *votable(False)

    return SimpleNamespace(begin=begin, vote=vote, export=export, stop=stop, run=show_errors()(chosen))
