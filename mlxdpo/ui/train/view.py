"""A training as the page shows it: its state, how far it is, how fast, its last lines; and what one will need.

That is asked of `mlxdpo plan` in another process: the page's never loads a model's shape.
"""

from __future__ import annotations

import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.config import Config
from mlxdpo.estimate.forecast import PARTS
from mlxdpo.training.plan import clock
from mlxdpo.types import UserError
from mlxdpo.ui.runs.run_list import choose, scan
from mlxdpo.ui.train.process import Watched, watch
from mlxdpo.ui.train.recipe_form import flags
from mlxdpo.ui.widgets import html_table

STYLE = """<style>
.log { contain: inline-size; max-height: 300px; overflow: auto; padding: 8px; font-size: .85em; white-space: pre-wrap;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
</style>"""
SAYS = {
    "starting": "loading the model, reading the data and scoring the reference; this page may be closed",
    "training": "this page may be closed, the training goes on",
    "finished": "see it in the Compare tab",
    "interrupted": "Resume goes on from its last checkpoint",
    "failed": "it stopped before its first step; the last lines say why. Mend that and start it again under its name",
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
        f'{STYLE}<p role="status"><strong>{escape(name)}: {state}.</strong> {SAYS[at.state][0].upper()}'
        f"{SAYS[at.state][1:]}.</p>{_progress(at)}"
        f"{resume}{log}"
    )


def _progress(at: Watched) -> str:
    if at.step is None:
        return ""
    words = [f"step {at.step:,}" + (f" of {at.steps:,}" if at.steps else "")]
    words += [f"{at.rate:,.0f} tokens/s"] if at.rate is not None else []
    words += [f"{clock(at.left)} left"] if at.left is not None else []
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
    return (named or lines or ["it stopped and said nothing"])[-1]


def estimate_html(plan: dict[str, Any]) -> str:
    """Whether it fits, the memory by part, the steps, and what would help."""
    summary, machine = plan["plan"], plan["machine"]
    verdict = "It fits this machine." if plan["fits"] else "It does not fit beside the system and other programs."
    of = f" of {size(machine)}" if machine else ""
    head = f"Peak memory {size(plan['peak'])}{of}, in the {escape(plan['phase'])} phase."
    steps = (
        f"{summary['steps']:,} optimizer steps over {summary['pairs']:,} pairs; longest row {summary['longest']:,}"
        f" tokens; {summary['waste']:.0%} of the computed tokens are padding or repeated."
    )
    help_ = "".join(
        f"<li><code>{escape(change['setting'])}</code>: {size(change['peak'])}</li>" for change in plan["change"]
    )
    advice = f"<p>What helps, most first:</p><ul>{help_}</ul>" if help_ else ""
    rows = [[words, size(plan["parts"][name])] for name, words in PARTS.items()]
    return f"<p><strong>{verdict}</strong> {head} {steps}</p>{advice}{html_table('Memory', ('part', 'size'), rows)}"


def size(count: int) -> str:
    """Bytes as GB, small ones as MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
