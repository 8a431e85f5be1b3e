"""`mlxdpo compare RUN_A RUN_B`"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

from mlxdpo.runs import Run

FLIPS = 10


def run(first: Path, second: Path, /, *, json: bool = False) -> int:
    """Hold an evaluated run against another, pair by pair and prompt by prompt.

    Exit status 1: something got significantly worse.

    Args:
        first: Run directory that is the yardstick.
        second: Run directory that is compared with it.
        json: Print the comparison as JSON, every flip included.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.compare import compare_runs, comparison_sentence
    from mlxdpo_eval.results import to_json

    found = compare_runs(Run.open(first), Run.open(second))
    if json:
        print(jsonlib.dumps(to_json(found) | {"sentence": comparison_sentence(found)}, ensure_ascii=False))
        return 1 if found.regressed else 0
    console.print(_changes_table(found))
    for flip in found.flips[:FLIPS]:
        where = flip.get("where") or f"sample {flip.get('sample')}"
        console.print(
            f"{flip['flip']}  {flip['measure']}  {where}  {' '.join(flip['prompt'].split())[:70]}", markup=False
        )
    if len(found.flips) > FLIPS:
        console.print(f"and {len(found.flips) - FLIPS} more flips; --json lists all")
    for name, count in found.only.items():
        if count:
            console.print(f"{count} {name} are in one of the two evaluations only and were left out", style="yellow")
    if not found.same_start:
        console.print(
            "the runs started from different models: win-rates are each against its own start", style="yellow"
        )
    console.print(comparison_sentence(found), style="bold", markup=False)
    return 1 if found.regressed else 0


def _changes_table(found: Any) -> Any:
    from rich.table import Table

    sheet = Table("", "first", "second", "change [95 % interval]", "gained / lost", "sign test p", "")
    for c in found.changes:
        bounds = "no interval" if c.interval is None else f"[{c.interval.low:+.3f}, {c.interval.high:+.3f}]"
        change, flips = f"{c.change:+.3f} {bounds} n={c.items}", f"{c.gained} / {c.lost}"
        sheet.add_row(
            c.measure, f"{c.first:.3f}", f"{c.second:.3f}", change.replace("[", r"\["), flips, f"{c.p:.3g}", c.verdict
        )
    return sheet
