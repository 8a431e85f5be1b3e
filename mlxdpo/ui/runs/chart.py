"""Curves as SVG text: lines for training, dots for held-out values, numbers on hover.

Gradio's LinePlot has one kind of mark, drops series that its first value lacked, and needs a data frame; a chart here
is a string that a test can read, follows the page's colours, and scales to any width. Colours are Okabe and Ito's,
which are told apart with every kind of colour vision; dashes tell the lines apart without any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 480, 210, 52, 10, 26  # viewBox units
STRIPS = 100  # hover targets

STYLE = """<style>
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.chart { margin: 0; color: var(--body-text-color); --c0: #0072B2; --c1: #D55E00; --c2: #009E73; --c3: #B0578D; }
.dark .chart { --c0: #56B4E9; --c1: #F08A3C; --c2: #2FC79A; --c3: #E29AC6; }
.chart figcaption { font-weight: 600; margin-bottom: 2px; }
.chart .key { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85em; }
.chart .key i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; vertical-align: middle; }
.chart .key i.dots { width: 8px; height: 8px; border: 0; border-radius: 50%; background: currentColor; }
.chart svg { width: 100%; height: auto; display: block; }
.chart text { fill: currentColor; font-size: 11px; opacity: .8; }
.chart .grid { stroke: currentColor; opacity: .15; }
.chart .strip { fill: transparent; } .chart .strip:hover { fill: currentColor; fill-opacity: .1; }
</style>"""
DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Series(NamedTuple):
    """A named row of (step, value); `look` is how it is drawn, `colour` a number from 0 to 3."""

    name: str
    points: Sequence[tuple[float, float]]
    look: Literal["line", "dots"]
    colour: int


class Frame(NamedTuple):
    """The ranges that are shown."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Where a point lies, viewBox units."""
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - 8), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def chart(title: str, series: Sequence[Series], empty: str = "Nothing measured yet.") -> str:
    """One figure. Values that are not finite are left out; without any value it says `empty`."""
    shown = [s._replace(points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    shown = [s for s in shown if s.points]
    head = f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
    if not shown:
        return f"{head}<p>{escape(empty)}</p></figure>"
    frame = frame_of(shown)
    key = "".join(_line_key(s) for s in shown if s.look == "line") + _dots_key([s for s in shown if s.look == "dots"])
    drawing = _grid(frame) + "".join(_polyline(s, frame) if s.look == "line" else _dots(s, frame) for s in shown)
    label = f"{title}: " + "; ".join(
        f"{s.name} {four_digits(s.points[-1][1])} at step {s.points[-1][0]:g}" for s in shown
    )
    return (
        f'{head}<div class="key">{key}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{drawing}{_strips(shown, frame)}</svg></figure>"
    )


def frame_of(series: Sequence[Series]) -> Frame:
    """Ranges that hold every point, the vertical one widened to round numbers."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low, high = min(ys), max(ys)
    if high - low < 1e-9 * max(1.0, abs(high)):
        below, above = (0.5 * (abs(y) if abs(y) > 1e-300 else 1.0) for y in (low, high))  # half of 5e-324 is 0
        low, high = low - below, high + above
    step = tick_step(low, high)
    first = min(xs)
    return Frame((first, max(max(xs), first + 1)), (math.floor(low / step) * step, math.ceil(high / step) * step))


def tick_step(low: float, high: float, most: int = 5) -> float:
    """1, 2 or 5 times a power of ten, so that at most about `most` steps cover the range."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)


def four_digits(value: float) -> str:
    """Four significant digits, a true minus."""
    return f"{value + 0.0:.4g}".replace("-", "\N{MINUS SIGN}")


def _ticks(low: float, high: float) -> list[float]:
    step = tick_step(low, high)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(frame: Frame) -> str:
    parts = []
    for value in _ticks(*frame.y):
        _, y = frame.place(frame.x[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{four_digits(value)}</text>')
    for value in [v for v in _ticks(*frame.x) if v == round(v)]:
        x, _ = frame.place(value, frame.y[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:,.0f}</text>')
    return "".join(parts)


def _line_key(series: Series) -> str:
    dash = "; border-top-style: dashed" if series.colour % 4 else ""
    return f'<span><i class="line" style="color: var(--c{series.colour}){dash}"></i> {escape(series.name)}</span>'


def _dots_key(dotted: Sequence[Series]) -> str:
    """One entry: dots have the colours of their lines."""
    if not dotted:
        return ""
    colour = f"var(--c{dotted[0].colour})" if len(dotted) == 1 else "currentColor"
    words = dotted[0].name.rpartition(", ")[2]
    return f'<span><i class="dots" style="color: {colour}"></i> {escape(words)}</span>'


def _polyline(series: Series, frame: Frame) -> str:
    if len(series.points) == 1:
        return _dots(series, frame)
    path = " ".join("{:.1f},{:.1f}".format(*frame.place(*point)) for point in series.points)
    dash = f' stroke-dasharray="{DASHES[series.colour % 4]}"' if series.colour % 4 else ""
    return f'<polyline points="{path}" fill="none" stroke="var(--c{series.colour})" stroke-width="1.8"{dash}/>'


def _dots(series: Series, frame: Frame) -> str:
    places = [frame.place(*point) for point in series.points]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)
    return f'<g fill="var(--c{series.colour})">{dots}</g>'


def _strips(series: Sequence[Series], frame: Frame) -> str:
    """Upright strips that say on hover what the lines are worth there."""
    steps = sorted({x for s in series for x, _ in s.points})
    shown = steps if len(steps) <= STRIPS else [steps[i * (len(steps) - 1) // (STRIPS - 1)] for i in range(STRIPS)]
    values = [(s.name, dict(s.points)) for s in series]
    width, height, parts = (WIDTH - LEFT - 8) / max(len(shown), 1), HEIGHT - TOP - BOTTOM, []
    for step in shown:
        x, _ = frame.place(step, frame.y[0])
        here = "\n".join(f"{name} {four_digits(at[step])}" for name, at in values if step in at)
        parts.append(
            f'<rect class="strip" x="{x - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height}">'
            f"<title>step {step:g}\n{escape(here)}</title></rect>"
        )
    return "".join(parts)
