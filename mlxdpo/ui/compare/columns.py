"""The columns of answers as HTML: every token coloured by what tuning did to its probability.

Every text is escaped; nothing a model or a file says becomes markup. Blue is likelier after tuning, orange less likely:
a pair that stays apart under all common colour blindness (Okabe and Ito). The number is on hover, on keyboard focus and
in the text that screen readers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from mlxdpo.io.words import counted
from mlxdpo.ui.compare.answers import Answer, Score, TokenPiece

ENDS = {
    "stop": "ended by itself",
    "length": "cut off at max tokens",
    "stopped": "you stopped it",
    "": "writing",
}
BLUE, ORANGE = "0, 114, 178", "213, 94, 0"
STRONGEST = 0.75  # opacity
WRITING = '<span class="caret" aria-hidden="true"></span>'


class Exchange(NamedTuple):
    """One turn of a chat: what was asked, what was answered, and what tuning did to the answer once it is known."""

    prompt: str
    answer: Answer
    score: Score | None = None


class Column(NamedTuple):
    """A column: its heading, a line below it, its exchanges, oldest first."""

    title: str
    subtitle: str
    exchanges: tuple[Exchange, ...] = ()


TUNED = "After tuning"


def columns_html(columns: Sequence[Column], note: str = "") -> str:
    """All columns side by side, below each other where there is no room; the colours share one scale."""
    scores = [e.score for column in columns for e in column.exchanges if e.score]
    scale = colour_scale(scores)
    busy = any(not e.answer.finish for column in columns for e in column.exchanges)
    body = "".join(_column_html(column, scale) for column in columns)
    foot = (legend(scale) if scores else "") + (f'<p class="note" role="status">{escape(note)}</p>' if note else "")
    return f'<div class="voices" aria-busy="{str(busy).lower()}">{body}</div>{foot}'


def _column_html(column: Column, scale: float) -> str:
    turns = "".join(_exchange_html(e, scale) for e in column.exchanges)
    kind = " tuned" if column.title.startswith(TUNED) else ""
    return (
        f'<section class="voice{kind}" aria-label="{escape(column.title)}"><h2>{escape(column.title)}</h2>'
        f'<p class="sub">{escape(column.subtitle)}</p>{turns}</section>'
    )


def _exchange_html(exchange: Exchange, scale: float) -> str:
    return prompt_html(exchange.prompt) + answer_html(exchange.answer, exchange.score, scale)


def prompt_html(prompt: str) -> str:
    """What was asked, above its answers."""
    return f'<div class="said"><span class="sr">Prompt: </span>{escape(prompt)}</div>'


def answer_html(answer: Answer, score: Score | None, scale: float) -> str:
    """An answer with its numbers; coloured token by token once it is scored."""
    text = heat(score.pieces, scale) if score else escape(answer.text)
    if answer.finish and not answer.text:
        text = '<em class="quiet">no text: it ended at once</em>'
    return f'<div class="answer">{text}{"" if answer.finish else WRITING}</div>' + _answer_numbers(answer, score)


def _answer_numbers(answer: Answer, score: Score | None) -> str:
    chips = [_chip(counted(len(answer.tokens), "token"), ENDS[answer.finish])]
    if answer.seconds:
        chips.append(_chip(f"{answer.speed:.1f} tokens/s", "tokens over the time of this column's own turns"))
    if score:
        chips += [
            _chip(f"reward {score.reward:+.2f}", "implicit reward: beta times log π/π_ref summed over the answer"),
            _chip(f"log π/π_ref {score.ratio:+.2f}", "nats, summed over the answer; how far tuning moved it"),
            _chip(f"KL {score.kl:.2f}", "nats: KL(π ‖ π_ref) summed over the steps of this answer, at temperature 1"),
        ]
        if score.end is not None:
            chips.append(_chip(f"ending {score.end:+.2f}", "log π/π_ref of ending the answer here, nats"))
    return f'<div class="chips">{"".join(chips)}<span class="end">{ENDS[answer.finish]}</span></div>'


def _chip(text: str, meaning: str) -> str:
    shown = escape(text.replace("-", "−"))
    return f'<span class="chip" title="{escape(meaning)}">{shown}<span class="sr"> ({escape(meaning)})</span></span>'


def colour_scale(scores: Sequence[Score]) -> float:
    """The log-ratio that gets the full colour: the 99th percentile of all tokens shown, at least 0.5 nats."""
    sizes = [abs(piece.ratio) for score in scores for piece in score.pieces]
    return max(0.5, float(np.quantile(sizes, 0.99))) if sizes else 0.5


def heat(pieces: Sequence[TokenPiece], scale: float) -> str:
    """The tokens as spans. One tab stop for the whole answer; the arrow keys go from token to token (page.js)."""
    return "".join(_span(piece, scale, first=i == 0) for i, piece in enumerate(pieces))


def _span(piece: TokenPiece, scale: float, first: bool) -> str:
    strength = min(1.0, abs(piece.ratio) / scale) * STRONGEST
    colour = f"rgba({BLUE if piece.ratio > 0 else ORANGE}, {strength:.2f})"
    label = f"{piece.text.strip() or 'space'}: {piece.ratio:+.2f} nats, {_times(piece.ratio)}"
    said = escape(label)
    return (
        f'<span class="tok" style="background:{colour}" title="{said}" aria-label="{said}" role="button"'
        f' tabindex="{0 if first else -1}">{escape(piece.text)}</span>'
    )


def _times(ratio: float) -> str:
    factor = float(np.exp(min(abs(ratio), 20)))
    return f"{factor:.3g} times {'likelier' if ratio >= 0 else 'less likely'} than before"


def legend(scale: float) -> str:
    """What the colours mean, in numbers."""
    return (
        '<div class="legend" role="note">'
        f'<span class="swatch" style="background:rgba({ORANGE}, {STRONGEST})"></span>−{scale:.1f} '
        f'<span class="ramp"></span> +{scale:.1f}<span class="swatch" style="background:rgba({BLUE}, {STRONGEST})">'
        "</span> log π/π<sub>ref</sub> of each token, nats: blue is likelier after tuning, orange less likely. "
        "Hover, or Tab into an answer and use the arrow keys, for the number. Click a word, or press Enter on it, "
        "for the pairs that taught it.</div>"
    )
