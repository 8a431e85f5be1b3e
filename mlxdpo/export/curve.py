"""The training curve as a small picture for the card: loss and reward accuracy over steps, held-out points on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxdpo.runs import write_atomic

Lines = Sequence[dict[str, Any]]
INCHES, DPI = (7.2, 2.6), 120
PANELS = (("loss", "loss"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))


def draw_curve(metrics: Lines, file: Path) -> bool:
    """Write the picture; False, and no picture, where the metrics hold no training step."""
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _panel(axes, steps, metrics, name, title)
    write_atomic(file, lambda copy: figure.savefig(copy, format="png", metadata={"Software": None}))
    return True


def _panel(
    axes: Any, steps: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]], name: str, title: str
) -> None:
    shown = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
    held = [(line["step"], line[f"eval_{name}"]) for line in metrics if line.get(f"eval_{name}") is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), linewidth=1.2, color="#3b6ea5", label="training")
    if held:
        axes.plot(*zip(*held, strict=True), "o", markersize=3.5, color="#c2571a", label="held out")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if name == "loss" and (shown or held):
        axes.legend(fontsize=7, frameon=False)
