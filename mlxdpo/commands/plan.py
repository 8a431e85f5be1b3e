"""`mlxdpo plan [RECIPE.yaml] [--model M --data D ...] [--measure] [--json]`: what a run will need and can show."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdpo.commands.terminal import console
from mlxdpo.commands.train import NOTHING, Overrides
from mlxdpo.config import load_config
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.estimate.forecast import Forecast


def run(
    recipe: Path | None = None, /, *, config: Overrides = NOTHING, measure: bool = False, json: bool = False
) -> int:
    """Estimate a run without loading the model: memory by part, steps, padding, and what to change; the smallest effect
    that its held-out prompts can show, and whether its steps and rate can move the model.

    Args:
        recipe: YAML file with any of the settings below; the command line takes precedence.
        config: Settings of the run.
        measure: Load the model, take three steps and discard them, to estimate the training time on this machine.
        json: Machine-readable; sizes are bytes.
    """
    from mlxdpo.estimate.forecast import forecast

    found = forecast(load_config(recipe, config.model_dump(exclude_unset=True)))
    seconds = training_seconds(found) if measure else None
    if json:
        print(jsonlib.dumps(forecast_json(found, seconds), indent=2))
        return 0
    show_forecast(found)
    if seconds is not None:
        from mlxdpo.io.progress import clock

        console.print(f"training takes about {clock(seconds)} here, measured on its first batch")
    return 0


def training_seconds(found: Forecast) -> float:
    """Seconds of all steps, measured on three. Raises `UserError` for stages without pairs to train on, and for a run
    that does not fit."""
    from mlxdpo.training.pace import pace_of

    if not found.fits and not found.config.train.allow_over_memory:
        raise UserError("--measure loads the model, but this run does not fit; drop it to see what helps")
    return pace_of(found.config, found.data).run


def show_prospects(found: Forecast) -> None:
    """Pairs, what the held-out ones can show, and whether steps times rate can move the model."""
    from mlxdpo.training.rate_probe import rates_note
    from mlxdpo_eval.metrics.sequential import minimum_detectable

    data, prompts = found.data, prompts_held_out(found)
    console.print(f"{len(data.train)} training pairs; {len(data.heldout)} held-out pairs of {prompts} prompts")
    if prompts:
        least = minimum_detectable(prompts)
        shows = (
            "too few to show any effect"
            if least is None
            else f"the smallest accuracy or win rate that they can distinguish from 0.50: {least:.2f} (power 0.8)"
        )
        console.print(shows)
    if note := rates_note(found.config, found.summary.steps):
        console.print(note, style="yellow", markup=False)


def prompts_held_out(found: Forecast) -> int:
    """Distinct prompts of the held-out pairs."""
    from mlxdpo.data.examples import Examples

    return len(set(Examples.of(found.data.heldout).prompt_numbers.tolist()))


def forecast_json(found: Forecast, seconds: float | None = None) -> dict[str, Any]:
    """The forecast as plain values; sizes in bytes, `seconds` of training where they were measured."""
    from mlxdpo.estimate.forecast import PARTS
    from mlxdpo.training.rate_probe import rates_note
    from mlxdpo_eval.metrics.sequential import minimum_detectable

    memory, summary, prompts = found.memory, found.summary, prompts_held_out(found)
    return {
        "pairs": len(found.data.train),
        "heldout": len(found.data.heldout),
        "heldout_prompts": prompts,
        "detectable": minimum_detectable(prompts) if prompts else None,
        "warning": rates_note(found.config, summary.steps) or None,
        "seconds": seconds,
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

    from mlxdpo.estimate.forecast import PARTS
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
    show_prospects(found)
    if found.fits:
        console.print("it fits")
        return
    console.print(
        "it does not fit with the system and other programs; what helps, most effective first:", style="yellow"
    )
    for change in found.advice:
        console.print(f"  {change.setting}: {_gb(change.peak)} GB", style="yellow")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
