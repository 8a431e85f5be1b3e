"""What is done with a finished run: Evaluate, Dial and Export, each a process of its own in RUN/job/NAME/.

What they are told is chosen from what there is: no path, address or program is typed on the page, and nothing is
uploaded from it. No postponed annotations: Gradio reads `gr.Request` off them.
"""

import shlex
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.exporters import EXPORTERS, RECORD, read_record
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.types import UserError
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.jobs import job_html, spawn, written_at
from mlxdpo.ui.runs.run_list import JOB, choose, raw_settings, refuse_strange_code, scan, state
from mlxdpo.ui.widgets import QUIET, html_table, or_alert, show_errors

WITHOUT_JUDGE = ("no judge: held-out pairs alone", "")
PROGRAMS = {"vader": "vaderSentiment", "textblob": "textblob"}
"""Judges that need a package."""
TARGETS = {
    "mlx": "MLX adapter, for mlx_lm",
    "peft": "PEFT adapter, for torch",
    "hf": "Hugging Face weights",
    "fused": "MLX weights, fused",
    "quantized": "MLX weights, fused and packed again",
    "packed-base": "MLX adapter over a packed base",
    "gguf": "GGUF, for llama.cpp",
    "gguf-lora": "GGUF adapter, for llama.cpp",
    "ollama": "Ollama: Modelfile and weights",
    "lmstudio": "LM Studio: folder and preset",
    "server": "what mlx_lm.server serves",
}
"""What an export is for; without an entry the target's own name is shown."""


class Task(NamedTuple):
    """A command on a run: its name (`mlxdpo NAME`), its button, the words behind the run, and the file in the run that
    it leaves, with what the page shows of it."""

    name: str
    button: str
    options: Callable[..., list[str]]
    leaves: str
    result: Callable[[Path], str]


def judges(runs: Path, path: Path) -> list[tuple[str, str]]:
    """(words, specification) of the judges that need nothing from outside: rewards, human votes, reward models."""
    found = [WITHOUT_JUDGE, *((name, name) for name, module in PROGRAMS.items() if find_spec(module))]
    found.append(("longest: the longer answer", "longest"))
    if isfile(path / "votes.jsonl"):
        found.append(("your blind votes", f"votes:{path / 'votes.jsonl'}"))
    for name, other in scan(runs).items():
        if raw_settings(other).get("stage") == "reward" and state(other) == "finished":
            found.append((f"reward model {name}", f"reward:{other}"))
    return found


def _checked_judge(runs: Path, path: Path, judge: str | None) -> list[str]:
    if judge not in [spec for _, spec in judges(runs, path)]:
        raise UserError(f"there is no judge {str(judge)[:80]!r} here; choose one of the list")
    return [f"--judge={judge}"] if judge else []


def evaluate_options(runs: Path, path: Path, judge: str | None, prompts: float) -> list[str]:
    """The options of `mlxdpo eval`. Raises `UserError` for a judge that was not offered."""
    return [*_checked_judge(runs, path, judge), f"--prompts={int(prompts)}"]


def export_options(runs: Path, path: Path, targets: Sequence[str] | None, strength: float) -> list[str]:
    """The options of `mlxdpo export`; the folder is RUN/export. Raises `UserError` for other targets, and for none."""
    if not targets or any(name not in EXPORTERS for name in targets):
        raise UserError(f"choose what to export to: {', '.join(EXPORTERS)}")
    at = [] if strength == 1 else [f"--strength={strength:g}"]
    return [f"--to={','.join(targets)}", f"--out={path / 'export'}", *at]


def start_task(runs: Path, path: Path, task: Task, *values: Any) -> list[str]:
    """Begin a task on a finished run; gives its command. Raises `UserError` where the page cannot start it."""
    if state(path) != "finished":
        raise UserError(f"{path.name} is {state(path)}; wait until it is finished")
    command = ["mlxdpo", task.name, str(path), *task.options(runs, path, *values)]
    refuse_strange_code(path, command)
    spawn(path / JOB / task.name, command, f"{task.button} is at work on {path.name} already; wait for it to end")
    return command


def task_html(path: Path, task: Task) -> str:
    """Where the last process of a task stands; empty where there was none from this page."""
    return job_html(path / JOB / task.name, task.button)


def report_frame(path: Path) -> str:
    """The evaluation report in a frame that runs no script and reaches nothing; or how to get one."""
    file = path / "report.html"
    if not isfile(file):
        return f"<p>Not evaluated yet. Press Evaluate, or in a terminal: <code>{_task_command('eval', path)}</code></p>"
    return page_frame(file, f"Evaluation report of {path.name}")


def page_frame(file: Path, title: str) -> str:
    """A page that one of our commands wrote, in a frame."""
    page = escape(file.read_text("utf-8", errors="replace"))
    return (
        f'<iframe title="{escape(title)}" sandbox="" referrerpolicy="no-referrer"'
        ' style="width:100%;height:75vh;border:1px solid var(--border-color-primary);background:#fff"'
        f' srcdoc="{page}"></iframe>'
    )


DIAL = ("strength", "accuracy", "margin", "loss", "KL, nats a sequence", "win rate")


@or_alert
def dial_html(path: Path) -> str:
    """What `mlxdpo dial` measured, the strength to take marked; or how to measure it."""
    file = path / "eval" / "dial.json"
    if not isfile(file):
        how = f"Press Dial, or in a terminal: <code>{_task_command('dial', path)}</code>"
        return f"<p>Not measured yet: what is each strength of the tuning worth? {how}</p>"
    found = read_json(file)
    with as_written(file, f"run `mlxdpo dial {path}` again"):
        rows = [[f"{p['strength']:g}", *(_three_digits(p[name]) for name in DIALLED)] for p in found["points"]]
        best = f"{found['recommended']:g}"
        sentence = f"Take strength {best}: {found['reason']}"
    return (
        f"<p><strong>{escape(sentence)}</strong></p>{html_table(f'{path.name} at several strengths', DIAL, rows, best)}"
    )


DIALLED = ("accuracy", "margin", "loss", "kl", "win_rate")


def _three_digits(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.3f}"


GATE = ("target", "size", "token KL", "gate", "folder")


@or_alert
def export_html(path: Path) -> str:
    """What the last export wrote and what its gate measured; or how to export."""
    out = path / "export"
    if not isfile(out / RECORD):
        return "<p>Not exported from this page yet. Each target is loaded again and compared with the run.</p>"
    record = read_record(out)
    rows = [
        [
            name,
            f"{sum(target.files.values()) / 1e6:.1f} MB" if target.kept else "",
            f"{target.fidelity.token_kl:.2e} nats" if target.fidelity.token_kl is not None else "",
            "passed" if target.fidelity.passed else f"failed: {target.fidelity.reason}",
            str(out / target.folder) if target.kept else "not kept",
        ]
        for name, target in record.targets.items()
    ]
    strength = "" if record.strength == 1 else f" at strength {record.strength:g}"
    return html_table(f"Export of {path.name}{strength}, in {out}", GATE, rows)


def _task_command(name: str, path: Path) -> str:
    return escape(shlex.join(["mlxdpo", name, str(path)]))


EVALUATE = Task("eval", "Evaluate", evaluate_options, "report.html", report_frame)
MEASURE = Task("dial", "Dial", evaluate_options, "eval/dial.json", dial_html)
EXPORT = Task("export", "Export", export_options, f"export/{RECORD}", export_html)


def build_tasks(gr: Any, runs: Path, guard: Guard, chosen: Any, timer: Any) -> None:
    """The tabs Evaluation, Dial and Export of the chosen run."""
    with gr.Tab("Evaluation"):
        about = "Is it better than before? Held-out pairs, judged answers before and after, and what it cost."
        _task_panel(gr, runs, guard, (chosen, timer), EVALUATE, about, _judged_widgets(gr, runs, chosen, 100))
    with gr.Tab("Dial"):
        about = "How much of the tuning to take: 0 is the model before, 1 as trained. Nothing is trained."
        _task_panel(gr, runs, guard, (chosen, timer), MEASURE, about, _judged_widgets(gr, runs, chosen, 50))
    with gr.Tab("Export"):
        with gr.Row():
            names = [(TARGETS.get(name, name), name) for name in EXPORTERS]
            targets = gr.CheckboxGroup(names, value=["mlx"], label="For", elem_id="runs-targets", min_width=240)
        strength = gr.Slider(0.05, 2, 1.0, step=0.05, label="Strength of the tuning", elem_id="runs-export-strength")
        about = "Files that other programs load. A target that does not behave like the run is not kept."
        _task_panel(gr, runs, guard, (chosen, timer), EXPORT, about, [targets, strength])


def _judged_widgets(gr: Any, runs: Path, chosen: Any, prompts: int) -> list[Any]:
    with gr.Row():
        judge = gr.Dropdown([WITHOUT_JUDGE], value="", label="Judge of the answers", min_width=200)
        count = gr.Number(prompts, label="Prompts to answer", precision=0, minimum=1, maximum=100_000, min_width=160)
    offered = lambda name: gr.update(choices=judges(runs, choose(runs, name)), value="") if name else gr.skip()  # noqa: E731
    chosen.change(offered, chosen, judge, **QUIET)
    return [judge, count]


def _task_panel(
    gr: Any, runs: Path, guard: Guard, watched: tuple[Any, Any], task: Task, about: str, widgets: list[Any]
) -> None:
    """A task's button, its process, and its result, all of the chosen run."""
    chosen, timer = watched
    gr.HTML(f'<p class="quiet">{escape(about)}</p>')
    begin = gr.Button(task.button, variant="primary", elem_id=f"runs-{task.name}")
    status, result = gr.HTML(elem_id=f"runs-{task.name}-status"), gr.HTML(elem_id=f"runs-{task.name}-result")
    before = gr.State(None)

    def started(request: gr.Request, name: str | None, *values: Any) -> str:  # pyright: ignore[reportInvalidTypeForm]
        """Begin it on the chosen run."""
        guard(request)
        with show_errors():
            path = choose(runs, name)
            start_task(runs, path, task, *values)
        return task_html(path, task)

    def shown(name: str | None, last: Sequence[Any] | None) -> Any:
        """Process and result of the chosen run, where something has changed: a report is not read at every tick."""
        if name not in scan(runs):
            return (gr.skip(),) * 3
        path = choose(runs, name)
        now = (str(path), written_at(path / task.leaves), task_html(path, task))
        if last is not None and list(now) == list(last):
            return (gr.skip(),) * 3
        same = last is not None and list(now[:2]) == list(last[:2])
        return now, now[2], gr.skip() if same else task.result(path)

    begin.click(started, [chosen, *widgets], status, concurrency_limit=1, **QUIET)
    for happening in (chosen.change, timer.tick):
        happening(shown, [chosen, before], [before, status, result], **QUIET)
