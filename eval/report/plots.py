"""Plots as inline SVG that take the page's own colours, so that they follow light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Stand-ins drawn by matplotlib and replaced by the page's variables.
INK, ACCENT, MUTED, LINE = "#010101", "#020202", "#030303", "#040404"
COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)", LINE: "var(--line)"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlxdpo",
    "text.parse_math": False,  # a judge may be called $5
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": LINE,
}
DOTTED = {"color": INK, "linewidth": 1, "linestyle": (0, (2, 3))}  # the line of no difference


class Figure(NamedTuple):
    """A plot: its SVG element, and the same in words for who cannot see it."""

    svg: str
    caption: str


def evaluation_plots(results: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Figure]]:
    """The plots of an evaluation by the section they belong to."""
    found: dict[str, list[Figure]] = {"winrates": [], "pairs": [], "votes": []}
    if results["winrates"]:
        found["winrates"].append(win_rates(results))
    if results["votes"] and results["votes"]["n"]:
        found["votes"].append(running_votes(results["votes"]))
    margins = [line["margin"] for line in pairs]
    if any(margins):
        found["pairs"] += [margin_histogram(margins), reliability_plot(results["pairs"]["calibration"]["bins"])]
    return found


def win_rates(results: Mapping[str, Any]) -> Figure:
    """Each judge's win rate with its interval, and the controls, against one half."""
    controls = results["controls"]
    rows = [(w["judge"], w, ACCENT) for w in results["winrates"]]
    rows.append(("always the longest", controls["longest"], MUTED))
    rows += [(f"untuned vs itself, {w['judge']}", w, MUTED) for w in controls["reference_vs_reference"]]
    rows = [row for row in rows if row[1]["rate"] is not None]
    figure, axes = _new_axes(0.6 + 0.42 * len(rows))
    axes.axvline(0.5, **DOTTED)
    for y, (_, w, colour) in enumerate(rows):
        low, high = (w["interval"]["low"], w["interval"]["high"]) if w["interval"] else (w["rate"], w["rate"])
        axes.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot([w["rate"]], [y], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), [_shorten(name) for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("win rate, 95 % interval")
    words = "; ".join(f"{name} {w['rate']:.3f}" for name, w, _ in rows)
    return Figure(
        _svg(figure, "winrates"), f"Win rates with intervals; the dotted line is one half, grey are controls: {words}."
    )


def margin_histogram(margins: Sequence[float]) -> Figure:
    """Reward margins of the held-out pairs; right of 0 the chosen answer has the higher reward."""
    figure, axes = _new_axes(2.6, 4.6)
    _, _, bars = axes.hist(margins, bins=min(30, max(8, len(margins) // 8)), color=ACCENT)
    for bar in bars:
        if bar.get_x() + bar.get_width() / 2 < 0:
            bar.set_color(MUTED)
    axes.axvline(0, **DOTTED)
    axes.set_xlabel("reward margin")
    axes.set_ylabel("held-out pairs")
    return Figure(
        _svg(figure, "margins"), "Reward margins of held-out pairs; right of 0 the chosen answer has the higher reward."
    )


def reliability_plot(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Share right against confidence, in bins of equal size; the diagonal is perfect."""
    figure, axes = _new_axes(2.6, 4.6)
    axes.plot([0.5, 1], [0.5, 1], **DOTTED)
    for b in bins:
        if b["interval"]:
            axes.plot([b["confidence"]] * 2, [b["interval"]["low"], b["interval"]["high"]], color=ACCENT, alpha=0.4)
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o", color=ACCENT, markersize=5)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence, sigmoid |margin|")
    axes.set_ylabel("share right")
    return Figure(
        _svg(figure, "reliability"),
        "Calibration: share of pairs ranked correctly against confidence; the dotted line is perfect.",
    )


def running_votes(votes: Mapping[str, Any]) -> Figure:
    """The rate after each vote in its always-valid interval."""
    looks = votes["looks"]
    n, rate, low, high = ([look[name] for look in looks] for name in ("n", "rate", "low", "high"))
    figure, axes = _new_axes(2.6)
    axes.axhline(0.5, **DOTTED)
    axes.fill_between(n, low, high, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(n, rate, color=ACCENT, linewidth=2, marker="o" if len(n) == 1 else "")
    if votes["decided_at"] is not None:
        axes.axvline(votes["decided_at"], color=MUTED, linewidth=1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("votes")
    axes.set_ylabel("tuned preferred")
    last = looks[-1]
    words = f"after {last['n']} votes {last['rate']:.3f}, {last['low']:.3f} to {last['high']:.3f}"
    return Figure(
        _svg(figure, "votes"), f"Share of votes for the tuned answers, with an interval for every look: {words}."
    )


def reward_over_drift(points: Sequence[Any], best: Sequence[Any], label: str, even: float | None = 0.5) -> Figure:
    """Points of a frontier with their intervals; the line joins those that no other beats. `even`: no difference."""
    figure, axes = _new_axes(3.6)
    if even is not None:
        axes.axhline(even, **DOTTED)
    for p in points:
        colour = ACCENT if p in best else MUTED
        x, y = p.kl_interval or (p.kl, p.kl, p.kl), p.reward_interval or (p.reward, p.reward, p.reward)
        axes.plot([x[1], x[2]], [p.reward] * 2, color=colour, linewidth=1)
        axes.plot([p.kl] * 2, [y[1], y[2]], color=colour, linewidth=1)
        axes.plot([p.kl], [p.reward], "o", color=colour, markersize=6)
        _annotate(axes, p.name, (p.kl, p.reward))
    axes.plot([p.kl for p in best], [p.reward for p in best], color=ACCENT, linewidth=1.5)
    axes.set_xlabel("sequence KL to the reference, nats")
    axes.set_ylabel(_shorten(label, 36))
    words = "; ".join(f"{p.name} {p.kl:.2f} nats, {p.reward:.3f}" for p in points)
    return Figure(
        _svg(figure, "frontier"), f"Reward against drift; the line joins points that no other beats: {words}."
    )


def scores_over_rounds(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each judge's mean score from the start through the rounds, with its interval; the first judge in colour."""
    figure, axes = _new_axes(2.6)
    words = []
    for place, judge in enumerate(rows[0]["judges"]):
        colour, line = (ACCENT, "-") if place == 0 else (MUTED, (0, (4, 2)))
        points = [(row["round"], row["judges"][place]) for row in rows if row["judges"][place]["mean"] is not None]
        axes.plot([x for x, _ in points], [j["mean"] for _, j in points], "o", color=colour, linestyle=line)
        for x, one in points:
            if one["interval"]:
                axes.plot([x, x], [one["interval"]["low"], one["interval"]["high"]], color=colour, linewidth=1)
        if points:
            _annotate(axes, judge["name"], (points[-1][0], points[-1][1]["mean"]))
        words.append(f"{judge['name']} " + ", ".join(f"{one['mean']:.3f}" for _, one in points))
    axes.set_xticks([row["round"] for row in rows])
    axes.set_xlabel("round (0 is the start)")
    axes.set_ylabel("mean score")
    return Figure(_svg(figure, "rounds"), f"Mean held-out score by round, with 95 % intervals: {'; '.join(words)}.")


def heldout_curves(curves: Mapping[str, Sequence[tuple[float, float]]], best: str | None, measure: str) -> Figure:
    """A held-out measure over the share of steps, a line for each setting; the best one in colour."""
    figure, axes = _new_axes(3.2)
    words = []
    for name, curve in curves.items():
        if curve:
            shares, values = zip(*curve, strict=True)
            axes.plot(shares, values, color=ACCENT if name == best else MUTED, linewidth=2 if name == best else 1)
            _annotate(axes, name, curve[-1])
            words.append(f"{name} {values[0]:.3f} to {values[-1]:.3f}")
    axes.set_xlim(0, 1.25)  # room for names
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("share of steps")
    axes.set_ylabel(f"held-out {measure}")
    return Figure(_svg(figure, "curves"), f"Held-out {measure} while training, mean of seeds: {'; '.join(words)}.")


def _shorten(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _annotate(axes: Any, name: str, point: tuple[float, float]) -> None:
    axes.annotate(_shorten(name), point, (5, 5), textcoords="offset points", fontsize=9, color=INK)


def _new_axes(height: float, width: float = 4.8) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        axes = canvas.add_subplot()
        canvas.patch.set_visible(False)
        axes.patch.set_visible(False)
    return canvas, axes


def _svg(figure: Any, name: str) -> str:
    """The `<svg>` element alone: no outside reference, no fixed size, ids that no other plot has."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return text.replace("<svg", f'<svg class="{name}" aria-hidden="true"', 1)
