"""A blind round: two answers whose sides a coin on the server has chosen, one vote, then the reveal.

    nothing -> writing -> ready -> voted

Until the vote the browser gets the two texts at once and nothing else: no name, no number, no order in time. The sides
are in this process's memory alone; `shown` is all that may be sent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

from mlxdpo.inference.run_prompts import Gallery
from mlxdpo.inference.trained_run import prompt_text
from mlxdpo.types import Text, UserError
from mlxdpo.ui.compare.answers import Answer, Score, Settings, answer_together, score
from mlxdpo.ui.compare.columns import answer_html, colour_scale, legend, prompt_html
from mlxdpo.ui.engine import AppState
from mlxdpo.ui.variants import RunVariants

Side = Literal["a", "b"]
Source = Literal["heldout", "train", "own"]
SIDES: tuple[Side, Side] = ("a", "b")
TRIES = 5  # draws until two answers differ
PACE = 0.25  # seconds between two updates of the bar


@dataclass(frozen=True)
class Round:
    """A round once its answers are there. `tuned` is the side of the tuned model: the secret; `models` are the digests
    of the base model and of both adapters."""

    id: str
    run: str
    source: Source
    prompt: Text
    before: Answer
    after: Answer
    tuned: Side
    settings: Settings
    shown_at: float
    models: Mapping[str, Any]
    scores: tuple[Score | None, Score | None] | None = None
    winner: str = ""

    def side(self, side: Side) -> Answer:
        """The answer that stands on a side."""
        return self.after if side == self.tuned else self.before


def pick_prompt(found: Gallery, source: Source, own: str, asked: int) -> Text:
    """The prompt of the next round: the user's own text, or the run's prompts in turn, `asked` of them behind us.

    Raises `UserError` where there is none.
    """
    if source == "own":
        if not own.strip():
            raise UserError("write a prompt first, or let the page pick one")
        return own
    rows = found.heldout if source == "heldout" else found.train
    if not rows:
        raise UserError(f"no such prompts: {found.note or 'the run has none'}; write your own instead")
    return rows[asked % len(rows)].prompt


def play(
    app: AppState,
    loaded: RunVariants,
    prompt: Text,
    source: Source,
    settings: Settings,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[float | Round]:
    """How far the round is, from 0 to 1, and at last the round. Draws again where both answers are the same.

    Raises `UserError` when they stay the same, or when it was stopped.
    """
    for attempt in range(TRIES):
        drawn = settings.model_copy(update={"seed": (settings.seed + attempt) % 2**32})
        answers: tuple[Answer, ...] = ()
        for step in app.engine.latest(lambda s=drawn: _counted(loaded, prompt, s, stopped), PACE):
            steps, answers = step
            yield min(0.99, steps / settings.max_tokens)
        if stopped() or len(answers) != 2:
            raise UserError("stopped before both answers were there, so there is nothing to vote on")
        before, after = answers
        if before.text.strip() != after.text.strip():
            side, name = SIDES[secrets.randbelow(2)], loaded.run.path.name
            game = Round(secrets.token_hex(8), name, source, prompt, before, after, side, drawn, 0.0, models_of(loaded))
            yield replace(game, shown_at=time.monotonic())
            return
    raise UserError(
        f"before and after tuning gave the same answer {TRIES} times; raise the temperature or try another prompt"
    )


def _counted(
    loaded: RunVariants, prompt: Text, settings: Settings, stopped: Callable[[], bool]
) -> Iterator[tuple[int, tuple[Answer, ...]]]:
    variants = (loaded.before, loaded.after)
    yield from enumerate(answer_together(loaded, variants, (prompt, prompt), settings, stopped=stopped), 1)


def models_of(loaded: RunVariants) -> dict[str, Any]:
    """The digests of a run's base model and adapters, as a vote names them."""
    adapters = {"before": loaded.before.digest, "after": loaded.after.digest}
    return {"model": loaded.policy.identity["digest"], "adapter": adapters}


def judged(app: AppState, game: Round) -> Round:
    """The round after its vote, with what tuning did to each answer. Raises `UserError` as `AppState.load`."""
    loaded, answers = app.load(game.run), (game.before, game.after)
    found = [app.engine.call(lambda a=a: score(loaded, loaded.after, a)) for a in answers]
    return replace(game, scores=(found[0], found[1]))


def blind_html(game: Round) -> str:
    """The two answers before the vote: texts alone."""
    cards = "".join(_answer_card(f"Answer {side.upper()}", "", _bare_answer(game.side(side).text)) for side in SIDES)
    return _answers_html(prompt_text(game.prompt), cards)


def revealed_html(game: Round) -> str:
    """The two answers after the vote: which was which, and the numbers once there are some."""
    found = game.scores or (None, None)
    scores = dict(zip(("b", "a") if game.tuned == "a" else ("a", "b"), found, strict=True))
    scale = colour_scale([s for s in found if s])
    cards = ""
    for side in SIDES:
        who = "after tuning" if side == game.tuned else "before tuning"
        won = " · your choice" if game.winner == side else ""
        body = answer_html(game.side(side), scores[side], scale)
        cards += _answer_card(f"Answer {side.upper()}: {who}", won, body, "tuned" if side == game.tuned else "untuned")
    return _answers_html(prompt_text(game.prompt), cards) + (legend(scale) if any(found) else "")


def waiting_html(share: float) -> str:
    """While both answers are being written."""
    percent = round(100 * share)
    return (
        f'<div class="waiting" role="status"><progress max="100" value="{percent}" aria-label="writing"></progress>'
        "<span>Both answers are being written. They appear together, so speed reveals nothing.</span></div>"
    )


def _answers_html(prompt: str, cards: str) -> str:
    return f'{prompt_html(prompt)}<div class="voices">{cards}</div>'


def _answer_card(title: str, note: str, body: str, kind: str = "") -> str:
    heading = f'<h2>{escape(title)}<span class="quiet">{escape(note)}</span></h2>'
    return f'<section class="voice {kind}" aria-label="{escape(title)}">{heading}{body}</section>'


def _bare_answer(text: str) -> str:
    empty = '<em class="quiet">no text</em>'
    return f'<div class="answer">{escape(text) if text.strip() else empty}</div>'
