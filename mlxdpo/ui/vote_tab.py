"""The Blind vote tab: its widgets and what they call. No postponed annotations: Gradio reads `gr.Request` off them."""

import secrets
from typing import Any

from mlxdpo.types import UserError
from mlxdpo.ui.answers import LONGEST_PROMPT, Settings, settings_from
from mlxdpo.ui.compare_tab import NO_RUNS, knobs_of
from mlxdpo.ui.desk import Desk
from mlxdpo.ui.folder import run_named
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.handlers import said, saying, session_of
from mlxdpo.ui.heat import plain
from mlxdpo.ui.next_round import export_votes
from mlxdpo.ui.vote import Round, judged, pick_prompt, play, revealed, shown, writing
from mlxdpo.ui.votes import FILE, WINNERS, append_vote, asked, record, standing_html

SOURCES = [
    ("Held-out prompts: is it better?", "heldout"),
    ("Training prompts: teach the next round", "train"),
    ("My own prompts: both", "own"),
]
KEYS = {"a": "1", "b": "2", "tie": "0", "both_bad": "9"}
START = (
    "Press “Next pair” (n). Two answers appear, one from before tuning and one from after; you do not see which. "
    "Vote with the buttons or the keys 1, 2, 0, 9, then see which was which."
)


def opening(desk: Desk, name: str | None) -> str:
    """What the board says before the first round."""
    return f'<p class="empty">{plain(START if name else NO_RUNS)}</p>'


def tally(desk: Desk, name: str | None) -> str:
    """The running win rate of a run."""
    return standing_html(run_named(desk.runs, name).path / FILE) if name else ""


def cast_vote(desk: Desk, game: Round | None, winner: str, session: str) -> Round:
    """Write the vote to disk, then look behind the curtain. Raises `UserError` where there is nothing to vote on."""
    if game is None:
        raise UserError("there is nothing to vote on yet; press “Next pair” first")
    if game.winner:
        raise UserError("this pair has its vote already; go on to the next pair")
    cast = desk.cast(game.run)
    append_vote(cast.run, record(cast, game, winner, session))
    return judged(desk, cast, game, winner)


def exported(desk: Desk, name: str | None) -> tuple[str, str]:
    """Write the votes as pairs; (what was written, the command of the next round)."""
    found = export_votes(run_named(desk.runs, name))
    text = f"{found.sentence()} Written to {found.file}. The next round starts from this run's adapter and is measured "
    return f'<p class="standing" role="status">{plain(text)}against it.</p>', found.command


def build(desk: Desk, guard: Guard, page: Any) -> Any:
    """Make the tab inside the current `gr.Tab`; returns the run's dropdown."""
    import gradio as gr

    names = desk.names()
    first = names[0] if names else None
    game = gr.State(None)
    with gr.Row():
        run = gr.Dropdown(names, value=first, label="Run", elem_id="vote-run", min_width=240)
        source = gr.Radio(SOURCES, value="heldout", label="Vote on", elem_id="vote-source", min_width=300, scale=2)
    own = gr.Textbox(
        label="Your prompt", lines=1, max_lines=8, visible=False, max_length=LONGEST_PROMPT, elem_id="vote-own"
    )
    with gr.Row(elem_classes="buttons"):
        begin = gr.Button("Next pair (n)", variant="primary", elem_id="vote-next", min_width=120)
        stop = gr.Button("Stop", elem_id="vote-stop", min_width=90)
    board = gr.HTML(opening(desk, first), elem_id="vote-board", elem_classes="board")
    with gr.Row(elem_classes="buttons"):
        buttons = {
            winner: gr.Button(
                f"{words} ({KEYS[winner]})",
                interactive=False,
                elem_id=f"vote-{winner.replace('_', '-')}",
                min_width=130,
            )
            for winner, words in WINNERS.items()
        }
    result = gr.HTML(tally(desk, first), elem_id="vote-standing")
    with gr.Accordion("Teach the next round with these votes", open=False, elem_id="vote-teach"):
        gr.HTML(
            '<p class="quiet">Votes with a winner become training pairs. Votes on held-out prompts do not: those '
            "prompts must stay unseen, or nothing could be measured on them again.</p>"
        )
        write = gr.Button("Export votes as training pairs", elem_id="vote-export")
        written = gr.HTML(elem_id="vote-written")
        command = gr.Code(label="Train the next round with", language="shell", visible=False, elem_id="vote-command")
    with gr.Accordion("Settings", open=False):
        tokens = desk.gallery(first).tokens if first else 128
        knobs = knobs_of(gr, "vote", Settings(temperature=1.0, max_tokens=tokens))
        gr.HTML('<p class="quiet">Seed 0 draws a new one for every pair.</p>')

    def locked(ready: bool) -> list[Any]:
        return [gr.Button(interactive=ready) for _ in buttons]

    def on_next(name, kind, text, t, p, n, seed, request: gr.Request):  # type: ignore[no-untyped-def]
        guard(request)
        with said(), desk.stoppable("vote " + session_of(request)) as halt:
            yield None, writing(0.0), *locked(False)
            cast = desk.cast(name)
            prompt = pick_prompt(desk.gallery(name), kind, text or "", asked(cast.run, kind))
            drawn = settings_from(temperature=t, top_p=p, max_tokens=n, seed=seed or secrets.randbelow(2**32))
            for step in play(desk, cast, prompt, kind, drawn, stopped=halt.is_set):
                if isinstance(step, Round):
                    yield step, shown(step), *locked(True)
                else:
                    yield gr.skip(), writing(step), *(gr.skip() for _ in buttons)

    def on_vote(winner: str) -> Any:
        def handler(state, request: gr.Request):  # type: ignore[no-untyped-def]
            guard(request)
            with said():
                done = cast_vote(desk, state, winner, session_of(request))
                return done, revealed(done), tally(desk, done.run), *locked(False)

        return handler

    def on_export(name, request: gr.Request):  # type: ignore[no-untyped-def]
        guard(request)
        with said():
            text, words = exported(desk, name)
            return text, gr.Code(words, visible=True)

    def on_stop(request: gr.Request) -> None:
        desk.stop("vote " + session_of(request))

    def on_run(name: str):  # type: ignore[no-untyped-def]
        tokens = desk.gallery(name).tokens if name else 128
        return None, opening(desk, name), tally(desk, name), "", gr.Code(visible=False), tokens, *locked(False)

    many: dict[str, Any] = {"concurrency_limit": 8, "api_visibility": "private", "show_progress": "hidden"}
    voting = list(buttons.values())
    inputs = [run, source, own, *knobs.values()]
    gr.on([begin.click, own.submit], on_next, inputs, [game, board, *voting], **many)
    stop.click(on_stop, None, None, **many)
    for winner, button in buttons.items():
        button.click(on_vote(winner), game, [game, board, result, *voting], **many)
    write.click(on_export, run, [written, command], **many)
    source.change(lambda kind: gr.Textbox(visible=kind == "own"), source, own, **many)
    reset = [game, board, result, written, command, knobs["max_tokens"], *voting]
    run.change(saying(on_run), run, reset, **many)
    page.load(lambda name: tally(desk, name) if name else "", run, result, **many)
    return run
