"""Answers as HTML: every character escaped, every token coloured by what tuning did to its probability.

Blue is likelier after tuning, orange less likely: a pair that stays apart under all common colour blindness (Okabe
and Ito). The number is on hover, on keyboard focus and in the text that screen readers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mlxdpo.ui.compare.scores import Score, TokenPiece

BLUE, ORANGE = "0, 114, 178", "213, 94, 0"
STRONGEST = 0.75  # opacity


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
        f'<span class="tok" style="background:{colour}" title="{said}" aria-label="{said}" role="text"'
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
        "Hover, or Tab into an answer and use the arrow keys, for the number.</div>"
    )
