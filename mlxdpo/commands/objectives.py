"""`mlxdpo objectives [NAME] [--json | --markdown]`"""

from __future__ import annotations

import difflib
import inspect
import json as jsonlib
from typing import Any

from mlxdpo.types import UserError


def run(name: str | None = None, /, *, json: bool = False, markdown: bool = False) -> None:
    """List the objectives with their papers, knobs and value before the first step.

    Parameters
    ----------
    name
        One objective, with its formula and the modifiers that it refuses.
    json
        Machine-readable.
    markdown
        The tables of docs/objectives.md.
    """
    from mlxdpo.losses import LOSSES
    from mlxdpo.losses.tables import TABLES, facts

    if name is not None and name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        raise UserError(
            f"{name} is no objective; {f'did you mean {near[0]}?' if near else 'mlxdpo objectives lists them'}"
        )
    rows = [facts(known) for known in ([name] if name else LOSSES)]
    if json:
        print(jsonlib.dumps(rows, indent=2))
    elif markdown:
        print("\n".join(table() for table in TABLES.values()))
    elif name:
        _show(rows[0], inspect.getdoc(LOSSES[name].function) or "")
    else:
        _list(rows)


def _list(rows: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    from mlxdpo.commands.screen import console

    table = Table(Column("loss.name", no_wrap=True), "what", "arXiv", "knobs", "at the start")
    for row in rows:
        knobs = ", ".join(f"{knob} {value:g}" for knob, value in row["knobs"].items())
        start = "" if row["start"] is None else f"{row['start']:.6g}"
        table.add_row(row["name"], row["title"], row["arxiv"], knobs, start)
    console.print(table)


def _show(row: dict[str, Any], formula: str) -> None:
    from mlxdpo.commands.screen import console
    from mlxdpo.knobs import LossConfig

    console.print(f"{row['name']}: {row['title']}", style="bold")
    console.print(formula)
    console.print(f"when: {row['use']}")
    for knob, value in row["knobs"].items():
        console.print(f"--loss.{knob.replace('_', '-')} {value:g}: {LossConfig.model_fields[knob].description}")
    for modifier, reason in row["refuses"].items():
        console.print(f"not with {modifier}: {reason}")
