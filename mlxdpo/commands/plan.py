"""`mlxdpo plan [RECIPE.yaml] [--model M --data D ...] [--json]`: what a run will need, before any weight is loaded."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdpo.commands.train import NOTHING, Overrides
from mlxdpo.config import load_config
from mlxdpo.estimate.forecast import PARTS

if TYPE_CHECKING:
    from mlxdpo.estimate.forecast import Forecast


def run(recipe: Path | None = None, /, *, config: Overrides = NOTHING, json: bool = False) -> int:
    """Say what a run will need, before any weight is loaded: memory by part, steps, padding, and what to change.

    Args:
        recipe: YAML file with any of the settings below; the command line wins over it.
        config: Settings of the run.
        json: Machine-readable; sizes are bytes.
    """
    from mlxdpo.estimate.forecast import forecast

    found = forecast(load_config(recipe, config.model_dump(exclude_unset=True)))
    if json:
        print(jsonlib.dumps(forecast_json(found), indent=2))
    else:
        show_forecast(found)
    return 0


def forecast_json(found: Forecast) -> dict[str, Any]:
    """The forecast as plain values; sizes in bytes."""
    memory, summary = found.memory, found.summary
    return {
        "peak": memory.peak,
        "phase": worst_phase(found),
        "parts": {name: getattr(memory, name) for name in PARTS},
        "phases": memory.phases,
        "machine": found.machine,
        "fits": found.fits,
        "change": [change._asdict() for change in found.advice],
        "plan": summary._asdict(),
    }


def worst_phase(found: Forecast) -> str:
    """The phase of the run with the highest peak."""
    phases = found.memory.phases
    return max(phases, key=lambda name: phases[name])


def show_forecast(found: Forecast) -> None:
    """Print it for a person."""
    from rich.table import Table

    from mlxdpo.commands.terminal import console
    from mlxdpo.training.plan import plan_sentence

    memory, summary = found.memory, found.summary
    table = Table("memory", "GB")
    for name, words in PARTS.items():
        table.add_row(words, _gb(getattr(memory, name)))
    table.add_row(f"peak, in the {worst_phase(found)} phase", _gb(memory.peak), style="bold")
    table.add_row("this machine", _gb(found.machine))
    console.print(table)
    console.print(f"{summary.steps} optimizer steps; longest row {summary.longest} tokens")
    console.print(plan_sentence(summary))
    if found.fits:
        console.print("it fits")
        return
    console.print("it does not fit beside the system and other programs; what helps, most first:", style="yellow")
    for change in found.advice:
        console.print(f"  {change.setting}: {_gb(change.peak)} GB", style="yellow")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
