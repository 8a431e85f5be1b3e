"""The Runs tab: which runs there are, the curves of one, live while it trains, its report, and how two runs differ."""

from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.types import UserError
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.curves import Tail, follow_metrics
from mlxdpo.ui.runs.run_list import HEADERS, choose, scan, state, summary_rows
from mlxdpo.ui.runs.run_view import (
    CHECKPOINT_HEADERS,
    charts,
    checkpoints,
    difference,
    headline,
    measured,
    report_frame,
    rounds,
)
from mlxdpo.ui.widgets import QUIET, html_table

EVERY = 2.0  # seconds between looks at the files
NO_RUNS = (
    "<p>There is no run in <code>{}</code> yet. Start one in the Train tab, or in a terminal:"
    " <code>mlxdpo demo</code>. This page finds it by itself.</p>"
)


def build(runs: Path, guard: Guard) -> None:  # nothing here changes anything, so the guard is not asked
    """Fill the tab."""
    import gradio as gr

    shown, tail = gr.State(""), gr.State(None)
    listing = gr.HTML(elem_id="runs-table")
    with gr.Row():
        chosen = gr.Dropdown([], label="Run", elem_id="runs-chosen")
        other = gr.Dropdown([], label="Compare its settings with", elem_id="runs-other")
    status = gr.HTML(elem_id="runs-status")
    with gr.Tab("Curves"):
        curves = gr.HTML("<p>Choose a run.</p>", elem_id="runs-curves")
    with gr.Tab("Checkpoints"):
        kept = gr.HTML(elem_id="runs-checkpoints")
    with gr.Tab("Evaluation"):
        evaluated = gr.HTML(elem_id="runs-report")
    with gr.Tab("Rounds"):
        beside = gr.HTML(elem_id="runs-rounds")
    with gr.Tab("Settings compared"):
        differing = gr.HTML(elem_id="runs-difference")

    page, timer = gr.context.Context.root_block, gr.Timer(EVERY)
    refresh = {"fn": lambda *now: _runs_listed(gr, runs, *now), "inputs": [shown, chosen, other]}
    watch = {"fn": lambda *now: _watched(gr, runs, *now), "inputs": [chosen, tail]}
    for happening in (page.load, timer.tick):
        happening(**refresh, outputs=[shown, listing, chosen, other], **QUIET)
    for happening in (chosen.change, timer.tick):
        happening(**watch, outputs=[tail, status, curves, kept], **QUIET)
    chosen.change(lambda name: report_frame(choose(runs, name)) if name else "", chosen, evaluated, **QUIET)
    chosen.change(lambda name: rounds(choose(runs, name)) if name else "", chosen, beside, **QUIET)
    for happening in (chosen.change, other.change):
        happening(lambda a, b: compared(runs, a, b), [chosen, other], differing, **QUIET)


def _runs_listed(gr: Any, runs: Path, before: str, name: str | None, second: str | None) -> Any:
    """The list, and the choices of both drop-downs, when something has changed."""
    rows = summary_rows(runs)
    names = [row[0] for row in rows]
    name = name if name in names else next(iter(names), None)
    html = html_table("Runs", HEADERS, rows, name) if rows else NO_RUNS.format(escape(str(runs)))
    if html == before:
        return (gr.skip(),) * 4
    other = gr.update(choices=names, value=second if second in names else None)
    return html, html, gr.update(choices=names, value=name), other


def _watched(gr: Any, runs: Path, name: str | None, before: Tail | None) -> Any:
    """The new tail, the state's words, the charts and the checkpoints; what has not changed is left as it is."""
    if name not in scan(runs):
        return (gr.skip(),) * 4
    path = choose(runs, name)
    file = path / "metrics.jsonl"
    tail = before if before is not None and before.file == file else Tail(file)
    moved = follow_metrics(tail) or tail is not before
    words = f"<p><strong>{escape(name)}: {escape(state(path))}.</strong> {headline(path)}</p>"
    if not moved:
        return gr.skip(), words, gr.skip(), gr.skip()
    kept = html_table(
        "Kept checkpoints; the Compare tab can answer with any of them", CHECKPOINT_HEADERS, checkpoints(path, tail)
    )
    return tail, words, charts(tail, measured(path)), kept


def compared(runs: Path, a: str | None, b: str | None) -> str:
    """The settings in which two runs differ, or what to do."""
    if not a or not b:
        return "<p>Choose a second run above: the settings that differ are listed here.</p>"
    try:
        rows = difference(choose(runs, a), choose(runs, b))
    except UserError as error:
        return f"<p>{escape(str(error))}</p>"
    return (
        html_table("Settings that differ", ("setting", a, b), rows)
        if rows
        else "<p>The two runs have the same settings.</p>"
    )
