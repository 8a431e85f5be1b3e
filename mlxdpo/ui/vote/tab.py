"""The Blind vote tab, and votes on disk: one durable line each in RUN/votes.jsonl, and what they say so far.

A vote is {"schema", "id", "time", "prompt", "a", "b", "winner": a | b | tie | both_bad, "tuned": a | b, ...}: what the
evaluation reads as human votes. It is on the disk before the page says so; a second one with the same id is not
written. No postponed annotations: Gradio reads `gr.Request` off them.
"""

import datetime
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock

from mlxdpo.inference.run_prompts import text_to_json
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.votes_to_pairs import FILE, count_of_votes, export_votes, votes_of
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui.compare.answers import LONGEST_PROMPT, Settings, settings_from
from mlxdpo.ui.compare.tab import NO_RUNS, knobs_of, usual_tokens
from mlxdpo.ui.engine import AppState
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.run_list import run_named
from mlxdpo.ui.vote.blind_round import Round, blind_html, judged, pick_prompt, play, revealed_html, waiting_html
from mlxdpo.ui.widgets import MANY, alert, session_of, show_errors
from mlxdpo_eval.judges.votes import problem_with, read_ballots
from mlxdpo_eval.voting import VoteRun, vote_run

SCHEMA = 1
WINNERS = {"a": "A is better", "b": "B is better", "tie": "Equally good", "both_bad": "Both bad"}
FEW = 20  # votes below which nothing is said about how many more it takes


def record(game: Round, winner: str, session: str) -> dict[str, Any]:
    """The line of a vote."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": SCHEMA,
        "id": game.id,
        "time": now.isoformat(timespec="milliseconds"),
        "prompt": text_to_json(game.prompt),
        "a": game.side("a").text,
        "b": game.side("b").text,
        "winner": winner,
        "tuned": game.tuned,
        "blind": True,
        "source": game.source,
        "finish": {side: game.side(side).finish for side in ("a", "b")},
        "sampling": game.settings.model_dump(),
        **game.models,
        "session": session,
        "seconds": round(time.monotonic() - game.shown_at, 3),  # the clock may be set meanwhile
    }


def append_vote(run: Run, line: dict[str, Any]) -> None:
    """Write a vote to disk. Raises `UserError` for an unknown winner and for a round that has its vote already."""
    if line["winner"] not in WINNERS:
        raise UserError(f"{line['winner']!r} is not a vote; known: {', '.join(WINNERS)}")
    with FileLock(run.path / f".{FILE}.lock"):  # one writer at a time, in this process and among others
        if any(old.get("id") == line["id"] for old in read_lines(run.path / FILE)):
            raise UserError("this pair already has a vote; continue with the next pair")
        append_line(run.path / FILE, line)


def asked(run: Run, source: str) -> int:
    """How many votes are on prompts of a source: where to go on in its list."""
    return sum(line.get("source") == source for line in votes_of(run))


def standing(file: Path) -> tuple[VoteRun | None, int]:
    """What the votes say about prompts that training did not see, and how many are on those that it did."""
    if not file.exists():
        return None, 0
    ballots = read_ballots(file)
    seen = {vote.prompt_id for vote in ballots.votes if vote.trained}
    fresh = tuple(vote for vote in ballots.votes if vote.prompt_id not in seen)
    return vote_run(ballots._replace(votes=fresh)), len(ballots.votes) - len(fresh)


def standing_html(file: Path) -> str:
    """The running win rate in a sentence, with the interval that may be looked at after every vote."""
    found, trained = standing(file)
    if found is None or found.n + trained == 0:
        return '<p class="standing">No votes yet. The win rate appears here after the first one.</p>'
    extra = (
        f" {count_of_votes(trained)} on training prompts: used for the next round, not as evidence." if trained else ""
    )
    if found.n == 0:
        return f'<p class="standing">{escape(extra.strip())}</p>'
    last = found.looks[-1]
    more = "" if found.needed is None or found.n < 3 else f", about {found.needed} more votes at this rate"
    verdict = {
        "cannot tell yet": f"Cannot tell yet{more}.",
        "better": f"The tuned model is better (decided after {found.decided_at} votes).",
        "worse": f"The tuned model is worse (decided after {found.decided_at} votes).",
    }[found.verdict]
    if found.verdict == "cannot tell yet" and found.needed is None:
        hopeless = "Cannot tell yet, and at this rate more votes will not help: there may be no difference."
        verdict = "Cannot tell yet." if found.n < FEW else hopeless
    repeated = sum(found.uncounted.values())
    extra += f" {count_of_votes(repeated)} on prompts voted on before: they do not count twice." if repeated else ""
    if broken := sum(found.left_out.values()):
        extra += f" {broken} lines of {file.name} are not votes and are skipped."
    return (
        f'<div class="standing" role="status"><strong>{escape(verdict)}</strong>{_bar(last.low, last.rate, last.high)}'
        f"<span>Tuned preferred in {last.rate:.0%} of {count_of_votes(found.n)} ({found.wins} won, "
        f"{found.losses} lost, {found.ties} equal, half each); 95 % interval {last.low:.0%} to {last.high:.0%}, valid "
        f"however often you look.{escape(extra)}</span></div>"
    )


def _bar(low: float, rate: float, high: float) -> str:
    return (
        '<div class="interval" aria-hidden="true"><span class="half"></span>'
        f'<span class="range" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></span>'
        f'<span class="rate" style="left:{100 * rate:.1f}%"></span></div>'
    )


SOURCES = [
    ("Held-out prompts: is it better?", "heldout"),
    ("Training prompts: votes for the next round", "train"),
    ("My own prompts: both", "own"),
]
TAKEN, SAVED = "Your vote: {}. Saving it …", "Your vote is saved: {}."
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
    """Write the vote to disk; needs no model. Raises `UserError` where there is nothing to vote on."""
    if game is None:
        raise UserError("there is nothing to vote on yet; press “Next pair” first")
    if game.winner:
        raise UserError("this pair already has a vote; continue with the next pair")
    append_vote(run_named(app.runs, game.run), record(game, winner, session))
    return replace(game, winner=winner)


Shown = tuple[Round | None, str | None, str | None, str]
"""The round, the board, the running win rate (None: as it is), and what the page says of the vote."""


def voted(app: AppState, game: Round | None, winner: str, session: str) -> Iterator[Shown]:
    """What the page shows of a vote, step by step. A vote that was not written can be repeated; a second one changes
    nothing."""
    try:
        done = cast_vote(app, game, winner, session)
    except UserError as error:
        if game is not None and (kept := _kept_vote(app, game)):
            yield replace(game, winner=kept), None, None, said_html(SAVED.format(WINNERS[kept]))
        else:
            yield game, None, None, alert(error)
        return
    words = SAVED.format(WINNERS[winner])
    yield done, revealed_html(done), tally(app, done.run), said_html(f"{words} The numbers follow.")
    try:
        done = judged(app, done)
    except UserError as error:
        yield done, None, None, said_html(words) + alert(error)
        return
    yield done, revealed_html(done), None, said_html(words)


def _kept_vote(app: AppState, game: Round) -> str:
    """The vote that a round has on the disk, "" for none: two clicks at once carry the same round."""
    try:
        return next(
            (str(line["winner"]) for line in votes_of(run_named(app.runs, game.run)) if line.get("id") == game.id), ""
        )
    except UserError:
        return ""


def said_html(words: str) -> str:
    """What became of a vote, read out when it changes."""
    return f'<p class="note" role="status">{escape(words)}</p>'


def _taken(winner: str) -> str:
    """JavaScript of a vote's button: at the click, before any answer, all are off and the page says what was taken."""
    words = json.dumps(said_html(TAKEN.format(WINNERS[winner])))
    off = '{"__type__": "update", "interactive": false}'
    return f"() => [{words}, {', '.join([off] * len(WINNERS))}]"


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
    begun = [see.game, see.board, see.said, *buttons]
    gr.on([see.begin.click, see.own.submit], do.begin, asked, begun, **MANY)
    see.stop.click(do.stop, None, None, **MANY)
    for winner, button in see.buttons.items():
        button.click(None, None, [see.said, *buttons], js=_taken(winner), api_visibility="private")
        button.click(do.vote(winner), see.game, [see.game, see.board, see.result, see.said, *buttons], **MANY)
    see.write.click(do.export, see.run, [see.written, see.command], **MANY)
    see.source.change(lambda kind: gr.Textbox(visible=kind == "own"), see.source, see.own, **MANY)
    reset = [see.game, see.board, see.result, see.said, see.written, see.command, see.knobs["max_tokens"], *buttons]
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
    see.said = gr.HTML(elem_id="vote-said")
    see.result = gr.HTML(tally(app, first), elem_id="vote-standing")
    with gr.Accordion("Use these votes for the next round", open=False, elem_id="vote-teach"):
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
            yield None, waiting_html(0.0), "", *votable(False)
            try:
                loaded = app.load(name)
                prompt = pick_prompt(app.gallery(name), kind, text or "", asked(loaded.run, kind))
                drawn = settings_from(temperature=t, top_p=p, max_tokens=n, seed=seed or secrets.randbelow(2**32))
                for step in play(app, loaded, prompt, kind, drawn, stopped=halt.is_set):
                    if isinstance(step, Round):
                        yield step, blind_html(step), "", *votable(True)
                    else:
                        yield gr.skip(), waiting_html(step), *(gr.skip() for _ in (..., *WINNERS))
            except UserError as error:
                yield None, alert(error, "empty"), "", *votable(False)

    def vote(winner: str) -> Any:
        """The handler of one button."""

        def handler(state, request: gr.Request):  # type: ignore[no-untyped-def]
            """Keep the vote and say so; reveal which side was which; then the numbers, which take the model."""
            guard(request)
            for game, board, result, words in voted(app, state, winner, session_of(request)):
                ready = game is not None and not game.winner
                shown = [gr.skip() if one is None else one for one in (game, board, result)]
                yield *shown, words, *votable(ready)

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
        return None, start_board(name), tally(app, name), "", "", hidden, usual_tokens(app, name), *votable(False)

    return SimpleNamespace(begin=begin, vote=vote, export=export, stop=stop, run=show_errors()(chosen))
