"""A training as the page shows it: its state, how far it is, how fast, and the last lines it said."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mlxdpo.commands.screen import clock
from mlxdpo.ui.run_list import choose, scan
from mlxdpo.ui.training import Watched, watch

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
    return as_html(name, watch(choose(runs, name)))


def as_html(name: str, at: Watched) -> str:
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
