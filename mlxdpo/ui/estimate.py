"""What a training will need, asked of `mlxdpo plan` in a process of its own: the page's never loads a model's shape."""

from __future__ import annotations

import json
import subprocess
import sys
from html import escape
from typing import Any

from mlxdpo.commands.plan import PARTS
from mlxdpo.config import Config
from mlxdpo.types import UserError
from mlxdpo.ui.recipe_form import flags
from mlxdpo.ui.tables import table

PATIENCE = 180  # seconds; reading and encoding a large data set takes a while the first time


def estimate(config: Config) -> dict[str, Any]:
    """`mlxdpo plan --json` for the recipe. Raises `UserError` with the sentence that it gives."""
    words = [sys.executable, "-m", "mlxdpo.cli", "plan", *flags(config), "--json"]
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


def as_html(plan: dict[str, Any]) -> str:
    """Whether it fits, the memory by part, the steps, and what would help."""
    outlook, machine = plan["plan"], plan["machine"]
    verdict = "It fits this machine." if plan["fits"] else "It does not fit beside the system and other programs."
    of = f" of {size(machine)}" if machine else ""
    head = f"Peak memory {size(plan['peak'])}{of}, in the {escape(plan['phase'])} phase."
    steps = (
        f"{outlook['steps']:,} optimizer steps over {outlook['pairs']:,} pairs; longest row {outlook['longest']:,}"
        f" tokens; {outlook['waste']:.0%} of the computed tokens are padding or repeated."
    )
    help_ = "".join(
        f"<li><code>{escape(change['setting'])}</code>: {size(change['peak'])}</li>" for change in plan["change"]
    )
    advice = f"<p>What helps, most first:</p><ul>{help_}</ul>" if help_ else ""
    rows = [[words, size(plan["parts"][name])] for name, words in PARTS.items()]
    return f"<p><strong>{verdict}</strong> {head} {steps}</p>{advice}{table('Memory', ('part', 'size'), rows)}"


def size(count: int) -> str:
    """Bytes as GB, small ones as MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
