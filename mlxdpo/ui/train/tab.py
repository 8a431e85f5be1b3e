"""The Train tab: model, data and recipe; what it will need; start, watch, stop, resume.

A training is a process of its own (`process.py`), so the page answers meanwhile and closing it stops nothing. What
a run will need is asked of `mlxdpo plan` in another process: the page's never loads a model's shape.
"""

import json
import shlex
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.config import Config, load_config
from mlxdpo.estimate.forecast import PARTS
from mlxdpo.io.progress import clock
from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.guard import Guard
from mlxdpo.ui.runs.run_list import choose, scan, state
from mlxdpo.ui.train import process, recipe_form
from mlxdpo.ui.train.process import Watched, watch
from mlxdpo.ui.train.recipe_form import CHOSEN, VISIBLE, Knob, flags
from mlxdpo.ui.widgets import QUIET, html_table, show_errors

EVERY = 2.0  # seconds between looks at the files
PATHS = [name for name in CHOSEN if name != "out"]
NONE = [("none", "")]
NO_CODE = "Python code that comes with a model is never run from this page: train such a model in a terminal, with \
`--model.trust-remote-code`, once you have read it."
HUB = "Or the id of one on the Hugging Face Hub: owner/name."
PATH_FIELDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "model.path": ("Model", HUB, {"value": "smollm2", "allow_custom_value": True, "elem_id": "train-model"}),
    "data.path": ("Preference data", HUB, {"value": "", "allow_custom_value": True, "elem_id": "train-data"}),
    "data.eval": ("Held-out pairs", "Empty: a share of the prompts is held out.", {}),
    "model.adapter": ("Start from the adapter of", "The reference then includes it.", {}),
    "reference.model": ("Reference model", "Empty: the weights that training starts from.", {}),
    "reference.adapter": ("Adapter on the reference", None, {}),
}
"""Label, help and further arguments of each drop-down of a path; one without them may stay empty."""
PATTERNS = {"model.path": choices.HUB_ID, "reference.model": choices.HUB_ID, "data.path": choices.HUB_DATA}
"""What a path may be besides one that is offered."""


def build(runs: Path, guard: Guard) -> None:
    """Fill the tab."""
    import gradio as gr

    knobs = recipe_form.knobs()
    gr.Markdown("## 1. Model, data and recipe")
    recipe = gr.Dropdown([], label="Recipe", info="Fills in the fields below.", elem_id="train-recipe")
    paths = _path_fields(gr)
    name = gr.Textbox(label="Name of the run", placeholder="left empty: model-data-number", elem_id="train-name")
    gr.Markdown(NO_CODE)
    fields = _knob_fields(gr, knobs)
    form = [paths[n] for n in PATHS] + [fields[knob.name] for knob in knobs]
    gr.Markdown("## 2. Memory and steps")
    ask = gr.Button("Estimate memory and steps", elem_id="train-plan")
    needs = gr.HTML(elem_id="train-needs")
    gr.Markdown("## 3. Train")
    command = gr.Textbox(label="The same in a terminal", lines=2, interactive=False, buttons=["copy"])
    begin = gr.Button("Start training", variant="primary", elem_id="train-start")
    chosen, note = _watch_panel(runs, guard)

    def started(request: gr.Request, title: str, *values: Any) -> Any:
        """Begin the training, and choose it among those that are watched."""
        guard(request)
        with show_errors():
            config = _form_config(runs, knobs, values)
            path = process.start_training(runs, title.strip() or _free_name(runs, config), config)
        return gr.update(choices=_trainings(runs), value=path.name), f"<p>{escape(path.name)} has started.</p>"

    def planned(request: gr.Request, *values: Any) -> str:
        """What `mlxdpo plan` would say of the form."""
        guard(request)  # it may fetch a tokenizer
        with show_errors():
            return estimate_html(estimate(_form_config(runs, knobs, values)))

    page = gr.context.Context.root_block
    page.load(lambda: _form_choices(gr, runs), None, [recipe, *paths.values()], **QUIET)
    recipe.change(
        lambda which: _filled_form(gr, runs, knobs, which) if which else [gr.skip()] * len(form), recipe, form, **QUIET
    )
    ask.click(planned, form, needs, **QUIET)
    begin.click(started, [name, *form], [chosen, note], concurrency_limit=1, **QUIET)
    gr.on(
        [page.load, *(one.change for one in (name, *form))],
        lambda title, *values: _command(runs, knobs, title, values),
        [name, *form],
        command,
        trigger_mode="always_last",
        **QUIET,
    )


def _watch_panel(runs: Path, guard: Guard) -> tuple[Any, Any]:
    """Where a training is watched, stopped and resumed; gives the drop-down of trainings and the line of news."""
    import gradio as gr

    chosen = gr.Dropdown([], label="Training", info="Runs and their state.", elem_id="train-chosen")
    with gr.Row():
        halt = gr.Button("Stop and save", variant="stop", elem_id="train-stop", interactive=False)
        again = gr.Button("Resume", elem_id="train-resume", interactive=False)
    note, view = gr.HTML(elem_id="train-note"), gr.HTML(elem_id="train-view")

    def stopped(request: gr.Request, which: str | None) -> str:
        """Ask the training to save and end."""
        guard(request)
        with show_errors():
            return f"<p>{escape(process.stop_training(choose(runs, which)))}</p>"

    def resumed(request: gr.Request, which: str | None) -> str:
        """Go on from the last checkpoint."""
        guard(request)
        with show_errors():
            process.resume_training(choose(runs, which))
        return f"<p>{escape(str(which))} continues from its last checkpoint.</p>"

    page, timer = gr.context.Context.root_block, gr.Timer(EVERY)
    for happening in (page.load, timer.tick):
        happening(lambda now: _current(gr, runs, now), chosen, chosen, **QUIET)
    for happening in (chosen.change, timer.tick):
        happening(lambda which: _training_shown(gr, runs, which), chosen, [view, halt, again], **QUIET)
    halt.click(stopped, chosen, note, **QUIET)
    again.click(resumed, chosen, note, concurrency_limit=1, **QUIET)
    return chosen, note


def _path_fields(gr: Any) -> dict[str, Any]:
    """Drop-downs for what is a path in the recipe, by its dotted name."""

    def field(name: str) -> Any:
        """The drop-down of one path."""
        label, info, own = PATH_FIELDS[name]
        return gr.Dropdown([] if own else NONE, label=label, info=info, **(own or {"value": ""}))

    with gr.Row():
        found = {name: field(name) for name in ("model.path", "data.path")}
    with gr.Accordion("Held-out pairs, starting adapter, other reference", open=False):
        found |= {name: field(name) for name in ("data.eval", "model.adapter", "reference.model", "reference.adapter")}
    return {name: found[name] for name in PATHS}


def _knob_fields(gr: Any, knobs: list[Knob]) -> dict[str, Any]:
    """The important ones in sight, the others by section below."""
    fields: dict[str, Any] = {}
    by_name = {knob.name: knob for knob in knobs}
    with gr.Row():
        fields |= {name: _field(gr, by_name[name]) for name in VISIBLE}
    sections = dict.fromkeys(knob.name.partition(".")[0] for knob in knobs)
    with gr.Accordion("All other settings", open=False):
        for section in sections:
            inside = [k for k in knobs if k.name.partition(".")[0] == section and k.name not in VISIBLE]
            with gr.Accordion(recipe_form.SECTIONS.get(section, section), open=False), gr.Row():
                fields |= {knob.name: _field(gr, knob) for knob in inside}
    return fields


def _field(gr: Any, knob: Knob) -> Any:
    about: dict[str, Any] = {
        "label": recipe_form.label_of(knob.name),
        "info": f"`{knob.name}` {knob.help}".strip(),
        "value": recipe_form.form_value(knob, knob.default),
        "min_width": 220,
    }
    if knob.kind == "choice":
        # An objective may be a sum of several: sigmoid+sft.
        own = knob.name == "loss.name"
        return gr.Dropdown([*([("not set", "")] if knob.empty else []), *knob.choices], allow_custom_value=own, **about)
    if knob.kind == "several":
        return gr.CheckboxGroup(list(knob.choices), **about)
    if knob.kind == "flag":
        return gr.Checkbox(**about)
    if knob.kind in ("whole", "number") and not knob.empty:
        return gr.Number(precision=0 if knob.kind == "whole" else None, **about)
    return gr.Textbox(placeholder="not set" if knob.empty else "", **about)


def _form_config(runs: Path, knobs: list[Knob], values: tuple[Any, ...]) -> Config:
    """The recipe that the form holds; paths are held against what there is."""
    offered = _offered(runs)
    given = {
        name: choices.checked_choice(value, offered[name], name, PATTERNS.get(name, choices.NOTHING))
        for name, value in zip(PATHS, values[: len(PATHS)], strict=True)
    }
    for name, what in (("model.path", "a model"), ("data.path", "preference data")):
        if given[name] is None:
            raise UserError(f"choose {what} first: {name} is empty")
    rest = zip(knobs, values[len(PATHS) :], strict=True)
    return recipe_form.to_config(given | {knob.name: recipe_form.entered(knob, value) for knob, value in rest})


def _filled_form(gr: Any, runs: Path, knobs: list[Knob], which: str) -> list[Any]:
    """The form's values from a recipe; a recipe that names no data leaves the chosen ones."""
    found = choices.recipes(runs, Path.cwd())
    if which not in found:
        raise gr.Error(f"there is no recipe {escape(which[:80])}; choose one from the list", duration=None)
    with show_errors():
        flat = recipe_form.flat(load_config(found[which]).model_dump())
    if flat["model.trust_remote_code"]:
        gr.Warning(NO_CODE)
    needed = ("model.path", "data.path")
    filled = [gr.skip() if name in needed and not flat.get(name) else flat.get(name) or "" for name in PATHS]
    return filled + [recipe_form.form_value(knob, flat.get(knob.name, knob.default)) for knob in knobs]


def _offered(runs: Path) -> dict[str, list[str]]:
    """What there is to choose from for each path of the recipe."""
    models, adapters = choices.models(runs, Path.cwd()), choices.adapters(runs)
    data = choices.data_files(runs, Path.cwd())
    return {
        "model.path": models,
        "model.adapter": adapters,
        "reference.model": models,
        "reference.adapter": adapters,
        "data.path": data,
        "data.eval": data,
    }


def _form_choices(gr: Any, runs: Path) -> list[Any]:
    """What there is to choose from, for the recipe's drop-down and those of the paths."""
    lists = {name: found if PATH_FIELDS[name][2] else NONE + found for name, found in _offered(runs).items()}
    return [gr.update(choices=list(choices.recipes(runs, Path.cwd())))] + [
        gr.update(choices=lists[name]) for name in PATHS
    ]


def _free_name(runs: Path, config: Config) -> str:
    stem = process.plain_name(f"{Path(config.model.path).name}-{Path(config.data.path).stem}")
    return next(name for n in range(1, 10**6) if not (runs / (name := f"{stem}-{n}")).exists())


def _command(runs: Path, knobs: list[Knob], title: str, values: tuple[Any, ...]) -> str:
    """The command line, or what is missing before there is one."""
    try:
        config = _form_config(runs, knobs, values)
        path = process.run_path(runs, title.strip() or _free_name(runs, config))
        return shlex.join(process.command_of(config.model_copy(update={"out": str(path)})))
    except UserError as error:
        return "\n".join(f"# {sentence}" for sentence in str(error).splitlines())


def _training_shown(gr: Any, runs: Path, which: str | None) -> Any:
    """The chosen training, and which of Stop and Resume make sense."""
    now = state(choose(runs, which)) if which in scan(runs) else ""
    live = now in ("training", "starting")
    return shown_training(runs, which), gr.update(interactive=live), gr.update(interactive=now == "interrupted")


def _trainings(runs: Path) -> list[tuple[str, str]]:
    return [(f"{name} ({state(path)})", name) for name, path in scan(runs).items()]


def _current(gr: Any, runs: Path, now: str | None) -> Any:
    """The choices with their states; without a choice, the one that trains, else the newest."""
    found = _trainings(runs)
    names = [name for _, name in found]
    live = [name for label, name in found if label.endswith(("(training)", "(starting)"))]
    return gr.update(choices=found, value=now if now in names else next(iter(live or names), None))


SAYS = {
    "starting": "loading the model, reading the data and scoring the reference; this page may be closed",
    "training": "you may close this page; training continues",
    "finished": "see it in the Compare tab",
    "interrupted": "Resume continues from its last checkpoint",
    "failed": "it stopped before its first step; the last lines say why. Fix that and start it again under its name",
    "unreadable": "its config.yaml is corrupted, or not a file; restore it, or remove the folder",
}


def shown_training(runs: Path, name: str | None) -> str:
    """HTML of the chosen training, or what to do when there is none."""
    if not name or name not in scan(runs):
        return "<p>No training yet. Choose model and data above and press Start training.</p>"
    return training_html(name, watch(choose(runs, name)))


def training_html(name: str, at: Watched) -> str:
    """State, progress, and log; every word of a log is escaped."""
    state = "stopping after the step it is in" if at.stopping else at.state
    resume = f"<p>In a terminal: <code>{escape(at.command)}</code></p>" if at.state == "interrupted" else ""
    log = f'<pre class="log" tabindex="0" aria-label="Log">{escape(at.log)}</pre>' if at.log else ""
    return (
        f'<p role="status"><strong>{escape(name)}: {state}.</strong> {SAYS[at.state][0].upper()}'
        f"{SAYS[at.state][1:]}.</p>{_progress(at)}"
        f"{resume}{log}"
    )


def _progress(at: Watched) -> str:
    if at.step is None:
        return ""
    words = [f"step {at.step:,}" + (f" of {at.steps:,}" if at.steps else "")]
    words += [f"{at.rate:,.0f} tokens/s"] if at.rate is not None else []
    words += [f"{clock(at.left)} left"] if at.left is not None else []
    words += [f"{at.memory:.2f} GB in use"] if at.memory is not None else []
    words += [f"{at.cached:.2f} GB cached"] if at.cached is not None else []
    bar = f'<progress max="{at.steps}" value="{at.step}" style="width:100%"></progress>' if at.steps else ""
    return f"{bar}<p>{', '.join(words)}</p>"


PATIENCE = 180  # seconds; reading and encoding a large data set takes a while the first time


def estimate(config: Config) -> dict[str, Any]:
    """`mlxdpo plan --json` for the recipe. Raises `UserError` with the sentence that it gives."""
    words = [sys.executable, "-P", "-m", "mlxdpo.cli", "plan", *flags(config), "--json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"the plan took longer than {PATIENCE} s; run it in a terminal: mlxdpo plan ...") from None
    if done.returncode:
        raise UserError(complaint(done.stderr or done.stdout))
    return json.loads(done.stdout)


def complaint(said: str) -> str:
    """The sentence in what a failed command said: the one after "error:", else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines or ["it stopped without a message"])[-1]


def estimate_html(plan: dict[str, Any]) -> str:
    """Whether it fits, the memory by part, the steps, and what would help."""
    summary, machine = plan["plan"], plan["machine"]
    verdict = "It fits this machine." if plan["fits"] else "It does not fit with the system and other programs."
    of = f" of {size(machine)}" if machine else ""
    head = f"Peak memory {size(plan['peak'])}{of}, in the {escape(plan['phase'])} phase."
    steps = (
        f"{summary['steps']:,} optimizer steps over {summary['pairs']:,} pairs; longest row {summary['longest']:,}"
        f" tokens; {summary['waste']:.0%} of the computed tokens are padding or repeated."
    )
    help_ = "".join(
        f"<li><code>{escape(change['setting'])}</code>: {size(change['peak'])}</li>" for change in plan["change"]
    )
    advice = f"<p>What helps, most effective first:</p><ul>{help_}</ul>" if help_ else ""
    rows = [[words, size(plan["parts"][name])] for name, words in PARTS.items()]
    return f"<p><strong>{verdict}</strong> {head} {steps}</p>{advice}{html_table('Memory', ('part', 'size'), rows)}"


def size(count: int) -> str:
    """Bytes as GB, small ones as MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
