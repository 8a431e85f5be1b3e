"""The Runs tab: which runs there are, the curves of one, live while it trains, its report, and how two runs differ.

Everything that comes from a file is escaped.
"""

from collections.abc import Mapping
from html import escape
from os.path import isfile
from pathlib import Path
from typing import Any

from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.training import checkpoint
from mlxdpo.types import UserError
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.chart import STYLE, Series, chart
from mlxdpo.ui.runs.curves import Line, Tail, follow_metrics, points
from mlxdpo.ui.runs.run_list import HEADERS, choose, newest_evaluation, raw_settings, scan, state, summary_rows
from mlxdpo.ui.runs.tasks import build_tasks, page_frame
from mlxdpo.ui.widgets import QUIET, connect_clicks, html_table, or_alert, row_clicks
from mlxdpo_eval.report.rounds import NOTE, round_cells, round_columns, rounds_verdict
from mlxdpo_eval.report.sweep import SWEEP_COLUMNS, sweep_cells
from mlxdpo_eval.sweep_results import sweep_results, sweep_sentence

EVERY = 2.0  # seconds between looks at the files
NO_RUNS = (
    "<p>There is no run in <code>{}</code> yet. Start one in the Train tab, or in a terminal:"
    " <code>mlxdpo demo</code>. This page finds it by itself.</p>"
)


def build(runs: Path, guard: Guard) -> None:
    """Fill the tab."""
    import gradio as gr

    shown, tail = gr.State(""), gr.State(None)
    listing = gr.HTML(elem_id="runs-table", js_on_load=row_clicks("runs-opened"))
    with gr.Row():
        chosen = gr.Dropdown([], label="Run", elem_id="runs-chosen")
        other = gr.Dropdown([], label="Compare its settings with", elem_id="runs-other")
    status = gr.HTML(elem_id="runs-status")
    page, timer = gr.context.Context.root_block, gr.Timer(EVERY)
    with gr.Tabs(elem_id="runs-opened"):
        with gr.Tab("Curves"):
            curves = gr.HTML("<p>Choose a run.</p>", elem_id="runs-curves")
        build_tasks(gr, runs, guard, chosen, timer)
        with gr.Tab("Checkpoints"):
            kept = gr.HTML(elem_id="runs-checkpoints")
        with gr.Tab("Sweep"):
            sweeps = gr.HTML(elem_id="runs-sweep")
        with gr.Tab("Rounds"):
            beside = gr.HTML(elem_id="runs-rounds")
        with gr.Tab("Settings compared"):
            differing = gr.HTML(elem_id="runs-difference")

    refresh = {"fn": lambda *now: _runs_listed(gr, runs, *now), "inputs": [shown, chosen, other]}
    watch = {"fn": lambda *now: _watched(gr, runs, *now), "inputs": [chosen, tail]}
    for happening in (page.load, timer.tick):
        happening(**refresh, outputs=[shown, listing, chosen, other], **QUIET)
    for happening in (chosen.change, timer.tick):
        happening(**watch, outputs=[tail, status, curves, kept], **QUIET)
    for place, words in ((beside, rounds), (sweeps, sweep_html)):
        chosen.change(lambda name, words=words: words(choose(runs, name)) if name else "", chosen, place, **QUIET)
    for happening in (chosen.change, other.change):
        happening(lambda a, b: compared(runs, a, b), [chosen, other], differing, **QUIET)
    connect_clicks(listing, lambda name, act: choose(runs, name) and name, None, chosen)


def _runs_listed(gr: Any, runs: Path, before: str, name: str | None, second: str | None) -> Any:
    """The list, and the choices of both drop-downs, when something has changed."""
    rows = summary_rows(runs)
    names = [row[0] for row in rows]
    name = name if name in names else next(iter(names), None)
    html = html_table("Runs", HEADERS, rows, name, opens=True) if rows else NO_RUNS.format(escape(str(runs)))
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


@or_alert
def rounds(path: Path) -> str:
    """The rounds around the run at `path`, its own marked; or how there would be some."""
    file = path.parent / "rounds.json"
    if not file.exists():
        return (
            "<p>This run is not one of several rounds. In a terminal: <code>mlxdpo iterate RECIPE --rounds 3</code></p>"
        )
    found = read_json(file)
    with as_written(file, "run `mlxdpo iterate` again"):
        why = f"<p>Stopped: {escape(found['stopped'])}.</p>" if found["stopped"] else ""
        rows = round_cells(found["rounds"])
        shown = html_table(f"Rounds of {path.parent.name}", round_columns(found["rounds"]), rows, path.name)
        return f"<p><strong>{escape(rounds_verdict(found)[1])}</strong></p>{why}{shown}<p>{escape(NOTE)}</p>"


@or_alert
def sweep_html(path: Path) -> str:
    """The sweep that the run at `path` is part of, as far as it has come; or how there would be one."""
    folder = path.parent
    if not isfile(folder / "sweep.json"):
        command = "mlxdpo sweep RECIPE.yaml --loss.beta 0.05,0.1,0.3 --seeds 3 --out runs/sweep"
        return f"<p>This run is not part of a sweep. In a terminal: <code>{escape(command)}</code></p>"
    found = sweep_results(folder)
    shown = html_table(f"Settings of {folder.name}", SWEEP_COLUMNS, sweep_cells(found), found.best)
    report = folder / "report.html"
    page = page_frame(report, f"Report of the sweep {folder.name}") if isfile(report) else ""
    return f"<p><strong>{escape(sweep_sentence(found))}</strong></p>{shown}{page}"


CHARTS: tuple[tuple[str, tuple[tuple[str, str, int], ...]], ...] = (
    ("Loss (nats)", (("loss", "loss", 0),)),
    (
        "Rewards: β · log π/π_ref (nats)",
        (("rewards/chosen", "chosen", 0), ("rewards/rejected", "rejected", 1), ("rewards/margins", "margin", 2)),
    ),
    ("Accuracy: pairs ranked correctly", (("rewards/accuracies", "accuracy", 0),)),
    ("Gradient norm", (("grad_norm", "gradient norm", 0),)),
    ("KL from the reference (nats)", (("kl", "KL", 0),)),
    ("Completion log-probs (nats)", (("logps/chosen", "chosen", 0), ("logps/rejected", "rejected", 1))),
    (
        "Memory of MLX (GB)",
        (("peak_memory_gb", "peak", 0), ("active_memory_gb", "in use", 1), ("cache_memory_gb", "cached", 2)),
    ),
)
KL_EMPTY = "Not measured while training; mlxdpo eval measures it on the tuned model's own answers."
CHECKPOINT_HEADERS = ("checkpoint", "step", "loss", "margin", "held-out loss", "held-out accuracy", "note")


def charts(tail: Tail, results: Mapping[str, Any]) -> str:
    """The run's figures. KL is known from `results`, the newest evaluation, alone."""
    if not tail.steps and not tail.evals:
        return "<p>No step yet. Curves appear with the first step and update during training.</p>"
    kl = number_at(results, "drift", "kl")
    last = tail.steps[-1]["step"] if tail.steps else 0
    figures = []
    for title, metrics in CHARTS:
        alone = len(metrics) == 1
        series = [s for metric in metrics for s in _series(tail, *metric, 1 if alone else metric[2])]
        if title.startswith("KL") and kl is not None:
            series.append(Series("evaluated at the end", [(last, kl)], "dots", 1))
        figures.append(chart(title, series, KL_EMPTY if title.startswith("KL") else "Nothing measured yet."))
    note = "<p>This file is long: the curves are a sample of its lines.</p>" if tail.sampled else ""
    if tail.damaged:
        note += f'<p role="alert">{tail.damaged:,} lines of metrics.jsonl are corrupted and skipped.</p>'
    return f'{STYLE}{note}<div class="charts">{"".join(figures)}</div>'


def _series(tail: Tail, metric: str, name: str, colour: int, held: int) -> list[Series]:
    """Training as a line in `colour`, held-out values as dots in `held`."""
    return [
        Series(name, points(tail.steps, metric), "line", colour),
        Series(f"{name}, held out", points(tail.evals, f"eval_{metric}"), "dots", held),
    ]


def checkpoints(path: Path, tail: Tail) -> list[list[str]]:
    """Kept checkpoints, newest first, with the numbers of their step, for the columns of `CHECKPOINT_HEADERS`."""
    steps = {line["step"]: line for line in tail.steps}
    evals = {line["step"]: line for line in tail.evals}
    folders = [folder for folder in reversed(checkpoint.steps(path / "checkpoints")) if folder.name[5:].isdecimal()]
    held_out = [line for line in evals.values() if isinstance(line["eval_loss"], int | float)]
    best = min(held_out, key=lambda line: line["eval_loss"], default={}).get("step")
    rows = []
    for folder in folders:
        step = int(folder.name.removeprefix("step-"))
        line, held = steps.get(step, {}), evals.get(step, {})
        notes = ["newest"] if folder == folders[0] else []
        notes += ["lowest held-out loss"] if step == best else []
        numbers = (
            _cell(line, "loss"),
            _cell(line, "rewards/margins"),
            _cell(held, "eval_loss"),
            _cell(held, "eval_rewards/accuracies"),
        )
        rows.append([folder.name, str(step), *numbers, ", ".join(notes)])
    return rows


def _cell(line: Line, name: str) -> str:
    value = line.get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def headline(path: Path) -> str:
    """The newest evaluation's verdict in one sentence, empty without one; or what is wrong with its file."""
    try:
        headline = newest_evaluation(path).get("headline")
    except UserError as error:
        return escape(str(error))
    return escape(str(headline.get("sentence", ""))) if isinstance(headline, Mapping) else ""


def measured(path: Path) -> Mapping[str, Any]:
    """The newest evaluation, empty where there is none or `headline` says that its file is damaged."""
    try:
        return newest_evaluation(path)
    except UserError:
        return {}


def number_at(values: Any, *names: str) -> float | None:
    """The number at a place in nested objects, None where there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values if isinstance(values, int | float) else None


def difference(a: Path, b: Path) -> list[list[str]]:
    """Settings that differ between two runs, as (dotted name, value in a, value in b); `out` always does."""
    left, right = flat(raw_settings(a)), flat(raw_settings(b))
    names = [name for name in {**left, **right} if left.get(name, ...) != right.get(name, ...) and name != "out"]
    return [[name, _setting_text(left, name), _setting_text(right, name)] for name in names]


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"lora": {"rank": 8}} as {"lora.rank": 8}; an empty section stays a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def _setting_text(settings: Mapping[str, Any], name: str) -> str:
    return "(not set)" if name not in settings else str(settings[name])
